"""What of a weights file belongs to no encoder that is read: which group it is of, and what is said of it."""

import re
from collections.abc import Iterable, Mapping

from mimref.encoders.layouts import DROPPABLE, DROPPABLE_BESIDE
from mimref.encoders.parts import Unrecognised, left_out_notice

_TRAINING = "training state"


def group_leftovers(
    unused: Mapping[str, str], outside: Iterable[tuple[str, str]], groups: Mapping[str, str], notices: list[str]
) -> dict[str, list[str]]:
    """Full names by group, from names without and with prefix. Raises Unrecognised for a tensor of no group.

    unused: inside the encoder; outside: beside it, where other tensors are grouped by the first part of their names.
    groups: from group to the pattern of its names, inside the encoder and beside it. notices: receives what lies beside
    the encoder.
    """
    of_encoder, of_file = list(groups.items()), [*groups.items(), *DROPPABLE.items(), *DROPPABLE_BESIDE.items()]
    dropped: dict[str, list[str]] = {}
    unexpected = []
    for name, full in unused.items():
        group = _group(name, of_encoder)
        if group is None:
            unexpected.append(full)
        else:
            dropped.setdefault(group, []).append(full)
    if unexpected:
        raise Unrecognised(join_problems([f"{name} is unexpected" for name in unexpected]))
    left_out: dict[str, list[str]] = {}
    for name, full in outside:
        group, first = _group(name, of_file), name.partition(".")[0]
        dropped.setdefault(group or first, []).append(full)
        if group != _TRAINING:
            left_out.setdefault(first, []).append(full)
    notices += left_out_notice(left_out)
    return dropped


def _group(name: str, groups: Iterable[tuple[str, str]]) -> str | None:
    return next((group for group, pattern in groups if re.fullmatch(pattern, name)), None)


def join_problems(problems: list[str], most: int = 4) -> str:
    """The first problems in one line, and how many more there are."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more
