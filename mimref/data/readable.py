"""Check that the images of a data set can be read and have the stated number of channels."""

from mimref.data.decode import BadImage, BadImages, none_readable
from mimref.data.index.remote import UnreachableError
from mimref.data.sample import look_at
from mimref.data.sources import ImageSource


def check_readable(source: ImageSource, max_bad: int) -> None:
    """Read images until one succeeds, usually the first, so that no run starts on a data set that it cannot use at all.

    If `data.channels` states a number of channels, a sample of the whole data set is read too. Raises DataError for an
    image with another number of channels, if no image can be read, or if the first `max_bad` + 1 images cannot.
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
        except UnreachableError:  # the run retries for longer, and reports it
            return
        else:
            break
    else:
        raise none_readable(source.name, bad.items)
    if source.decoding.channels is not None:
        look_at(source)
