"""Files on servers, read in parts: any URL that fsspec has a file system for.

http(s) needs the extra `mimref[remote]`; s3, gs and others need fsspec's own packages for them (s3fs, gcsfs), and
credentials where those packages look for them.
"""

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import IO, Any, TypeVar

import fsspec
import tenacity

from mimref.data.decode import printable, reason_of
from mimref.errors import DataError

THREADS = 16
"""Requests to a server at a time."""
ATTEMPTS = 5
FIRST_WAIT_S = 1.0
"""Before the second attempt; each further wait is twice as long."""

MISSING = (-2, -2)
"""State of a file that does not exist."""

# Parts of the names under which file systems list what changes with a file's content; times of access do not.
_OF_CONTENT = re.compile("etag|md5|crc|sha|digest|checksum|generation|version|mtime|modified|commit")

_T = TypeVar("_T")


class UnreachableError(DataError):
    """A server that does not answer, or not with what was asked for."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def file_states(urls: Sequence[str]) -> list[tuple[int, int]]:
    """Size in bytes of every file, and a number that changes with its content, as far as the server tells; or MISSING.

    Raises DataError for a file system that is not installed, or a server that does not answer.
    """
    return list(map_concurrently(_state, urls))


def map_concurrently(ask: Callable[[str], _T], urls: Iterable[str]) -> Iterator[_T]:
    """`ask` of every URL, in order, on several threads. UnreachableError is retried.

    A caller that stops iterating, or is interrupted, does not wait for requests under way.
    """
    stop = threading.Event()
    jobs: SimpleQueue[tuple[str, Future[_T]]] = SimpleQueue()
    answers: list[Future[_T]] = []
    for url in urls:
        answers.append(Future())
        jobs.put((url, answers[-1]))

    def work() -> None:
        """Make one request after the other, until none is left or nobody listens."""
        while not stop.is_set():
            try:
                url, answer = jobs.get_nowait()
            except Empty:
                return
            try:
                answer.set_result(_retrying(stop)(ask, url))
            except Exception as error:
                answer.set_exception(error)

    for _ in range(min(THREADS, len(answers))):
        # Python waits at its exit for the threads of a pool, but not for these.
        threading.Thread(target=work, daemon=True).start()
    try:
        while answers:
            yield answers.pop(0).result()
    finally:
        stop.set()


def _retrying(stop: threading.Event) -> tenacity.Retrying:
    """Retries UnreachableError with growing waits, which end early when `stop` is set."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(UnreachableError),
        wait=tenacity.wait_exponential(FIRST_WAIT_S),
        stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_when_event_set(stop),
        sleep=tenacity.sleep_using_event(stop),
        reraise=True,
    )


def expand_stars(pattern: str) -> list[str]:
    """URLs of the files that match a pattern with stars, sorted."""
    system, path = _system(pattern)
    try:
        return sorted(system.unstrip_protocol(found) for found in system.glob(path))
    except Exception as error:  # whatever the file system's client raises
        raise unreachable(pattern, error) from error


def open_sequential(url: str) -> IO[bytes]:
    """A file to read from end to end; seeking skips what is already on its way.

    Raises FileNotFoundError, UnreachableError, and DataError for a server that does not serve parts of files.
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
    """Bytes `starts` to `ends` of every file, in one concurrent request; an error for files that no longer exist.

    Raises UnreachableError when a server fails several times, DataError when it does not serve parts of files.
    """
    found: dict[int, bytes | FileNotFoundError] = {}
    _retrying(threading.Event())(_read_missing, urls, starts, ends, found)
    return [found[number] for number in range(len(urls))]


def _read_missing(
    urls: Sequence[str], starts: Sequence[int], ends: Sequence[int], found: dict[int, bytes | FileNotFoundError]
) -> None:
    """Add what is missing from `found`. Raises UnreachableError when something is still missing."""
    missing = [number for number in range(len(urls)) if number not in found]
    system, _ = _system(urls[0])
    paths = [system._strip_protocol(urls[number]) for number in missing]
    try:
        parts = system.cat_ranges(
            paths, [starts[number] for number in missing], [ends[number] for number in missing], on_error="return"
        )
    except Exception as error:  # whatever the file system's client raises
        raise unreachable(urls[missing[0]], error) from error
    failure: UnreachableError | None = None
    for number, part in zip(missing, parts, strict=True):
        wanted = ends[number] - starts[number]
        if isinstance(part, Exception):
            translated = _translated(urls[number], part)
            if isinstance(translated, FileNotFoundError):
                found[number] = translated
            else:
                failure = failure or translated
        elif len(part) > wanted:
            raise no_parts(urls[number])
        elif len(part) < wanted:
            failure = failure or unreachable(urls[number], EOFError(f"{len(part)} of {wanted} bytes came"))
        else:
            found[number] = bytes(part)
    if failure is not None:
        raise failure


def _state(url: str) -> tuple[int, int]:
    system, path = _system(url)
    try:
        info: dict[str, Any] = system.info(path)
    except Exception as error:  # whatever the file system's client raises
        translated = _translated(url, error)
        if isinstance(translated, FileNotFoundError):
            return MISSING
        raise translated from error
    marks = sorted((key, str(value)) for key, value in info.items() if _OF_CONTENT.search(key.lower()))
    return int(info.get("size") or -1), int.from_bytes(hashlib.sha256(repr(marks).encode()).digest()[:5])


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, one per process, and the URL in its own form."""
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        protocol = url.partition("://")[0]
        raise DataError(
            f"{printable(url)}: {protocol} cannot be read ({reason_of(error)}); pip install 'mimref[remote]' for http"
        ) from error
    return system, str(path)


def _translated(url: str, error: Exception) -> FileNotFoundError | UnreachableError:
    """What an error of a file system's client means: fsspec's http reports every failure as a missing file."""
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410):
            return error
        return unreachable(url, cause)
    return unreachable(url, error)


def unreachable(url: str, error: BaseException) -> UnreachableError:
    """The error to raise for a file system's client, whose own may be of any type."""
    return UnreachableError(f"{printable(url)}: cannot be read from there ({reason_of(error)})")


def no_parts(url: str) -> DataError:
    """The error to raise for a server that serves files as a whole only."""
    return DataError(f"{printable(url)}: this server gives no parts of files; download the shards")
