"""Other timm models with intermediate features: EVA-02, DINOv3, BEiT, Swin, Hiera, ConvNeXt and more.

Blocks are those of timm's `forward_intermediates`: transformer blocks, or stages of a hierarchical model. Block numbers
are 1-based. Plain vision transformers are `Encoder`s.

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
"""Value of a constructor's argument."""


@dataclass(frozen=True)
class BackboneArchitecture:
    """A timm model other than a plain VisionTransformer."""

    name: str
    """timm's name."""
    image_size: int
    """Pixels per side of the images that it is built for."""
    channels: int = 3
    """Of its images."""
    options: tuple[tuple[str, Option], ...] = ()
    """Further arguments of timm's constructor, sorted by name: sizes that no name of timm's has."""

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Read what `to_dict` wrote. Raises ConfigError for other keys, types or values."""
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
        is_plain_vit(values["name"])  # whether timm has it
        return cls(values["name"], values["image_size"], values.get("channels", 3), options)

    def to_dict(self) -> dict[str, Any]:
        """For headers."""
        return {"backbone": True, **self.key()}

    def key(self) -> dict[str, Any]:
        """For cache keys, without fields that older ones do not have."""
        found: dict[str, Any] = {"name": self.name, "image_size": self.image_size}
        if self.channels != 3:
            found["channels"] = self.channels
        if self.options:
            found["options"] = {name: _plain(value) for name, value in self.options}
        return found

    @property
    def widths(self) -> list[int]:
        """Of every block."""
        return list(_shapes(self).widths)

    @property
    def width(self) -> int:
        """Of the last block."""
        return _shapes(self).widths[-1]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(_shapes(self).widths)

    @property
    def patch_size(self) -> int:
        """Pixels per side that a token of the last block stands for."""
        return self.image_size // _shapes(self).rows

    @property
    def num_prefix_tokens(self) -> int:
        """CLS, distillation and register tokens."""
        return _shapes(self).num_prefix_tokens

    @property
    def class_token(self) -> bool:
        """Whether the first token is a CLS token."""
        return _shapes(self).has_cls_token

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm follows the last block; where timm's norm follows pooling, none does."""
        return _shapes(self).has_final_norm

    @property
    def sizes(self) -> SizeRule:
        """Sizes of the images that it takes."""
        return _shapes(self).sizes

    def check_size(self, size: int, setting: str) -> None:
        """Raise ConfigError for images of a size that it cannot take, in pixels; `setting` names it in the message."""
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
        """timm's model with random weights, on the current default device."""
        return build_model(self.name, self.image_size, self.channels, dict(self.options))


def _option(name: str, value: object) -> Option:
    """As read from JSON, hashable. Raises ConfigError for another kind of value."""
    if isinstance(value, list | tuple):
        return tuple(_option(name, each) for each in value)
    if isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"architecture has the option {name} = {value!r}")


def _plain(value: Option) -> object:
    """As in JSON."""
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


class _Shapes(NamedTuple):
    """What a model's features show."""

    widths: tuple[int, ...]
    num_prefix_tokens: int
    rows: int
    """Of the last block's feature map."""
    has_cls_token: bool
    sizes: SizeRule
    has_final_norm: bool


@cache
def _shapes(architecture: BackboneArchitecture) -> _Shapes:
    """From a forward pass without data. Raises ConfigError for a model without intermediate features, or whose images
    have another size."""
    name, size = architecture.name, architecture.image_size
    with torch.device("meta"):
        model = architecture.build().eval()
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"{name} cannot be used: timm {timm.__version__} provides no intermediate features for it")
    try:
        found = intermediates(model, torch.empty(1, architecture.channels, size, size, device="meta"), None)
    except Exception as error:  # models fail in their own ways on images they were not made for
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{name} cannot take images of {size} pixels ({reason}); try --resolution") from error
    if not found[-1][0].numel():  # torch 2.6 lets a convolution return nothing
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


