"""Files on other machines, of which parts are read by themselves: anything that fsspec has a file system for.

http(s) needs the extra `mimref[remote]`; s3, gs and others need fsspec's own packages for them (s3fs, gcsfs), and
credentials where those look for them.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import IO, Any, TypeVar

import fsspec

from mimref.data.decode import one_line, printable
from mimref.errors import DataError

THREADS = 16
"""Questions to a server at a time."""

WAITS_S = (1.0, 2.0, 4.0, 8.0)
"""Before a server that has not answered is asked again."""

GONE = (-2, -2)
"""State of a file that is not there."""

# Parts of the names by which file systems tell what goes with a file's content; times of access do not.
_OF_CONTENT = (
    "etag",
    "md5",
    "crc",
    "sha",
    "digest",
    "checksum",
    "generation",
    "version",
    "mtime",
    "modified",
    "commit",
)

_T = TypeVar("_T")


class UnreachableError(DataError):
    """A server that does not answer, or not with what was asked for."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def states(urls: Sequence[str]) -> list[tuple[int, int]]:
    """Size in bytes of every file, and a number that changes with its content, as far as the server tells; or GONE.

    Raises DataError for a file system that is not installed, or a server that does not answer.
    """
    return list(at_once(_state, urls))


def at_once(ask: Callable[[str], _T], urls: Iterable[str]) -> Iterator[_T]:
    """What `ask` says of every file, in order; of some at a time. A server that does not answer is asked again.

    Whoever stops listening, or is interrupted, does not wait for answers that are under way.
    """
    jobs: SimpleQueue[tuple[int, str]] = SimpleQueue()
    answers: SimpleQueue[tuple[int, _T | None, Exception | None]] = SimpleQueue()
    count = 0
    for url in urls:
        jobs.put((count, url))
        count += 1
    stop = threading.Event()

    def work() -> None:
        """Answer one question after the other, until there is none left or nobody listens."""
        while not stop.is_set():
            try:
                number, url = jobs.get_nowait()
            except Empty:
                return
            try:
                answers.put((number, _patiently(ask, url, stop), None))
            except Exception as error:
                answers.put((number, None, error))

    for _ in range(min(THREADS, count)):
        # Python waits at its exit for those of a pool, but not for these.
        threading.Thread(target=work, daemon=True).start()
    early: dict[int, tuple[_T | None, Exception | None]] = {}
    try:
        for number in range(count):
            while number not in early:
                came, answer, failure = answers.get()
                early[came] = answer, failure
            told, error = early.pop(number)
            if error is not None:
                raise error
            yield told  # type: ignore[misc]  # there is an answer where there is no error
    finally:
        stop.set()


def _patiently(ask: Callable[[str], _T], url: str, stop: threading.Event) -> _T:
    for wait in WAITS_S:
        try:
            return ask(url)
        except UnreachableError:
            if stop.wait(wait):
                raise
    return ask(url)


def expand(pattern: str) -> list[str]:
    """URLs of the files that a pattern with stars stands for, sorted."""
    system, path = _system(pattern)
    try:
        return sorted(system.unstrip_protocol(found) for found in system.glob(path))
    except Exception as error:  # whatever the file system's client raises
        raise unreachable(pattern, error) from error


def open_whole(url: str) -> IO[bytes]:
    """A file to be read from end to end; seeking skips what is already on its way.

    Raises FileNotFoundError, UnreachableError, and DataError for a server that gives no parts of files.
    """
    system, path = _system(url)
    try:
        opened: IO[bytes] = system.open(path, "rb", cache_type="readahead")
    except Exception as error:  # whatever the file system's client raises
        raise _translated(url, error) from error
    try:
        opened.seek(1)
        opened.seek(0)
    except ValueError as error:
        raise no_parts(url) from error
    return opened


def read_parts(urls: Sequence[str], starts: Sequence[int], ends: Sequence[int]) -> list[bytes | FileNotFoundError]:
    """Bytes `starts` to `ends` of every file, all asked for at once; an error for files that are no longer there.

    Raises UnreachableError when a server does not answer after several tries, DataError when it gives no parts of
    files.
    """
    found: dict[int, bytes | FileNotFoundError] = {}
    for wait in (*WAITS_S, None):
        missing = [number for number in range(len(urls)) if number not in found]
        error = _try(missing, urls, starts, ends, found)
        if error is None:
            break
        if wait is None:
            raise unreachable(urls[min(set(missing) - found.keys())], error)
        time.sleep(wait)
    return [found[number] for number in range(len(urls))]


def _try(
    missing: Sequence[int],
    urls: Sequence[str],
    starts: Sequence[int],
    ends: Sequence[int],
    found: dict[int, bytes | FileNotFoundError],
) -> Exception | None:
    """Read what is missing once; an error of a read that another try may mend."""
    system, _ = _system(urls[0])
    paths = [system._strip_protocol(urls[number]) for number in missing]
    try:
        parts = system.cat_ranges(
            paths, [starts[number] for number in missing], [ends[number] for number in missing], on_error="return"
        )
    except Exception as error:  # whatever the file system's client raises
        return error
    worst: Exception | None = None
    for number, part in zip(missing, parts, strict=True):
        wanted = ends[number] - starts[number]
        if isinstance(part, Exception):
            translated = _translated(urls[number], part)
            if isinstance(translated, FileNotFoundError):
                found[number] = translated
            else:
                worst = part
        elif len(part) > wanted:
            raise no_parts(urls[number])
        elif len(part) < wanted:
            worst = EOFError(f"{len(part)} of {wanted} bytes came")
        else:
            found[number] = bytes(part)
    return worst


def _state(url: str) -> tuple[int, int]:
    system, path = _system(url)
    try:
        info: Mapping[str, Any] = system.info(path)
    except Exception as error:  # whatever the file system's client raises
        translated = _translated(url, error)
        if isinstance(translated, FileNotFoundError):
            return GONE
        raise translated from error
    told = sorted((key, str(value)) for key, value in info.items() if any(part in key.lower() for part in _OF_CONTENT))
    return int(info.get("size") or -1), int.from_bytes(hashlib.sha256(repr(told).encode()).digest()[:5])


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, one per process, and the URL as it wants it."""
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        protocol = url.partition("://")[0]
        raise DataError(
            f"{printable(url)}: {protocol} cannot be read ({one_line(error)}); pip install 'mimref[remote]' for http"
        ) from error
    return system, str(path)


def _translated(url: str, error: Exception) -> FileNotFoundError | UnreachableError:
    """What an error of a file system's client means. fsspec's http calls whatever goes wrong a missing file."""
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410):
            return error
        return unreachable(url, cause)
    return unreachable(url, error)


def unreachable(url: str, error: BaseException) -> UnreachableError:
    """What to raise for an error of a file system's client, which may be of any type."""
    return UnreachableError(f"{printable(url)}: cannot be read from there ({one_line(error)})")


def no_parts(url: str) -> DataError:
    """What to raise for a server from which files can only be had as a whole."""
    return DataError(f"{printable(url)}: this server gives no parts of files; download the shards")
