"""timm models with intermediate features, such as EVA-02, DINOv3, BEiT, Swin, Hiera and ConvNeXt.

Blocks are those of timm's `forward_intermediates`: transformer blocks, or stages of a hierarchical model. Block numbers
are 1-based. Plain vision transformers are `Encoder`s instead.

Shapes: B images, L tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from itertools import starmap
from typing import Any, NamedTuple, Self

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mimref.config.run import EncoderConfig
from mimref.encoders.timm_models import (
    SizeRule,
    as_tokens,
    build_model,
    intermediates,
    is_built_for_sizes,
    layer_ids,
    native_size,
    norm_of,
    size_rule,
)
from mimref.encoders.tokens import check_blocks, norm_flags, pool_tokens
from mimref.encoders.vit import PAPER_SIZES, Architecture, Encoder, build_encoder, gray, is_plain_vit
from mimref.errors import ConfigError

Option = bool | int | float | str | tuple["Option", ...]
"""Value of a constructor argument."""


@dataclass(frozen=True)
class BackboneArchitecture:
    """A timm model other than a plain VisionTransformer."""

    name: str
    """timm's name."""
    image_size: int
    """Pixels per side of the images that it is built for."""
    channels: int = 3
    """Channels of its images."""
    options: tuple[tuple[str, Option], ...] = ()
    """Further arguments of timm's constructor, sorted by name, for sizes that no timm name implies."""

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Read the output of `to_dict`. Raises ConfigError for missing or unknown keys, and invalid types or values."""
        if not isinstance(values, dict):
            raise ConfigError(f"architecture {values!r} is not a table")
        known = {field.name for field in fields(cls)} | {"backbone"}
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f"architecture has an unknown key {key!r}")
            kind: type = {"name": str, "options": dict, "backbone": bool}.get(key, int)
            if type(value) is not kind or (isinstance(value, int) and value < 1):
                raise ConfigError(f"architecture has {key} = {value!r}")
        for name in ("name", "image_size"):
            if name not in values:
                raise ConfigError(f"architecture lacks {name!r}")
        options = tuple((key, _option(key, value)) for key, value in sorted(values.get("options", {}).items()))
        is_plain_vit(values["name"])  # raises ConfigError if timm lacks it
        return cls(values["name"], values["image_size"], values.get("channels", 3), options)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for headers."""
        return {"backbone": True, **self.key()}

    def key(self) -> dict[str, Any]:
        """Return the fields for cache keys, without later fields at the values that older keys imply."""
        found: dict[str, Any] = {"name": self.name, "image_size": self.image_size}
        if self.channels != 3:
            found["channels"] = self.channels
        if self.options:
            found["options"] = {name: _plain(value) for name, value in self.options}
        return found

    @property
    def widths(self) -> list[int]:
        """Width of every block."""
        return list(_shapes(self).widths)

    @property
    def width(self) -> int:
        """Width of the last block."""
        return _shapes(self).widths[-1]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(_shapes(self).widths)

    @property
    def patch_size(self) -> int:
        """Pixels per side that a token of the last block covers."""
        return self.image_size // _shapes(self).rows

    @property
    def num_prefix_tokens(self) -> int:
        """Number of CLS, distillation and register tokens."""
        return _shapes(self).num_prefix_tokens

    @property
    def class_token(self) -> bool:
        """Whether the first token is a CLS token."""
        return _shapes(self).has_cls_token

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm follows the last block; false if timm's norm follows pooling."""
        return _shapes(self).has_final_norm

    @property
    def sizes(self) -> SizeRule:
        """Image sizes that the model accepts."""
        return _shapes(self).sizes

    def check_size(self, size: int, setting: str) -> None:
        """Raise ConfigError if the model does not accept images of `size` pixels; the message names `setting`."""
        rule = self.sizes
        nearest = rule.nearest(size)
        if size == nearest:
            return
        if rule.largest is None:
            why = f"is not a multiple of {rule.step}, as {self.name} needs"
        elif rule.step == rule.largest:
            why = f"does not fit {self.name}, which takes images of one size only"
        else:
            why = f"does not fit {self.name}, which takes multiples of {rule.step} up to {rule.largest}"
        raise ConfigError(f"{setting} {size} {why}; the nearest is {nearest}")

    def build(self) -> Any:
        """Build timm's model with random weights on the current default device."""
        return build_model(self.name, self.image_size, self.channels, dict(self.options))


def _option(name: str, value: object) -> Option:
    """Return an option's value from JSON in hashable form. Raises ConfigError for another kind of value."""
    if isinstance(value, list | tuple):
        return tuple(_option(name, each) for each in value)
    if isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"architecture has the option {name} = {value!r}")


def _plain(value: Option) -> object:
    """Return an option's value as in JSON."""
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


class _Shapes(NamedTuple):
    """What a model's features reveal about it."""

    widths: tuple[int, ...]
    num_prefix_tokens: int
    rows: int
    """Rows of the last block's feature map."""
    has_cls_token: bool
    sizes: SizeRule
    has_final_norm: bool


