"""Files on servers, read in parts, from any URL for which fsspec has a file system.

http(s) needs the extra `mimref[remote]`; s3, gs and others need fsspec's own packages for them (s3fs, gcsfs), and
credentials where those packages look for them.
"""

import errno
import hashlib
import os
import re
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from typing import IO, Any, TypeVar

import fsspec
import tenacity

from mimref.data.decode import printable, reason_of
from mimref.errors import DataError, UserError

THREADS = 16
"""Number of shards to read or look up at a time."""
PART_THREADS = 64
"""Number of images to read at a time: these are small parts, whose cost is the wait for the server."""
ATTEMPTS = 5
FIRST_WAIT_S = 1.0
"""Wait before the second attempt; each further wait is twice as long."""

MISSING = (-2, -2)
"""State of a file that does not exist."""

# Parts of the names of the file attributes that change with a file's content, unlike access times.
_OF_CONTENT = re.compile("etag|md5|crc|sha|digest|checksum|generation|version|mtime|modified|commit")

_Question = TypeVar("_Question")
_Answer = TypeVar("_Answer")


class UnreachableError(DataError):
    """A server does not answer, or not with the requested bytes."""


def is_remote(path: str) -> bool:
    """Return whether a path is a URL."""
    return "://" in path


def map_concurrently(
    ask: Callable[[_Question], _Answer], questions: Iterable[_Question], *, threads: int = THREADS
) -> Iterator[_Answer]:
    """Yield `ask` of every question, in order, on several threads; it is retried if it raises UnreachableError.

    A caller that stops iterating, or is interrupted, does not wait for pending requests.
    """
    stop = threading.Event()
    retry = tenacity.retry(
        retry=tenacity.retry_if_exception_type(UnreachableError),
        wait=tenacity.wait_exponential(FIRST_WAIT_S),
        stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_when_event_set(stop),
        sleep=tenacity.sleep_using_event(stop),
        reraise=True,
    )
    # The threads of this pool, unlike those of concurrent.futures, are daemons: Python does not wait for them at exit.
    with ThreadPool(threads) as pool:
        try:
            yield from pool.imap(retry(ask), questions)
        finally:
            stop.set()


def file_state(url: str) -> tuple[int, int]:
    """Return a file's size in bytes, and a number that changes with its content; MISSING if there is no file.

    The number is a hash of what the server reports, or a local file's modification time in nanoseconds.
    Raises UnreachableError, and DataError for a file system that is not installed.
    """
    if not is_remote(url):
        try:
            status = os.stat(url)
        except OSError:
            return MISSING
        return status.st_size, status.st_mtime_ns
    try:
        with _client(url) as (system, path):
            info: dict[str, Any] = system.info(path)
    except FileNotFoundError:
        return MISSING
    marks = sorted((key, str(value)) for key, value in info.items() if _OF_CONTENT.search(key.lower()))
    return int(info.get("size") or -1), int.from_bytes(hashlib.sha256(repr(marks).encode()).digest()[:5])


def expand_stars(pattern: str) -> list[str]:
    """Return the URLs of the files that match a pattern with stars, sorted. Raises as `file_state` does."""
    try:
        with _client(pattern) as (system, path):
            return sorted(system.unstrip_protocol(found) for found in system.glob(path))
    except FileNotFoundError:
        return []


@contextmanager
def open_sequential(url: str) -> Iterator[IO[bytes]]:
    """Open a file to be read from start to end; seeking skips data that is already on its way.

    Raises FileNotFoundError, UnreachableError, and DataError for a server that does not serve parts of files, both on
    opening and on reading.
    """
    with _client(url) as (system, path):
        try:
            with system.open(path, "rb", cache_type="readahead") as file:
                file.seek(1)
                file.seek(0)
                yield file
        except ValueError as error:
            raise _no_parts(url) from error


def read_part(place: tuple[str, int, int]) -> bytes | FileNotFoundError:
    """Read part of a file; returns the error if the file no longer exists.

    place: the file's URL, the first byte and the number of bytes.
    Raises UnreachableError, and DataError for a server that does not serve parts of files.
    """
    url, start, size = place
    try:
        with _client(url) as (system, path):
            content = bytes(system.cat_file(path, start=start, end=start + size))
    except FileNotFoundError as error:
        return error
    if len(content) > size:
        raise _no_parts(url)
    if len(content) < size:
        raise _unreachable(url, EOFError(f"{len(content)} of {size} bytes arrived"))
    return content


@contextmanager
def _client(url: str) -> Iterator[tuple[Any, str]]:
    """Yield a URL's file system, one per process, and the URL in its form; translate whatever its client raises.

    Raises FileNotFoundError, UnreachableError, and DataError for a file system that is not installed.
    """
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        protocol = url.partition("://")[0]
        raise DataError(
            f"{printable(url)}: {protocol} cannot be read ({reason_of(error)}); pip install 'mimref[remote]' for http"
        ) from error
    try:
        yield system, str(path)
    except (UserError, tarfile.TarError, EOFError):  # raised by the content, not the client
        raise
    except Exception as error:
        # fsspec's http reports every failure as a missing file.
        cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
        if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410):
            raise FileNotFoundError(errno.ENOENT, "no such file") from error
        raise _unreachable(url, cause) from error


def _unreachable(url: str, error: BaseException) -> UnreachableError:
    return UnreachableError(f"{printable(url)}: cannot be read ({reason_of(error)})")


def _no_parts(url: str) -> DataError:
    return DataError(f"{printable(url)}: this server does not serve parts of files; download the shards")
