"""Tensors of a weights file that the encoder read from it does not need: their groups, and notices about them."""

import re
from collections.abc import Iterable, Mapping

from mimref.encoders.layouts import DROPPABLE, DROPPABLE_BESIDE
from mimref.encoders.parts import Unrecognised, left_out_notice

_TRAINING = "training state"


def group_leftovers(
    unused: Mapping[str, str], outside: Iterable[tuple[str, str]], groups: Mapping[str, str], notices: list[str]
) -> dict[str, list[str]]:
    """Return full names by group. Raises Unrecognised for a tensor inside the encoder that belongs to no group.

    unused, outside: names without and with prefix, inside the encoder and outside it. Outside, tensors that belong to
    no group are grouped by the first part of their names. groups: from group to the pattern of its names, which applies
    inside and outside. notices: receives what lies outside the encoder.
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
    """Join the first `most` problems to one line, with the number of further ones."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more
