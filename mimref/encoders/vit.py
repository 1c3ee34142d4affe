"""Vision transformers that return the tokens of any block, built on timm's `VisionTransformer`.

Pre-norm (MAE, dBOT, DINO, ...), post-norm (data2vec 2.0) and timm's own models (registers, LayerScale, unusual patch
sizes) share one class. Block numbers are 1-based.

Shapes: B images, L tokens, D width, N patches.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from typing import Any, Self, cast, get_args

import timm
import torch
from timm.layers.mlp import Mlp, SwiGLUPacked
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimref.config.base import Interpolation
from mimref.config.run import EncoderConfig
from mimref.encoders.meta import RatesOnCpu
from mimref.encoders.positions import are_sincos, resize_positions, sincos_positions
from mimref.encoders.timm_models import SizeRule
from mimref.encoders.tokens import check_blocks, norm_flags, pool_tokens
from mimref.errors import ConfigError, did_you_mean

# Width, depth, attention heads, patch size (Appendix B.1; 2B: MAWS).
PAPER_SIZES = {
    "vit_b16": (768, 12, 12, 16),
    "vit_l16": (1024, 24, 16, 16),
    "vit_h14": (1280, 32, 16, 14),
    "vit_2b14": (2560, 24, 32, 14),
}
NORM_EPS = 1e-6
"""Epsilon of LayerNorms in all families but Hugging Face's, whose config.json states its own."""
_SIZE_KEYS = ("width", "depth", "num_heads", "patch_size")


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build an encoder; saved in the header of every file that mimref writes."""

    name: str
    """`vit_l16` and so on, `custom`, or a timm name, which implies all other sizes."""
    image_size: int
    """Pixels per side that the position embedding is made for."""
    width: int
    depth: int
    num_heads: int
    patch_size: int
    post_norm: bool = False
    """LayerNorm after each residual sum and after the embeddings, none at the end (data2vec 2.0)."""
    fixed_positions: bool = True
    """Sin-cos position embedding that is never trained."""
    from_timm: bool = False
    class_token: bool = True
    registers: int = 0
    """Number of register tokens. With registers, or without a CLS token, only patches have positions."""
    layer_scale: bool = False
    """A factor per channel after attention and MLP."""
    mlp_width: int = 0
    """Outputs of the MLP's first layer; 0 means four times the width."""
    swiglu: bool = False
    """The MLP multiplies the SiLU of the first half of its first layer's outputs by the second half."""
    final_norm: bool = True
    """LayerNorm after the last block of a pre-norm encoder."""
    channels: int = 3
    """Channels of its images, such as 3 for colour and 1 for gray. Left out of headers if it is 3."""
    interpolation: Interpolation = "mae"
    """How positions are interpolated to other image sizes. Left out of headers if it is the default."""
    norm_eps: float = NORM_EPS
    """Epsilon of every LayerNorm. The default is left out of headers, and leaves timm's own models with theirs."""

    @classmethod
    def from_config(cls, config: EncoderConfig) -> Self:
        """Return the architecture that the settings name. Raises ConfigError for an unknown name."""
        name, size = config.arch, config.image_size
        if name == "custom" or name in PAPER_SIZES:
            # The settings reject a custom architecture that lacks one of these sizes.
            sizes = PAPER_SIZES.get(name) or (int(getattr(config, key)) for key in _SIZE_KEYS)
            width, depth, num_heads, patch_size = sizes
            return cls(
                name,
                size,
                width,
                depth,
                num_heads,
                patch_size,
                config.source == "d2v2",
                interpolation=config.interpolation or "mae",
            )
        with torch.device("meta"):
            vit = _timm_vit(name, size)
        first_parts: Iterable[Any] = vit.blocks[0].modules()
        return cls(
            name,
            size,
            width=vit.embed_dim,
            depth=len(vit.blocks),
            # In parallel blocks, the number is an attribute of several attention modules, or of the block.
            num_heads=next(int(part.num_heads) for part in first_parts if hasattr(part, "num_heads")),
            patch_size=vit.patch_embed.patch_size[0],
            fixed_positions=False,
            from_timm=True,
            class_token=vit.cls_token is not None,
            interpolation=config.interpolation or "timm",
        )

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Read the output of `to_dict`. Raises ConfigError for missing or unknown keys, and invalid types or values."""
        if not isinstance(values, dict):
            raise ConfigError(f"architecture {values!r} is not a table")
        for name in ("name", "image_size", *_SIZE_KEYS):
            if name not in values:
                raise ConfigError(f"architecture lacks {name!r}")
        types = {field.name: field.type for field in fields(cls)}
        for key, value in values.items():
            if key not in types:
                raise ConfigError(f"architecture has an unknown key {key!r}")
            lowest = 0 if key in ("registers", "mlp_width") else 1
            known = value in get_args(Interpolation) if key == "interpolation" else type(value) is types[key]
            if not known or (types[key] is int and value < lowest) or (key == "norm_eps" and not 0 < value < 1):
                raise ConfigError(f"architecture has {key} = {value!r}")
        if values["width"] % values["num_heads"]:
            raise ConfigError(f"architecture has width {values['width']} for {values['num_heads']} attention heads")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for headers and cache keys, except newer fields at the values that older files imply."""
        implied = (("channels", 3), ("interpolation", "mae"), ("norm_eps", NORM_EPS))
        return {key: value for key, value in asdict(self).items() if (key, value) not in implied}

    @property
    def widths(self) -> list[int]:
        """Width of every block."""
        return [self.width] * self.depth

    @property
    def sizes(self) -> SizeRule:
        """Image sizes that the encoder accepts."""
        return SizeRule(self.patch_size)

    @property
    def has_final_norm(self) -> bool:
        """Whether features of the last block are called normed: always, although without a norm they are raw."""
        return True

    def check_size(self, size: int, setting: str) -> None:
        """Raise ConfigError unless `size`, in pixels, is divisible by the patch size; the message names `setting`."""
        if size % self.patch_size:
            raise ConfigError(
                f"{setting} {size} is not divisible by the patch size {self.patch_size} of {self.name}; "
                f"the nearest multiple is {self.sizes.nearest(size)}"
            )


