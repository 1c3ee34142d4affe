"""Table 1 of the paper, and its settings for an encoder of any depth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimref.errors import ConfigError
from mimref.evaluation.blocks.statistics import blocks_text
from mimref.refinement.config import RefineConfig
from mimref.reproduce.config import Table
from mimref.training.optim import warmup_length

TITLES: Mapping[Table, str] = {
    "a": "Number of heads",
    "b": "Spacing of the heads",
    "c": "Schedule of the loss weights",
    "d": "Frozen blocks",
    "e": "Neighbours of negatives",
    "f": "Augmentations",
}
# The paper's encoder and default: data2vec 2.0 ViT-L/16 with heads on blocks 17-24.
_DEPTH, _HEADS = 24, 8
# k-NN accuracy; differences are measured from the default.
_HEADS_COUNT = {1: 80.2, 2: 80.2, 4: 80.9, 8: 81.0, 12: 81.0}
_SPACING = {(20, 24): 80.9, (16, 20, 24): 81.1, (15, 18, 21, 24): 81.1, (18, 20, 22, 24): 81.0}
_SCHEDULES = {"uniform_decay": 80.9, "staggered_decay": 81.0, "staggered_step": 80.9, "one_hot": 80.7}
_FROZEN = {6: 80.9, 12: 80.6}
PUBLISHED: Mapping[str, float] = {"knn_top1": 81.0, "lowshot_top1": 61.7}
"""Results of the paper's default."""
_DEFAULT = {"knn_top1": PUBLISHED["knn_top1"]}
# Minimum area of a global crop without local views (0.08), as a share of that with them (0.25).
_WIDER = 0.08 / 0.25


@dataclass(frozen=True)
class Line:
    """One line of the table: the paper's setting, and ours."""

    table: Table
    paper: str
    """The paper's setting."""
    setting: str
    """Our setting."""
    name: str
    """Name of its runs, unless an earlier line has the same settings."""
    published: Mapping[str, float]
    """The paper's results by metric."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changes from the default: dotted key to value; empty in the default's own lines."""
    missing: str = ""
    """Why there is no such run."""


def table_lines(config: RefineConfig, depth: int, blocks: Sequence[int]) -> list[Line]:
    """Return all lines of Table 1 for a refinement whose heads are on `blocks` of an encoder of this depth.

    The numbers of heads, and their distances from the last block, are scaled from the paper's eight heads; the numbers
    of frozen blocks are scaled from its 24 blocks; the crops of runs without local views are wider by the paper's
    factor. Raises ConfigError if a table has no meaning for these settings.
    """
    if list(blocks) != sorted(set(blocks)) or len(blocks) < 2:
        raise ConfigError(
            f"heads.blocks {config.heads.blocks}: the tables compare heads on two blocks or more, each named once, in "
            "ascending order"
        )
    default = blocks_text(blocks)
    return [
        *_head_lines(depth, len(blocks), default),
        *_spacing_lines(depth, len(blocks), default),
        Line("c", "constant", "constant", "default", _DEFAULT),
        *(
            Line("c", words(name), words(name), f"c-{name}", {"knn_top1": knn}, {"loss.schedule": name})
            for name, knn in _SCHEDULES.items()
        ),
        *_frozen_lines(depth, max(blocks)),
        Line("e", "kept", "kept", "default", _DEFAULT),
        Line("e", "swapped", "swapped", "e-swapped", {"knn_top1": 80.9}, {"loss.swap_negatives": True}),
        *_augmentation_lines(config),
    ]


def words(name: str) -> str:
    """Return a setting's value as text."""
    return name.replace("_", " ")


def nearest(share: float) -> int:
    """Round to the nearest whole number, and halves up."""
    return math.floor(share + 0.5)


def _head_lines(depth: int, heads: int, default: str) -> list[Line]:
    lines = []
    for paper, knn in _HEADS_COUNT.items():
        count = min(depth, max(1, nearest(paper * heads / _HEADS)))
        text = blocks_text(range(depth + 1 - count, depth + 1))
        if paper == _HEADS:
            lines.append(Line("a", str(paper), str(heads), "default", _DEFAULT))
        else:
            changes = {} if text == default else {"heads.blocks": text}
            lines.append(Line("a", str(paper), str(count), f"a-{count}-heads", {"knn_top1": knn}, changes))
    return lines


def _spacing_lines(depth: int, heads: int, default: str) -> list[Line]:
    lines = []
    for paper, knn in _SPACING.items():
        found = sorted({max(1, depth - nearest((_DEPTH - block) * heads / _HEADS)) for block in paper})
        text = blocks_text(found)
        changes = {} if text == default else {"heads.blocks": text}
        name = "b-blocks-" + "-".join(map(str, found))
        lines.append(
            Line("b", ", ".join(map(str, paper)), ", ".join(map(str, found)), name, {"knn_top1": knn}, changes)
        )
    return [*lines, Line("b", f"{_DEPTH + 1 - _HEADS}-{_DEPTH}", default, "default", _DEFAULT)]


def _frozen_lines(depth: int, last: int) -> list[Line]:
    lines = [Line("d", "0", "0", "default", _DEFAULT)]
    for paper, knn in _FROZEN.items():
        count = min(last - 1, max(1, nearest(paper * depth / _DEPTH)))
        changes = {"encoder_stage.freeze_blocks": count}
        lines.append(Line("d", str(paper), str(count), f"d-frozen-{count}", {"knn_top1": knn}, changes))
    return lines


def _augmentation_lines(config: RefineConfig) -> list[Line]:
    """Return lines without local views; of the default; and without colour and blur, with half of stage 2's epochs."""
    views, stage = config.views, config.encoder_stage
    low, high = views.global_scale
    single = {"views.local_views": 0, "views.global_scale": (float(f"{_WIDER * low:.4g}"), high)}
    epochs = max(1, stage.epochs // 2)
    warmup = min(warmup_length(stage.warmup_epochs, stage.epochs), float(epochs))
    plain: dict[str, Any] = {"views.color": False, "views.blur": False}
    plain |= {"encoder_stage.epochs": epochs, "encoder_stage.warmup_epochs": warmup}
    varied, local = views.color or views.blur, views.local_views > 0
    names = [name for name, used in (("colour", views.color), ("blur", views.blur)) if used] or [
        "neither colour nor blur"
    ]
    here = " and ".join(names)
    return [
        Line("f", "colour and blur, no multi-crop", f"{here}, no local views", "f-no-local-views",
             {"knn_top1": 78.4, "lowshot_top1": 58.9}, single if local else {},
             missing="" if local else "the default has no local views"),
        Line("f", "colour and blur, multi-crop", f"{here}, {views.local_views} local views", "default", PUBLISHED),
        Line("f", "no colour or blur, multi-crop", f"no colour or blur, {views.local_views} local views", "f-plain",
             {"knn_top1": 80.5, "lowshot_top1": 63.4}, plain if varied else {},
             missing="" if varied else "the default has neither colour nor blur"),
    ]  # fmt: skip
