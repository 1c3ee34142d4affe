"""The encoders in a weights file, by the prefixes of their tensors' names, and the choice among several.

A prefix is empty or ends with a dot. For display, the final dot is dropped, and the empty prefix is a single dot.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile

import torch
from torch import Tensor

from mimref.encoders.layouts import BLOCKS, EVALUATED, PATCHES, PREFERRED


class Unrecognised(Exception):
    """A file is not recognised as an encoder of a known kind; the message is one line without the file's name."""


class NoChoice(Unrecognised):
    """The choice between a file's encoders is ambiguous, or the requested encoder does not exist."""


def find_encoders(named: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the prefix of every vision transformer to the name of its patch embedding below that prefix.

    A patch embedding without blocks counts only if none has blocks.
    """
    found = {match[1]: match[2] for name in named if (match := PATCHES.fullmatch(name))}
    with_blocks = [
        prefix for prefix in found if any(BLOCKS.match(name[len(prefix) :]) for name in below(named, prefix))
    ]
    return {prefix: found[prefix] for prefix in with_blocks or found}


def matching_prefixes(names: Iterable[str], wanted: Collection[str]) -> list[str]:
    """Return the prefixes below which the largest number of `wanted` names is found; empty if none is found."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for length in range(len(parts)):
            if ".".join(parts[length:]) in wanted:
                counts["".join(f"{part}." for part in parts[:length])] += 1
    most = max(counts.values(), default=0)
    return [prefix for prefix, count in counts.items() if count == most]


def below(named: Iterable[str], prefix: str, prefixes: Iterable[str] = ()) -> list[str]:
    """Return the names that begin with `prefix`, except those of other encoders nested below it."""
    inside = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    return [name for name in named if name.startswith(prefix) and not name.startswith(inside)]


def choose_part(named: Mapping[str, Tensor], prefixes: Sequence[str], asked: str | None) -> str:
    """Choose one of several encoders: the one asked for, otherwise the one that the authors of such files evaluate.

    Returns its prefix. asked: a prefix, or a part of one that no other prefix has. Raises NoChoice.
    """
    if asked is not None:
        return _asked_part(prefixes, asked)
    distinct = _without_copies(named, prefixes)
    best = [each for each in distinct if not any(_is_preferred(other, each) for other in distinct)]
    lowest = min(map(_rank, best), default=[])
    best = [each for each in best if _rank(each) == lowest]
    if len(best) == 1:
        return best[0]
    raise NoChoice(
        f"contains several encoders ({show_parts(prefixes)}), and their names do not show which one is evaluated; "
        f"choose one: --encoder {show_part(distinct[0])}"
    )


def _asked_part(prefixes: Sequence[str], asked: str) -> str:
    name = asked.strip(".")
    exact = [each for each in prefixes if each.rstrip(".") == name]
    whole = [each for each in prefixes if name and f".{name}." in f".{each}"]
    anywhere = [each for each in prefixes if name and name in each]
    found = next((each for each in (exact, whole, anywhere) if each), [])
    if len(found) == 1:
        return found[0]
    what = f"could be {show_parts(found)}" if found else "is none of its encoders"
    raise NoChoice(f"--encoder {asked} {what}; it contains {show_parts(prefixes)}")


def _without_copies(named: Mapping[str, Tensor], prefixes: Sequence[str]) -> list[str]:
    """Drop the prefixes of modules that share all their tensors with an earlier module; short prefixes come first."""
    found: dict[frozenset[tuple[str, int]], str] = {}
    for prefix in sorted(prefixes, key=len):
        names = below(named, prefix, prefixes)
        memory = frozenset((name[len(prefix) :], _memory(named[name])) for name in names)
        if not any(shared >= memory for shared in found):
            found[memory] = prefix
    return list(found.values())


def _memory(tensor: Tensor) -> int:
    has_memory = tensor.layout is torch.strided and not tensor.is_meta
    return tensor.data_ptr() if has_memory else id(tensor)


def _is_preferred(one: str, other: str) -> bool:
    """Return whether the first rule that distinguishes the two prefixes prefers `one`."""
    ours, theirs = _differing(one, other)
    for preferred, rejected in EVALUATED:
        both = _matches(ours, preferred), _matches(theirs, preferred)
        if both == (True, False) and _matches(theirs, rejected):
            return True
        if both == (False, True) and _matches(ours, rejected):
            return False
    return False


def _differing(one: str, other: str) -> tuple[list[str], list[str]]:
    """Return the parts of two prefixes without those that they share at the beginning and at the end."""
    ours, theirs = one.split(".")[:-1], other.split(".")[:-1]
    shared = _shared(ours, theirs)
    ours, theirs = ours[shared:], theirs[shared:]
    shared = _shared(ours[::-1], theirs[::-1])
    return ours[: len(ours) - shared], theirs[: len(theirs) - shared]


def _shared(ours: Sequence[str], theirs: Sequence[str]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))))


def _matches(parts: list[str], pattern: str) -> bool:
    return any(re.fullmatch(pattern, text) for text in (*parts, ".".join(parts)))


def _rank(prefix: str) -> list[int]:
    return [(*PREFERRED, part).index(part) for part in prefix.split(".")[:-1]]


def beside(name: str, prefix: str) -> str:
    """Return the name of a tensor outside the encoder, without the leading parts shared with the encoder's prefix."""
    parts = name.split(".")
    return ".".join(parts[_shared(parts[:-1], prefix.split(".")[:-1]) :])


def group_beside(names: Iterable[str], prefix: str) -> dict[str, list[str]]:
    """Group names outside the encoder by the first part that they do not share with its prefix."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(beside(name, prefix).partition(".")[0], []).append(name)
    return groups


def show_part(prefix: str) -> str:
    """Return a prefix as users write it."""
    return prefix[:-1] or "."


def show_parts(prefixes: Iterable[str]) -> str:
    """Return prefixes as users write them, separated by commas."""
    return ", ".join(sorted(map(show_part, prefixes)))


def choice_notice(prefix: str, prefixes: Sequence[str], asked: str | None) -> list[str]:
    """Return a notice about a choice that the user did not make; empty if there was nothing to choose."""
    if asked is not None or len(prefixes) < 2:
        return []
    others = show_parts(each for each in prefixes if each != prefix)
    return [f"of several encoders {show_part(prefix)} is read; --encoder chooses another one ({others})"]


def left_out_notice(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a notice about the tensors outside the encoder, by group; empty if there are none."""
    shown = [f"{group} ({len(names)} tensor{'s' * (len(names) > 1)})" for group, names in groups.items()]
    more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
    return [f"left out beside the encoder: {', '.join(shown[:6])}{more}"] if shown else []
