"""What timm's models have in common: construction, intermediate features, image sizes, layers.

Shapes: B images, L tokens, P prefix tokens, D width.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import timm
import torch
from timm.models._manipulate import group_with_matcher
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimref.encoders.meta import RatesOnCpu
from mimref.encoders.resizing import ResizedHiera, take_other_sizes
from mimref.errors import ConfigError

# Arguments that options must not set: they are set by other fields of an architecture, or not at all.
_RESERVED = {"self", "args", "kwargs", "img_size", "in_chans", "num_classes", "device", "dtype"}
# A name that no regular expression of a model matches.
_UNMATCHED = "\0"


class SizeRule(NamedTuple):
    """Image sizes that a model accepts, in pixels per side."""

    step: int
    """Sizes are multiples of this."""
    largest: int | None = None
    """The largest size; None means no limit."""

    def nearest(self, size: int) -> int:
        """Return the accepted size nearest to `size`, the larger one of two."""
        found = max(1, (size + self.step // 2) // self.step) * self.step
        return found if self.largest is None else min(found, self.largest)


def timm_record(name: str) -> Any:
    """Return timm's record of a model or, for `model.tag`, its weights: image size, normalisation, classifier."""
    recorded = timm.get_pretrained_cfg(name)
    if recorded is None:
        raise ConfigError(f"timm has no record of {name!r}, so it cannot be evaluated; see timm.list_models()")
    return recorded


def classifiers(name: str) -> tuple[str, ...]:
    """Return the prefixes of the tensors of a timm model's classifiers; beside `head.fc`, there may be a norm."""
    layers = timm_record(name).classifier or ()
    return tuple(f"{each.rpartition('.')[0] or each}." for each in ([layers] if isinstance(layers, str) else layers))


@cache
def first_conv(name: str) -> tuple[str, int]:
    """Return the weight of a timm model's convolution on pixels, and its inputs for images of three channels.

    Some models rearrange pixels before it. ("", 3) if timm has no such model, or records none or several.
    """
    found = getattr(timm.get_pretrained_cfg(name), "first_conv", None)
    if not found or not isinstance(found, str):
        return "", 3
    with torch.device("meta"), RatesOnCpu():
        weight = timm.create_model(name, pretrained=False).state_dict().get(f"{found}.weight")
    return (f"{found}.weight", weight.shape[1]) if weight is not None else ("", 3)


def normalisation(name: str) -> dict[str, list[float]]:
    """Return mean and deviation of every channel for `model.tag`, or for the weights that timm downloads by default."""
    record = timm_record(name)
    return {"mean": list(record.mean), "std": list(record.std)}


def native_size(name: str) -> int:
    """Return the image size, in pixels per side, that a timm model was made for."""
    return int(timm_record(name).input_size[-1])


@RatesOnCpu()
def build_model(name: str, size: int, channels: int, options: Mapping[str, Any]) -> Any:
    """Build timm's model without a classifier on the current default device.

    It accepts image sizes other than `size` if it can. options: further arguments of timm's constructor. Raises
    ConfigError for arguments that the constructor does not have, and if timm cannot build the model.
    """
    accepted = _arguments(name)
    unknown = sorted(options.keys() - accepted | options.keys() & _RESERVED)
    if unknown:
        raise ConfigError(f"{name} has no option {unknown[0]!r} in timm {timm.__version__}")
    chosen = dict(options) | build_options(name, size)
    if "drop_path_rate" in accepted:
        chosen.setdefault("drop_path_rate", 0.0)  # refinement uses no stochastic depth; Swin has it by default
    if "dynamic_img_size" in accepted:
        chosen["dynamic_img_size"] = True
    elif "strict_img_size" in accepted:
        chosen["strict_img_size"] = False
    if channels != 3:
        chosen["in_chans"] = channels
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, **chosen)
    except Exception as error:  # each constructor raises its own errors for unsuitable values
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"timm cannot build {name} for images of {size} pixels ({reason})") from error
    take_other_sizes(model)
    return model


def build_options(name: str, size: int) -> dict[str, Any]:
    """Return the image size as an option of timm's constructor; empty if the constructor does not take it."""
    return {"img_size": size} if "img_size" in _arguments(name) else {}