class PostNormBlock(Block):
    """data2vec 2.0's block: each LayerNorm follows its residual sum."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # image encoders have no attention masks
        x = self.norm1(x + self.drop_path1(self.attn(x)))
        normed: Tensor = self.norm2(x + self.drop_path2(self.mlp(x)))
        return normed


class Encoder(nn.Module):
    """A vision transformer that returns the tokens of any block; `vit` keeps timm's parameter names."""

    def __init__(self, architecture: Architecture, vit: VisionTransformer) -> None:
        super().__init__()
        self.architecture = architecture
        self.vit = vit
        self.embed_dim: int = vit.embed_dim
        self.depth = len(vit.blocks)
        self.num_prefix_tokens: int = vit.num_prefix_tokens
        self.has_cls_token: bool = vit.cls_token is not None
        self.patch_size = architecture.patch_size
        self.checkpointing = False
        """Whether each block is recomputed in the backward pass instead of storing its activations."""

    @property
    def model(self) -> VisionTransformer:
        """timm's model."""
        return self.vit

    @property
    def widths(self) -> list[int]:
        """Width of every block."""
        return [self.embed_dim] * self.depth

    @property
    def block_modules(self) -> list[nn.Module]:
        """Modules that torch can compile one by one: the blocks."""
        return list(self.vit.blocks)

    @property
    def last_layer(self) -> int:
        """Layer of the final norm, one more than the last block's."""
        return self.depth + 1

    def layer_of(self, name: str) -> int:
        """Return a parameter's layer as BEiT counts: 0 for embeddings, i for block i, depth + 1 for the final norm."""
        if block := re.match(r"blocks\.(\d+)\.", name):
            return int(block[1]) + 1
        return self.last_layer if name.startswith(("norm.", "fc_norm.")) else 0

    def blocks(
        self,
        images: Tensor,
        indices: Sequence[int],
        *,
        final_norm: bool | Sequence[bool] = False,
        visible_BK: Tensor | None = None,
        masked: tuple[Tensor, Tensor] | None = None,
    ) -> list[Tensor]:
        """Return the output tokens of the blocks in `indices` (1-based, any order, repeats allowed), in one pass.

        images: normalised (B, C, S, S), with the encoder's number of channels C and S divisible by the patch size; a
        gray encoder also takes C = 3. Returns a list of (B, L, D), prefix tokens first. Later blocks do not run.
        final_norm: True applies the final LayerNorm to the last block's tokens; one flag per index applies it to any
        block's. No effect on encoders without one (post-norm ones, and timm's that normalise after pooling).
        visible_BK: indices of the only patches that the encoder sees; their tokens are returned in this order.
        masked: hidden_BN, True where a patch is hidden, and token_D, which replaces the embedding of hidden patches.
        Raises ConfigError for a block outside 1..depth.
        """
        check_blocks(indices, self.depth)
        tokens_BLD, outputs = self.embed(images, visible_BK, masked), dict[int, Tensor]()
        recompute = self.checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(self.vit.blocks[: max(indices)], start=1):
            tokens_BLD = checkpoint(block, tokens_BLD, use_reentrant=False) if recompute else block(tokens_BLD)
            if number in indices:
                outputs[number] = tokens_BLD
        flags = norm_flags(indices, final_norm, self.depth)
        return [self.vit.norm(outputs[i]) if norm else outputs[i] for i, norm in zip(indices, flags, strict=True)]

    def embed(
        self, images: Tensor, visible_BK: Tensor | None = None, masked: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Return the input of block 1, (B, L, D): CLS and register tokens, then (visible) patches, with positions."""
        vit = self.vit
        if self.architecture.channels == 1 and images.shape[1] == 3:
            images = gray(images)
        patches_BHWD = vit.patch_embed(images)
        grid, tokens_BLD = patches_BHWD.shape[1:3], patches_BHWD.flatten(1, 2)
        if masked is not None:
            tokens_BLD = torch.where(masked[0][:, :, None], masked[1].to(tokens_BLD.dtype), tokens_BLD)
        prefix_positions: Tensor | None = None
        if vit.pos_embed is not None:
            num_prefix = 0 if vit.no_embed_class else self.num_prefix_tokens
            prefix_positions = vit.pos_embed[:, :num_prefix] if num_prefix else None
            tokens_BLD = tokens_BLD + resize_positions(
                vit.pos_embed[:, num_prefix:], (grid[0], grid[1]), interpolation=self.architecture.interpolation
            )
        if visible_BK is not None:
            tokens_BLD = tokens_BLD.gather(1, visible_BK[:, :, None].expand(-1, -1, tokens_BLD.shape[2]))
        prefix: list[Tensor] = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        if prefix:
            prefix_1PD = torch.cat(prefix, dim=1)
            if prefix_positions is not None:
                prefix_1PD = prefix_1PD + prefix_positions
            # `len` would become a constant in a trace for ONNX.
            tokens_BLD = torch.cat([prefix_1PD.expand(tokens_BLD.shape[0], -1, -1), tokens_BLD], dim=1)
        normed: Tensor = vit.norm_pre(tokens_BLD)
        return normed

    def pool(self, tokens_BLD: Tensor, how: str) -> Tensor:
        """Pool to one vector per image: `cls`, `mean` of patches (also where a CLS token is missing) or `cls+mean`."""
        return pool_tokens(tokens_BLD, how, self.num_prefix_tokens, self.has_cls_token)


def gray(images: Tensor) -> Tensor:
    """Convert colour images (B, 3, S, S) to their luma (B, 1, S, S) by ITU-R BT.601, as Pillow does.

    If every channel is normalised by the same mean and deviation, the result is the luma normalised by them.
    """
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


@RatesOnCpu()
def build_encoder(architecture: Architecture) -> Encoder:
    """Build an encoder with random weights on the default device. Raises ConfigError for sizes that do not fit."""
    architecture.check_size(architecture.image_size, "encoder.image_size")
    if architecture.from_timm:
        options = {"in_chans": architecture.channels} | norm_option(architecture)
        vit = _timm_vit(architecture.name, architecture.image_size, options)
        if architecture.fixed_positions and vit.pos_embed is not None:
            vit.pos_embed.requires_grad_(False)
        return Encoder(architecture, vit)
    vit = VisionTransformer(
        **timm_options(architecture),
        pre_norm=architecture.post_norm,
        final_norm=architecture.final_norm and not architecture.post_norm,
        norm_layer=partial(nn.LayerNorm, eps=architecture.norm_eps),
        mlp_layer=cast(type[nn.Module], SwiGLUPacked if architecture.swiglu else Mlp),
        act_layer=nn.SiLU if architecture.swiglu else nn.GELU,
        block_fn=PostNormBlock if architecture.post_norm else Block,
        dynamic_img_size=True,
    )
    if architecture.post_norm:
        # timm drops the bias of the patch projection if a norm follows the embeddings; data2vec 2.0 does not.
        size = architecture.patch_size
        vit.patch_embed.proj = nn.Conv2d(architecture.channels, architecture.width, size, stride=size)
    side = architecture.image_size // architecture.patch_size
    assert vit.pos_embed is not None
    if not vit.pos_embed.is_meta:
        num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        vit.pos_embed.data.copy_(sincos_positions(architecture.width, side, num_prefix=num_prefix))
    vit.pos_embed.requires_grad_(not architecture.fixed_positions)
    return Encoder(architecture, vit)


def timm_options(architecture: Architecture) -> dict[str, Any]:
    """Return sizes and tokens as options of timm's VisionTransformer, without those at timm's defaults."""
    options: dict[str, Any] = {
        "img_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "embed_dim": architecture.width,
        "depth": architecture.depth,
        "num_heads": architecture.num_heads,
        "num_classes": 0,
    }
    if architecture.mlp_width:
        # timm multiplies by the width and rounds down; the half keeps float rounding from losing a channel.
        options["mlp_ratio"] = (architecture.mlp_width + 0.5) / architecture.width
    if not architecture.class_token:
        options |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    if architecture.registers:
        options |= {"reg_tokens": architecture.registers, "no_embed_class": True}
    if architecture.layer_scale:
        options["init_values"] = 1e-5
    if architecture.channels != 3:
        options["in_chans"] = architecture.channels
    return options


def norm_option(architecture: Architecture) -> dict[str, Any]:
    """Return the LayerNorm as an option of timm's models; empty for the default epsilon."""
    if architecture.norm_eps == NORM_EPS:
        return {}
    return {"norm_layer": partial(nn.LayerNorm, eps=architecture.norm_eps)}


@cache
def is_plain_vit(name: str) -> bool:
    """Return whether timm's model `name` is a VisionTransformer with a plain patch embedding.

    Raises ConfigError if timm has no such model (with the nearest known name) or, after a dot, no such tag.
    """
    if not timm.is_model(name):
        hint = did_you_mean(name, [*PAPER_SIZES, "custom", *timm.list_models()])
        raise ConfigError(f"unknown architecture {name!r}{hint} (the paper's are {', '.join(PAPER_SIZES)})")
    model, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{model}.*")]
    if tag and tag not in tags:
        raise ConfigError(f"unknown architecture {name!r}: timm's weights of {model} are {', '.join(tags) or 'none'}")
    with torch.device("meta"), RatesOnCpu():
        vit = timm.create_model(name, pretrained=False, num_classes=0)
    return type(vit) is VisionTransformer and isinstance(vit.patch_embed, PatchEmbed)


@RatesOnCpu()
def _timm_vit(name: str, image_size: int, options: Mapping[str, Any] | None = None) -> VisionTransformer:
    if not is_plain_vit(name):
        raise ConfigError(
            f"architecture {name!r} is not a plain timm VisionTransformer; only refine and evaluations accept others"
        )
    vit = timm.create_model(
        name, pretrained=False, num_classes=0, img_size=image_size, dynamic_img_size=True, **(options or {})
    )
    assert isinstance(vit, VisionTransformer)
    return vit


def with_fixed_positions(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Architecture:
    """Return a timm model's architecture, with positions fixed if they are MAE's sin-cos ones, which never train."""
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return architecture
    return replace(architecture, fixed_positions=any(are_sincos(positions, num_prefix=prefix) for prefix in (0, 1)))
