"""Files on other machines, of which parts are read by themselves: anything that fsspec has a file system for.

http(s) needs the extra `mimref[remote]`; s3, gs and others need fsspec's own packages for them (s3fs, gcsfs), and
credentials where those look for them.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar

import fsspec

from mimref.data.decode import one_line, printable
from mimref.errors import DataError

THREADS = 16
"""Questions to a server at a time."""
WAITS_S = (1.0, 2.0, 4.0, 8.0)
"""Before a server that has not answered is asked again."""

_T = TypeVar("_T")


class UnreachableError(DataError):
    """A server that does not answer, or not with what was asked for."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def exist(urls: Sequence[str]) -> list[bool]:
    """Which of the files are there. Raises DataError for a file system that is not installed, or does not answer."""

    def is_there(url: str) -> bool:
        try:
            return bool(_info(url))
        except FileNotFoundError:
            return False

    return list(at_once(is_there, urls, patient=False))


def states(urls: Sequence[str]) -> list[tuple[int, int]]:
    """Size in bytes of every file, and a number that changes with its content, as far as the server tells."""
    return list(at_once(_state, urls))


def at_once(ask: Callable[[str], _T], urls: Iterable[str], *, patient: bool = True) -> Iterator[_T]:
    """What `ask` says of every file, in order; of some at a time. patient: ask a server again that does not answer."""

    def patiently(url: str) -> _T:
        for wait in (*(WAITS_S if patient else ()), None):
            try:
                return ask(url)
            except UnreachableError:
                if wait is None:
                    raise
                time.sleep(wait)
        raise AssertionError("the last try has ended")

    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(patiently, urls)


def expand(pattern: str) -> list[str]:
    """URLs of the files that a pattern with stars stands for, sorted."""
    system, path = _system(pattern)
    try:
        return sorted(system.unstrip_protocol(found) for found in system.glob(path))
    except Exception as error:  # whatever the file system's client raises
        raise unreachable(pattern, error) from error


def open_whole(url: str) -> IO[bytes]:
    """A file to be read from end to end; seeking skips what is already on its way."""
    system, path = _system(url)
    opened: IO[bytes] = system.open(path, "rb", cache_type="readahead")
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
        if isinstance(part, FileNotFoundError):
            found[number] = part
        elif isinstance(part, Exception):
            worst = part
        elif len(part) > wanted:
            raise DataError(f"{printable(urls[number])}: this server gives no parts of files; download the shards")
        elif len(part) < wanted:
            worst = EOFError(f"{len(part)} of {wanted} bytes came")
        else:
            found[number] = bytes(part)
    return worst


def _state(url: str) -> tuple[int, int]:
    info = _info(url)
    told = sorted((key, str(value)) for key, value in info.items() if key not in ("name", "url"))
    return int(info.get("size") or -1), int.from_bytes(hashlib.sha256(repr(told).encode()).digest()[:5])


def _info(url: str) -> Mapping[str, Any]:
    """What the server says of a file. Raises FileNotFoundError, and UnreachableError."""
    system, path = _system(url)
    try:
        info: Mapping[str, Any] = system.info(path)
    except FileNotFoundError as error:
        # fsspec's http says so too when nobody answers.
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise unreachable(url, error.__cause__) from error
        raise
    except Exception as error:  # whatever the file system's client raises
        raise unreachable(url, error) from error
    return info


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


def unreachable(url: str, error: Exception) -> UnreachableError:
    """What to raise for an error of a file system's client, which may be of any type."""
    return UnreachableError(f"{printable(url)}: cannot be read from there ({one_line(error)})")