class TimmBackbone(nn.Module):
    """Tokens of any block or stage of a timm model; `model` keeps timm's parameter names.

    Feature maps become tokens in reading order. Blocks may differ in width.
    Raises ConfigError for an image size it cannot take, and for a model without intermediate features.
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
        """As any module's, but frozen BatchNorms keep their statistics: frozen blocks give what they gave before."""
        super().train(mode)
        for module in self.modules() if mode else ():
            weights = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and weights and not any(weight.requires_grad for weight in weights):
                module.eval()
        return self

    @property
    def checkpointing(self) -> bool:
        """Recompute blocks in the backward pass instead of storing their activations."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, enable: bool) -> None:
        self._checkpointing = enable
        if enable and not hasattr(self.model, "set_grad_checkpointing"):
            raise ConfigError(f"activation_checkpointing: timm has none for {self.architecture.name}; set it to false")
        if enable:
            self.model.set_grad_checkpointing(True)

    @property
    def block_modules(self) -> list[nn.Module]:
        """What torch can compile one by one: blocks or stages."""
        found = (getattr(self.model, name, None) for name in ("blocks", "layers", "stages"))
        return next((list(each) for each in found if isinstance(each, nn.ModuleList | nn.Sequential)), [])

    @cached_property
    def _layers(self) -> dict[str, int]:
        """Layer of every parameter; the final norm's is one more than the last block's."""
        layers, norm = layer_ids(self.model), norm_of(self.model)
        in_norm = {id(parameter) for parameter in norm.parameters()} if norm is not None else set()
        normed = [name for name, parameter in self.model.named_parameters() if id(parameter) in in_norm]
        last = max(layers[name] for name in reached(self.architecture, self.depth) if name not in normed)
        return layers | dict.fromkeys(normed, last + 1) | {"": last + 1}

    @property
    def last_layer(self) -> int:
        """Of the final norm, one more than the last block's."""
        return self._layers[""]

    def layer_of(self, name: str) -> int:
        """Layer of one of the model's parameters, as timm's groups count: transformer blocks also where stages are
        read."""
        return self._layers[name]

    def blocks(
        self, images: Tensor, indices: Sequence[int], *, final_norm: bool | Sequence[bool] = False
    ) -> list[Tensor]:
        """As `Encoder.blocks`; L and D are each block's own.

        final_norm costs a second pass where the norm is not known to apply to tokens one by one, unless only normed
        blocks are asked for. Raises ConfigError for a block outside 1..depth, and for final_norm if timm's model has no
        norm at its last block.
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
        """Whether the norm fits a block: that of a hierarchical model fits its last one."""
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
        """One vector per image: `cls`, `mean` or `cls+mean`; see `Encoder.pool`."""
        return pool_tokens(tokens_BLD, how, self.num_prefix_tokens, self.has_cls_token)


EncoderArchitecture = Architecture | BackboneArchitecture
"""Of either kind of encoder: `depth`, `widths`, `patch_size`, `sizes`, `check_size` and more."""
TokenEncoder = Encoder | TimmBackbone
"""Either kind of encoder."""


def new_encoder(architecture: EncoderArchitecture) -> TokenEncoder:
    """An encoder with random weights, on the current default device."""
    return TimmBackbone(architecture) if isinstance(architecture, BackboneArchitecture) else build_encoder(architecture)


@cache
def reached(architecture: BackboneArchitecture, block: int) -> frozenset[str]:
    """Parameters that a block's pooled tokens depend on, with the final norm after the last block.

    Found by a backward pass without data: every one of them gets a gradient.
    """
    with torch.device("meta"):
        backbone = TimmBackbone(architecture).eval()
        images = torch.empty(1, architecture.channels, architecture.image_size, architecture.image_size)
    (tokens_BLD,) = backbone.blocks(images, [block], final_norm=architecture.has_final_norm)
    backbone.pool(tokens_BLD, "cls").sum().backward()
    return frozenset(name for name, parameter in backbone.model.named_parameters() if parameter.grad is not None)


def architecture_from(values: object) -> EncoderArchitecture:
    """What a header says. Raises ConfigError for a record that is not valid."""
    kind = BackboneArchitecture if isinstance(values, dict) and values.get("backbone") else Architecture
    return kind.from_dict(values)


def is_backbone(name: str) -> bool:
    """Whether a name is of a timm model other than a plain vision transformer. Raises ConfigError if timm has none."""
    return name != "custom" and name not in PAPER_SIZES and not is_plain_vit(name)


def find_architecture(name: str, source: str | None, image_size: int | None) -> Architecture | BackboneArchitecture:
    """The architecture that an evaluation's `--arch` and `--source` name.

    image_size: pixels of the images; None is the size of timm's model, or 224. Raises ConfigError for unknown names,
    and for `custom`, whose sizes only the header of our own files holds.
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
    """The architecture for images of `size` pixels, which `setting` asks for.

    Raises ConfigError where weights of another size would not fit.
    """
    if size == architecture.image_size:
        return architecture
    if not is_built_for_sizes(architecture.name):
        raise ConfigError(
            f"{setting} {size}: these weights of {architecture.name} need {architecture.image_size} pixels; leave it "
            "out (evaluations take other sizes by --resolution, refine by views.global_size)"
        )
    return replace(architecture, image_size=size)
