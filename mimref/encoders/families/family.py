"""The description of a file's encoder once its family is recognised, and what the families' modules share."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from mimref.encoders.families.origins import Naming
from mimref.encoders.parts import Unrecognised

Tensors = Mapping[str, Tensor]

OPTIONAL = re.compile(r"(fc_norm|head\.norm)\.(weight|bias)")
"""Norms of timm's models that files may lack and no block passes through: the identity replaces missing ones."""

MASK_TOKEN = {"mask token": r"(\w+\.)*mask_token"}
HEADS = {"classifier": r"(head|fc_norm|classifier|pooler|lm_head)\..*"}
"""Groups of tensors that no encoder needs: patterns for names without the encoder's prefix."""


def no_buffers(_: nn.Module) -> dict[str, Tensor]:
    """Return no buffers, for layouts whose files hold parameters only."""
    return {}


@dataclass(frozen=True)
class Layout:
    """How a file names the tensors of a timm model."""

    naming: Naming
    dropped: Mapping[str, str] = field(default_factory=dict)
    """From group to a pattern for the names of other tensors in the file."""
    buffers: Callable[[nn.Module], dict[str, Tensor]] = no_buffers
    """Returns tensors that files of the layout hold and timm's model computes, by their names in the file."""


@dataclass(frozen=True)
class Hints:
    """What is known about a file besides the tensors of one encoder."""

    num_heads: int | None = None
    """Number of attention heads, as set by the user."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Content of Hugging Face's `config.json` beside the file."""
    beside: frozenset[str] = frozenset()
    """Names of tensors outside the encoder, without what they share with its prefix."""


@dataclass(frozen=True)
class Family:
    """The encoder of a recognised file."""

    format: str
    """For display, such as `BEiT v2`."""
    source: str | None
    """Pre-training method, as `--source` names it; None if the file does not show it."""
    model: str
    """timm's name."""
    options: Mapping[str, Any]
    """Options of timm's constructor, where the file's sizes differ from the model's."""
    image_size: int
    """Pixels per side."""
    layout: Layout
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    notices: tuple[str, ...] = ()
    """What was assumed."""


def named_model(
    published: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Any], other: str
) -> tuple[str, dict[str, Any]]:
    """Return the published model of these sizes, otherwise `other`, and the sizes that it does not imply as options.

    published: from timm's name to the sizes of its model, each of which is one of `sizes`. `other` implies none.
    """
    model, own = next(
        ((name, own) for name, own in published.items() if all(sizes[key] == value for key, value in own.items())),
        (other, {}),
    )
    options = {key: value for key, value in sizes.items() if key not in own}
    if "hidden" in options:
        options["mlp_ratio"] = mlp_ratio(options.pop("hidden"), sizes["embed_dim"])
    return model, options


def check_activation(hints: Hints, expected: str) -> None:
    """Raise Unrecognised if `config.json` names another MLP activation than timm's model has."""
    found = hints.config.get("hidden_act", expected)
    if found != expected:
        raise Unrecognised(f"uses {found} in its MLPs, as config.json says, not {expected}")


def mlp_ratio(hidden: int, width: int) -> float:
    """Return the ratio for `hidden` units; timm's models multiply the width by it and round down."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


def count_blocks(tensors: Tensors, blocks: str) -> int:
    """Count the blocks, whose names begin with `blocks`, a number and a dot."""
    found = [int(match[1]) for name in tensors if (match := re.match(rf"{re.escape(blocks)}(\d+)\.", name))]
    return 1 + max(found, default=-1)


def shape_of(tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    """Return a tensor's shape. Raises Unrecognised if it is missing, empty or has another number of axes."""
    if name not in tensors:
        raise Unrecognised(f"{name} is missing")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or not all(shape):
        raise Unrecognised(f"{name} has shape {shape}")
    return shape


def patch_sizes(tensors: Tensors, name: str) -> tuple[int, int]:
    """Return the width and patch size of a patch embedding. Raises Unrecognised unless patches are square and RGB."""
    width, channels, rows, columns = shape_of(tensors, name, 4)
    if rows != columns:
        raise Unrecognised(f"has patches of {rows} x {columns} pixels; square patches are needed")
    if channels != 3:
        raise Unrecognised(f"expects {channels}-channel images, not RGB ones")
    return width, rows


def square_side(count: int, what: str) -> int:
    """Return the rows of a square grid. Raises Unrecognised if `count` is not a square number."""
    side = math.isqrt(count)
    if side * side != count or not side:
        raise Unrecognised(f"{what} of {count} patches, which do not form a square")
    return side
