"""Other timm models with intermediate features (Hiera, ConvNeXt, Swin, EVA, ...), for evaluation.

Blocks are those of timm's `forward_intermediates`: transformer blocks, or stages of a hierarchical model. Block numbers
are 1-based. Plain vision transformers are `Encoder`s, which can also be refined.

Shapes: B images, L tokens, D width.
"""

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import starmap
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mimref.config.run import EncoderConfig
from mimref.encoders.vit import (
    PAPER_SIZES,
    Architecture,
    Encoder,
    RatesOnCpu,
    check_blocks,
    is_plain_vit,
    norm_flags,
    pool_tokens,
)
from mimref.errors import ConfigError


@dataclass(frozen=True)
class BackboneArchitecture:
    """A timm model other than a plain VisionTransformer."""

    name: str
    """timm's name."""
    image_size: int
    """Pixels per side of the images it will see."""

    def to_dict(self) -> dict[str, Any]:
        """For cache keys."""
        return asdict(self)


class TimmBackbone(nn.Module):
    """Tokens of any block or stage of a timm model; `model` keeps timm's parameter names.

    Feature maps become tokens in reading order. Blocks may differ in width.
    Raises ConfigError for an image size it cannot take, and for a model without intermediate features.
    """

    def __init__(self, architecture: BackboneArchitecture) -> None:
        super().__init__()
        self.architecture = architecture
        name, size = architecture.name, architecture.image_size
        native = native_size(name)
        if timm_record(name).fixed_input_size and size != native:
            raise ConfigError(f"{name} takes images of {native} pixels only, not {size}; use --resolution {native}")
        shapes = _token_shapes(name, size)
        self.model = timm.create_model(name, pretrained=False, num_classes=0)
        self.depth = len(shapes)
        self.num_prefix_tokens, rows, self.embed_dim = shapes[-1]
        self.has_cls_token: bool = self.num_prefix_tokens > 0 and getattr(self.model, "cls_token", None) is not None
        self.patch_size = size // rows

    def blocks(
        self, images: Tensor, indices: Sequence[int], *, final_norm: bool | Sequence[bool] = False
    ) -> list[Tensor]:
        """As `Encoder.blocks`; L and D are each block's own.

        final_norm costs a second pass, unless only normed blocks are asked for. Raises ConfigError for a block outside
        1..depth, and for final_norm if timm's model has no norm at its last block.
        """
        check_blocks(indices, self.depth)
        normed = norm_flags(indices, final_norm, self.depth)
        pairs = list(zip(indices, normed, strict=True))
        tokens = {
            norm: self._tokens(images, sorted({index for index, asked in pairs if asked == norm}), norm=norm)
            for norm in (False, True)
        }
        return [tokens[norm][index] for index, norm in pairs]

    def _tokens(self, images: Tensor, wanted: list[int], *, norm: bool) -> dict[int, Tensor]:
        if not wanted:
            return {}
        try:
            found = _intermediates(self.model, images, [index - 1 for index in wanted], norm=norm)
        except AssertionError as error:
            # timm reports a missing norm this way.
            if not norm:
                raise
            raise ConfigError(f"--final-norm is not possible for {self.architecture.name}: {error}") from error
        return dict(zip(wanted, starmap(_as_tokens, found), strict=True))

    def pool(self, tokens_BLD: Tensor, how: str) -> Tensor:
        """One vector per image: `cls`, `mean` or `cls+mean`; see `Encoder.pool`."""
        return pool_tokens(tokens_BLD, how, self.num_prefix_tokens, self.has_cls_token)


TokenEncoder = Encoder | TimmBackbone
"""What feature extraction reads tokens from."""


def find_architecture(name: str, source: str | None, image_size: int | None) -> Architecture | BackboneArchitecture:
    """The architecture that an evaluation's `--arch` and `--source` name.

    image_size: pixels of the images; None is the size of timm's model, or 224. Raises ConfigError for unknown names,
    and for `custom`, whose sizes only the header of our own files holds.
    """
    if name == "custom":
        raise ConfigError("--arch custom: only files that mimref wrote record its sizes, and they need no --arch")
    is_plain = name in PAPER_SIZES or is_plain_vit(name)
    size = image_size or (224 if name in PAPER_SIZES else native_size(name))
    if is_plain:
        return Architecture.from_config(EncoderConfig(arch=name, source=source or "mae", image_size=size))
    return BackboneArchitecture(name, size)


def native_size(name: str) -> int:
    """Pixels per side that a timm model was made for."""
    return int(timm_record(name).input_size[-1])


def timm_record(name: str) -> Any:
    """timm's record of a model or, for `model.tag`, of its weights: image size, normalisation, classifier."""
    recorded = timm.get_pretrained_cfg(name)
    if recorded is None:
        raise ConfigError(f"timm has no record of {name!r}, so it cannot be evaluated")
    return recorded


def filter_names(name: str, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """The tensors of a published file as timm's own code renames them for its model; None if it cannot.

    timm hands this function to the builder of each model; it is reachable only as a name of the model's module.
    """
    module = sys.modules[timm.model_entrypoint(name.partition(".")[0]).__module__]
    rename = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if rename is None:
        return None
    try:
        given = dict(tensors)
        found = rename(given, model) if len(inspect.signature(rename).parameters) > 1 else rename(given)
    except Exception:  # foreign names fail in every possible way
        return None
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def _token_shapes(name: str, size: int) -> list[tuple[int, int, int]]:
    """Number of prefix tokens, rows of the feature map, and width of every block."""
    with torch.device("meta"), RatesOnCpu():
        model: Any = timm.create_model(name, pretrained=False, num_classes=0).eval()
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"{name} cannot be evaluated: timm provides no intermediate features for it")
    try:
        found = _intermediates(model, torch.empty(1, 3, size, size, device="meta"), None, norm=False)
    except Exception as error:  # models fail in their own ways on images they were not made for
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{name} cannot take images of {size} pixels ({reason}); try --resolution") from error
    if not found[-1][0].numel():  # torch 2.6 lets a convolution return nothing
        raise ConfigError(f"{name} cannot take images of {size} pixels (no token is left); try --resolution")
    return [(0 if prefix is None else prefix.shape[1], image.shape[2], image.shape[1]) for image, prefix in found]


def _intermediates(
    model: Any, images: Tensor, indices: list[int] | None, *, norm: bool
) -> list[tuple[Tensor, Tensor | None]]:
    """Feature map (B, D, rows, columns) and prefix tokens (B, P, D), if any, of the blocks (0-based; None: all)."""
    accepted = inspect.signature(model.forward_intermediates).parameters
    has_prefix = "return_prefix_tokens" in accepted and bool(getattr(model, "num_prefix_tokens", 0))
    options = {"return_prefix_tokens": True} if has_prefix else {}
    found = model.forward_intermediates(
        images, indices=indices, norm=norm, stop_early=True, output_fmt="NCHW", intermediates_only=True, **options
    )
    return list(found) if has_prefix else [(feature_map, None) for feature_map in found]


def _as_tokens(feature_map: Tensor, prefix: Tensor | None) -> Tensor:
    tokens_BLD = feature_map.flatten(2).transpose(1, 2)
    return tokens_BLD if prefix is None else torch.cat([prefix, tokens_BLD], dim=1)