def features_of_blocks(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Return every block's or stage's tokens (B, L, D), as `block_N`, by timm's code alone; sets eval mode."""
    blocks = intermediates(model.eval(), images, None)
    return {f"block_{number}": as_tokens(*block) for number, block in enumerate(blocks, start=1)}


def is_built_for_sizes(name: str) -> bool:
    """Return whether timm builds the model for any image size, so that other sizes' weights fit or are interpolated."""
    adapts = {"dynamic_img_size", "strict_img_size"} & _arguments(name)
    return bool(adapts) or not timm_record(name).fixed_input_size


@cache
def _arguments(name: str) -> frozenset[str]:
    """Return the names of the arguments that the constructor of timm's class accepts."""
    with torch.device("meta"), RatesOnCpu():
        made = type(timm.create_model(name, pretrained=False, num_classes=0))
    # Of every base class with its own constructor: some pass unknown arguments on to the next one.
    bases = [vars(each)["__init__"] for each in made.__mro__ if each is not object and "__init__" in vars(each)]
    return frozenset(key for each in bases for key in inspect.signature(each).parameters)


def size_rule(model: Any, name: str, size: int) -> SizeRule:
    """Return the image sizes that a model built for images of `size` pixels accepts."""
    if isinstance(model, Beit) and model.pos_embed is None:
        return SizeRule(int(model.patch_embed.patch_size[0]), size)
    if isinstance(model, ResizedHiera):
        return SizeRule(int(model.patch_stride[0] * model.mask_unit_size[0]))
    if isinstance(model, VisionTransformer | Eva):
        return SizeRule(int(model.patch_embed.patch_size[0]))
    windowed = isinstance(model, SwinTransformer | SwinTransformerV2)
    if not windowed and timm_record(name).fixed_input_size:
        return SizeRule(size, size)
    # Windows are padded, stages are not. Recent versions of timm record some reductions as functions of the image size.
    strides = [int(each["reduction"]) for each in model.feature_info if isinstance(each["reduction"], int | float)]
    return SizeRule(max(strides, default=1))


def intermediates(
    model: Any, images: Tensor, indices: Sequence[int] | None, *, norm: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Return the feature map (B, D, rows, columns) and any prefix tokens (B, P, D) of blocks (0-based; None: all)."""
    accepted = inspect.signature(model.forward_intermediates).parameters
    has_prefix = "return_prefix_tokens" in accepted and bool(getattr(model, "num_prefix_tokens", 0))
    options = {"return_prefix_tokens": True} if has_prefix else {}
    found = model.forward_intermediates(
        images, indices=indices, norm=norm, stop_early=True, output_fmt="NCHW", intermediates_only=True, **options
    )
    return list(found) if has_prefix else [(feature_map, None) for feature_map in found]


def as_tokens(feature_map: Tensor, prefix: Tensor | None) -> Tensor:
    """Return tokens (B, L, D): the prefix tokens, then those of the feature map in reading order."""
    tokens_BLD = feature_map.flatten(2).transpose(1, 2)
    return tokens_BLD if prefix is None else torch.cat([prefix, tokens_BLD], dim=1)


def norm_of(model: Any) -> nn.Module | None:
    """Return the norm after the last block if it applies to tokens (B, L, D) one by one; otherwise None."""
    if isinstance(model, VisionTransformer | Eva | Beit | SwinTransformer | SwinTransformerV2):
        norm: nn.Module = model.norm
        return norm
    return None


def layer_ids(model: Any) -> dict[str, int]:
    """Return the layer of every parameter as timm counts: 0 for those that feed the first block or lie outside blocks.

    Raises ConfigError for a model that does not group its parameters.
    """
    if not hasattr(model, "group_matcher"):
        raise ConfigError(f"timm does not say which layers {type(model).__name__} has; set encoder_stage.layer_decay=1")
    named = [(name, None) for name, _ in model.named_parameters()] + [(_UNMATCHED, None)]
    found: dict[str, int] = group_with_matcher(iter(named), model.group_matcher(), reverse=True)
    outside = found.pop(_UNMATCHED)
    # Outside: for example learned rotary frequencies. What follows the blocks is not part of an encoder.
    return {name: 0 if layer == outside else layer for name, layer in found.items()}
