"""Patch embeddings for images with another number of channels than those that the weights were trained on.

The patch embedding is the first convolution, whatever its name: its weight (D, M, p, p) of M channels becomes
(D, N, p, p).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from mimref.encoders.backbones import BackboneArchitecture
from mimref.encoders.timm_models import first_conv
from mimref.encoders.vit import Architecture
from mimref.errors import ConfigError

A = TypeVar("A", bound=Architecture | BackboneArchitecture)
ChannelInit = Literal["repeat", "sum", "random"]


@dataclass(frozen=True)
class ChannelRule:
    """How weights of M channels become weights of N.

    repeat: channel n gets the weights of channel n mod M, times M / N; a single channel gets their sum. This is timm's
    rule; it leaves the features of gray images unchanged if M divides N or N is 1. sum: every channel gets the sum of
    all weights, divided by N, which always leaves them unchanged. random: the first M channels, or those in `colors`,
    keep the weights; the others are drawn with the weights' standard deviation.
    """

    how: ChannelInit = "repeat"
    colors: tuple[int, ...] | None = None
    """For `random`: the 1-based channel to which each channel of the weights moves."""

    def adapt(self, weight_DMPP: Tensor, channels: int) -> Tensor:
        """Return the weight (D, N, p, p) for N `channels`. Raises ConfigError for `colors` that do not fit."""
        stored = weight_DMPP.shape[1]
        if self.how == "random":
            return self._with_random(weight_DMPP, channels)
        if self.how == "sum" or channels == 1:
            return (weight_DMPP.sum(dim=1, keepdim=True) / channels).repeat(1, channels, 1, 1)
        return weight_DMPP[:, torch.arange(channels) % stored] * (stored / channels)

    def _with_random(self, weight_DMPP: Tensor, channels: int) -> Tensor:
        stored = weight_DMPP.shape[1]
        colors = self.colors or tuple(range(1, min(stored, channels) + 1))
        if self.colors is not None and (len(set(colors)) != stored or len(colors) != stored or max(colors) > channels):
            raise ConfigError(
                f"encoder.color_channels {list(colors)} must name different channels of 1 to {channels}, one for "
                f"each of the {stored} channels of the weights"
            )
        shape = (len(weight_DMPP), channels, *weight_DMPP.shape[2:])
        # Every command that adapts these weights must draw the same values.
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * weight_DMPP.float().std()
        found = drawn.to(weight_DMPP)
        found[:, [color - 1 for color in colors]] = weight_DMPP[:, : len(colors)]
        return found

    def key(self) -> dict[str, object]:
        """Return the rule for cache keys."""
        return {"init": self.how, **({"colors": list(self.colors)} if self.how == "random" and self.colors else {})}


def for_images(architecture: A, channels: int | None) -> A:
    """Return the architecture for images with this number of channels; None means its own.

    Encoders of gray images also take colour images, whose luma they see.
    """
    if channels in (None, architecture.channels) or (architecture.channels, channels) == (1, 3):
        return architecture
    assert channels is not None
    return replace(architecture, channels=channels)


def first_channels(tensors: Mapping[str, Tensor], model: str = "") -> int:
    """Return the number of image channels of a foreign file: that of its first convolution, 3 if it has none.

    model: the timm model that the file holds; timm records the name of its first convolution. Without such a record, it
    is the patch embedding or the stem. The result does not depend on the order of the tensors, which .safetensors sorts
    by name. Position embeddings have four axes too, but their first has length 1; a gain per channel (C, 1, 1, 1) is
    not a convolution.
    """
    kernels = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 4 and len(tensor) > 1}
    first, inputs = first_conv(model)
    if recorded := [name for name in kernels if first and f".{name}".endswith(f".{first}")]:
        return 3 * kernels[min(recorded, key=len)].shape[1] // inputs
    kernels = {
        name: tensor
        for name, tensor in kernels.items()
        if ("embed" in name or "stem" in name) and not any(part in name for part in ("attn", "cell"))
        if tensor.shape[2] == tensor.shape[3] and tensor[0].numel() > 1
    }

    def depth(name: str) -> tuple[bool, bool]:
        return any(part in name for part in ("stages", "blocks", "layers")), "stem" not in name

    return kernels[min(kernels, key=depth)].shape[1] if kernels else 3


def fit_channels(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], channels: int, rule: ChannelRule
) -> Mapping[str, Tensor]:
    """Adapt the patch embedding to `channels` channels if the wanted one differs only in their number."""

    def differs(given: Tensor, other: Tensor | None) -> bool:
        if other is None or given.ndim != 4 or other.ndim != 4 or given.shape == other.shape:
            return False
        return other.shape[1] == channels and (given.shape[0], *given.shape[2:]) == (other.shape[0], *other.shape[2:])

    return {
        name: rule.adapt(tensor, channels) if differs(tensor, wanted.get(name)) else tensor
        for name, tensor in tensors.items()
    }
