"""Whether the images of a data set can be read at all, and have the channels that they should."""

from mimref.data.decode import BadImage, BadImages, none_readable
from mimref.data.index.remote import UnreachableError
from mimref.data.sample import look_at
from mimref.data.sources import ImageSource


def check_readable(source: ImageSource, max_bad: int) -> None:
    """Read images until one can be read, usually the first, so that no run starts on images that none of it can use.

    Where `data.channels` states a number of channels, images all over the data set are looked at. Raises DataError for
    one of another number, if none can be read, or if the first `max_bad` and one more cannot.
    """
    if source.in_memory:
        if source.decoding.channels is not None:
            source.read(0)
        return
    bad = BadImages(max_bad)
    for index in range(min(len(source), max_bad + 1)):
        try:
            source.read(index)
        except BadImage as error:
            bad.add(error.path, error.reason)
        except UnreachableError:  # the run tries again for longer, and reports it
            return
        else:
            break
    else:
        raise none_readable(source.name, bad.items)
    if source.decoding.channels is not None:
        look_at(source)