@cache
def _shapes(architecture: BackboneArchitecture) -> _Shapes:
    """Run a forward pass without data. Raises ConfigError without intermediate features or for an unsuitable size."""
    name, size = architecture.name, architecture.image_size
    with torch.device("meta"):
        model = architecture.build().eval()
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"{name} cannot be used: timm {timm.__version__} provides no intermediate features for it")
    try:
        found = intermediates(model, torch.empty(1, architecture.channels, size, size, device="meta"), None)
    except Exception as error:  # each model raises its own errors for unsuitable images
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{name} cannot take images of {size} pixels ({reason}); try --resolution") from error
    if not found[-1][0].numel():  # in torch 2.6, a convolution may return an empty tensor
        raise ConfigError(f"{name} cannot take images of {size} pixels (no token is left); try --resolution")
    feature_map, prefix = found[-1]
    num_prefix = 0 if prefix is None else prefix.shape[1]
    return _Shapes(
        tuple(each.shape[1] for each, _ in found),
        num_prefix,
        feature_map.shape[2],
        num_prefix > 0 and getattr(model, "cls_token", None) is not None,
        size_rule(model, name, size),
        not isinstance(norm_of(model), nn.Identity | None),
    )


def check_checkpointing(architecture: "EncoderArchitecture") -> None:
    """Raise ConfigError if timm cannot recompute the model's blocks in the backward pass."""
    if isinstance(architecture, BackboneArchitecture):
        with torch.device("meta"):
            _checkpoint(architecture.build(), architecture.name)


def _checkpoint(model: Any, name: str) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # absent, or refused
        raise ConfigError(f"activation_checkpointing: timm has none for {name}; set it to false") from error


