"""Whether the images of a data set can be read at all."""

from mimref.data.decode import BadImage, BadImages, none_readable
from mimref.data.index.remote import UnreachableError
from mimref.data.sources import ImageSource


def check_readable(source: ImageSource, max_bad: int) -> None:
    """Read images until one can be read, usually the first, so that no run starts on images that none of it can use.

    Raises DataError if none can be read, or the first `max_bad` and one more cannot.
    """
    if source.in_memory:
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
            return
    raise none_readable(source.name, bad.items)