class TimmBackbone(nn.Module):
    """A timm model that returns the tokens of any block or stage; `model` keeps timm's parameter names.

    Feature maps become tokens in reading order. Blocks may differ in width.
    Raises ConfigError for an image size that the model cannot take, and for a model without intermediate features.
    """

    def __init__(self, architecture: BackboneArchitecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.widths = architecture.widths
        self.embed_dim = self.widths[-1]
        self.depth = len(self.widths)
        self.num_prefix_tokens = architecture.num_prefix_tokens
        self.has_cls_token = architecture.class_token
        self.patch_size = architecture.patch_size
        self.model = architecture.build()
        self._checkpointing = False

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but keep frozen BatchNorms' statistics, so that frozen blocks return the same outputs."""
        super().train(mode)
        for module in self.modules() if mode else ():
            weights = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and weights and not any(weight.requires_grad for weight in weights):
                module.eval()
        return self

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass instead of storing their activations."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, enable: bool) -> None:
        if enable:
            _checkpoint(self.model, self.architecture.name)
        self._checkpointing = enable

    @property
    def block_modules(self) -> list[nn.Module]:
        """Modules that torch can compile one by one: blocks or stages."""
        found = (getattr(self.model, name, None) for name in ("blocks", "layers", "stages"))
        return next((list(each) for each in found if isinstance(each, nn.ModuleList | nn.Sequential)), [])

    @cached_property
    def _layers(self) -> dict[str, int]:
        """Layer of every parameter; that of the final norm is one more than the last block's."""
        layers, norm = layer_ids(self.model), norm_of(self.model)
        in_norm = {id(parameter) for parameter in norm.parameters()} if norm is not None else set()
        normed = [name for name, parameter in self.model.named_parameters() if id(parameter) in in_norm]
        last = max(layers[name] for name in reached(self.architecture, self.depth) if name not in normed)
        return layers | dict.fromkeys(normed, last + 1) | {"": last + 1}

    @property
    def last_layer(self) -> int:
        """Layer of the final norm, one more than the last block's."""
        return self._layers[""]

    def layer_of(self, name: str) -> int:
        """Return a parameter's layer as timm's groups count: by transformer block, even where stages are read."""
        return self._layers[name]

    def blocks(
        self, images: Tensor, indices: Sequence[int], *, final_norm: bool | Sequence[bool] = False
    ) -> list[Tensor]:
        """Return tokens as `Encoder.blocks` does; L and D may differ between blocks.

        final_norm costs a second pass if the norm is not known to apply to tokens one by one, unless only normed blocks
        are asked for. Raises ConfigError for a block outside 1..depth, and for final_norm if timm's model has no norm
        at its last block.
        """
        check_blocks(indices, self.depth)
        if self.architecture.channels == 1 and images.shape[1] == 3:
            images = gray(images)
        normed = norm_flags(indices, final_norm, self.depth)
        pairs, norm_module = list(zip(indices, normed, strict=True)), norm_of(self.model)
        if norm_module is not None:
            raw = self._tokens(images, sorted(set(indices)), norm=False)
            return [norm_module(raw[index]) if norm and self._has_norm(index) else raw[index] for index, norm in pairs]
        tokens = {
            norm: self._tokens(images, sorted({index for index, asked in pairs if asked == norm}), norm=norm)
            for norm in (False, True)
        }
        return [tokens[norm][index] for index, norm in pairs]

    def _has_norm(self, index: int) -> bool:
        """Return whether the norm fits a block; in a hierarchical model, it fits only the last one."""
        return index == self.depth or len(set(self.widths)) == 1

    def _tokens(self, images: Tensor, wanted: list[int], *, norm: bool) -> dict[int, Tensor]:
        if not wanted:
            return {}
        try:
            found = intermediates(self.model, images, [index - 1 for index in wanted], norm=norm)
        except AssertionError as error:
            # timm reports a missing norm this way.
            if not norm:
                raise
            raise ConfigError(f"--final-norm is not possible for {self.architecture.name}: {error}") from error
        return dict(zip(wanted, starmap(as_tokens, found), strict=True))

    def pool(self, tokens_BLD: Tensor, how: str) -> Tensor:
        """Pool tokens to one vector per image: `cls`, `mean` or `cls+mean`; see `Encoder.pool`."""
        return pool_tokens(tokens_BLD, how, self.num_prefix_tokens, self.has_cls_token)


EncoderArchitecture = Architecture | BackboneArchitecture
"""Architecture of either kind of encoder, with `depth`, `widths`, `patch_size`, `sizes`, `check_size` and more."""
TokenEncoder = Encoder | TimmBackbone
"""Either kind of encoder."""


def new_encoder(architecture: EncoderArchitecture) -> TokenEncoder:
    """Build an encoder with random weights on the current default device."""
    return TimmBackbone(architecture) if isinstance(architecture, BackboneArchitecture) else build_encoder(architecture)


@cache
def reached(architecture: BackboneArchitecture, block: int) -> frozenset[str]:
    """Return the parameters on which a block's pooled tokens depend, with the final norm after the last block.

    They are found by a backward pass without data: each of them receives a gradient.
    """
    with torch.device("meta"):
        backbone = TimmBackbone(architecture).eval()
        images = torch.empty(1, architecture.channels, architecture.image_size, architecture.image_size)
    (tokens_BLD,) = backbone.blocks(images, [block], final_norm=architecture.has_final_norm)
    backbone.pool(tokens_BLD, "cls").sum().backward()
    return frozenset(name for name, parameter in backbone.model.named_parameters() if parameter.grad is not None)


def architecture_from(values: object) -> EncoderArchitecture:
    """Return the architecture recorded in a header. Raises ConfigError for an invalid record."""
    kind = BackboneArchitecture if isinstance(values, dict) and values.get("backbone") else Architecture
    return kind.from_dict(values)


def is_backbone(name: str) -> bool:
    """Return whether a name is that of a timm model other than a plain ViT. Raises ConfigError for an unknown name."""
    return name != "custom" and name not in PAPER_SIZES and not is_plain_vit(name)


def find_architecture(name: str, source: str | None, image_size: int | None) -> Architecture | BackboneArchitecture:
    """Return the architecture that an evaluation's `--arch` and `--source` name.

    image_size: pixels per side; None means the size of timm's model, or 224. Raises ConfigError for unknown names, and
    for `custom`, whose sizes are only in the header of mimref's own files.
    """
    if name == "custom":
        raise ConfigError("--arch custom: only files that mimref wrote record its sizes, and they need no --arch")
    if not is_backbone(name):
        size = image_size or (224 if name in PAPER_SIZES else native_size(name))
        return Architecture.from_config(EncoderConfig(arch=name, source=source or "mae", image_size=size))
    native = BackboneArchitecture(name, native_size(name))
    if image_size is None or image_size == native.image_size:
        return native
    if is_built_for_sizes(name):
        return BackboneArchitecture(name, image_size)
    if (nearest := native.sizes.nearest(image_size)) != image_size:
        raise ConfigError(f"{name} does not take images of {image_size} pixels; use --resolution {nearest}")
    return native


def at_size(architecture: BackboneArchitecture, size: int, setting: str) -> BackboneArchitecture:
    """Return the architecture for images of `size` pixels, which `setting` asks for.

    Raises ConfigError if weights of another size would not fit.
    """
    if size == architecture.image_size:
        return architecture
    if not is_built_for_sizes(architecture.name):
        raise ConfigError(
            f"{setting} {size}: these weights of {architecture.name} need {architecture.image_size} pixels; leave it "
            "out (evaluations take other sizes by --resolution, refine by views.global_size)"
        )
    return replace(architecture, image_size=size)


def patch_shapes(architecture: EncoderArchitecture, blocks: Sequence[int], size: int) -> dict[int, tuple[int, int]]:
    """Return the number and width of patch tokens by block (1-based), for images of an accepted `size` in pixels."""
    if isinstance(architecture, Architecture):
        return dict.fromkeys(blocks, ((size // architecture.patch_size) ** 2, architecture.width))
    with torch.device("meta"):
        backbone = TimmBackbone(architecture).eval()
        image = torch.empty(1, architecture.channels, size, size)
    tokens = backbone.blocks(image, list(blocks))
    prefix = backbone.num_prefix_tokens
    return {block: (each.shape[1] - prefix, each.shape[2]) for block, each in zip(blocks, tokens, strict=True)}
