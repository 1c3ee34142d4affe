"""DINOv3's vision transformers and EVA-02, with rotary positions as in timm's Eva class.

Both rotate patches only, not CLS and register tokens. DINOv3: coordinates of patch centres from -1 to 1, periods of
base 100, channels paired across the two halves. EVA-02: coordinates in units of the 16 x 16 grid of pre-training,
neighbouring channels paired.

Shapes: N patches, D width, H heads.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn

from mimref.encoders.families.family import (
    HEADS,
    MASK_TOKEN,
    Family,
    Hints,
    Layout,
    Tensors,
    check_activation,
    count_blocks,
    named_model,
    patch_sizes,
    shape_of,
    square_side,
)
from mimref.encoders.families.origins import Origin, naming_by
from mimref.encoders.num_heads import find_num_heads
from mimref.encoders.parts import Unrecognised

_BLOCK = r"blocks\.(\d+)\."
_BASE = 100.0
"""Base of DINOv3's periods."""
# The image size at which DINOv3's models are evaluated; the weights fit any size.
_DINOV3_IMAGE_SIZE = 224
_EVA02_GRID = 16

_DINOV3_MODELS = {
    name: {"embed_dim": width, "depth": depth, "num_heads": heads, "hidden": hidden, "swiglu_mlp": swiglu}
    for name, width, depth, heads, hidden, swiglu in (
        ("vit_small_patch16_dinov3", 384, 12, 6, 1536, False),
        ("vit_small_plus_patch16_dinov3", 384, 12, 6, 1536, True),
        ("vit_base_patch16_dinov3", 768, 12, 12, 3072, False),
        ("vit_large_patch16_dinov3", 1024, 24, 16, 4096, False),
        ("vit_huge_plus_patch16_dinov3", 1280, 32, 20, 5120, True),
        ("vit_7b_patch16_dinov3", 4096, 40, 32, 8192, True),
    )
}
_EVA02_MODELS = {
    f"eva02_{name}_patch14_224": {"embed_dim": width, "depth": depth, "num_heads": heads, "hidden": hidden}
    for name, width, depth, heads, hidden in (
        ("tiny", 192, 12, 3, 512),
        ("small", 384, 12, 6, 1024),
        ("base", 768, 12, 12, 2048),
        ("large", 1024, 24, 16, 2730),
    )
}

_DINOV3_RULES: dict[str, Origin | str] = {
    "reg_token": "storage_tokens",
    rf"{_BLOCK}gamma_([12])": r"blocks.\1.ls\2.gamma",
    rf"{_BLOCK}attn\.q_bias": Origin((r"blocks.\1.attn.qkv.bias",), third=0),
    rf"{_BLOCK}attn\.v_bias": Origin((r"blocks.\1.attn.qkv.bias",), third=2),
}
_DINOV3_SWIGLU_RULES: dict[str, Origin | str] = {
    rf"{_BLOCK}mlp\.fc1_g\.(.+)": r"blocks.\1.mlp.w1.\2",
    rf"{_BLOCK}mlp\.fc1_x\.(.+)": r"blocks.\1.mlp.w2.\2",
    rf"{_BLOCK}mlp\.fc2\.(.+)": r"blocks.\1.mlp.w3.\2",
}
_DINOV3_HF_NAMES = naming_by(
    {
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        r"patch_embed\.proj\.(.+)": r"embeddings.patch_embeddings.\1",
        rf"{_BLOCK}norm([12])\.(.+)": r"layer.\1.norm\2.\3",
        rf"{_BLOCK}gamma_([12])": r"layer.\1.layer_scale\2.lambda1",
        rf"{_BLOCK}attn\.qkv\.weight": Origin(tuple(rf"layer.\1.attention.{part}_proj.weight" for part in "qkv")),
        rf"{_BLOCK}attn\.([qv])_bias": r"layer.\1.attention.\2_proj.bias",
        rf"{_BLOCK}attn\.proj\.(.+)": r"layer.\1.attention.o_proj.\2",
        rf"{_BLOCK}mlp\.fc1_g\.(.+)": r"layer.\1.mlp.gate_proj.\2",
        rf"{_BLOCK}mlp\.(?:fc1_x|fc1)\.(.+)": r"layer.\1.mlp.up_proj.\2",
        rf"{_BLOCK}mlp\.fc2\.(.+)": r"layer.\1.mlp.down_proj.\2",
    }
)
_EVA02_NAMES = naming_by(
    {
        rf"{_BLOCK}attn\.([qv])_proj\.bias": r"blocks.\1.attn.\2_bias",
        rf"{_BLOCK}attn\.norm\.(.+)": r"blocks.\1.attn.inner_attn_ln.\2",
        rf"{_BLOCK}mlp\.fc1_g\.(.+)": r"blocks.\1.mlp.w1.\2",
        rf"{_BLOCK}mlp\.fc1_x\.(.+)": r"blocks.\1.mlp.w2.\2",
        rf"{_BLOCK}mlp\.fc1\.(.+)": r"blocks.\1.mlp.w12.\2",
        rf"{_BLOCK}mlp\.norm\.(.+)": r"blocks.\1.mlp.ffn_ln.\2",
        rf"{_BLOCK}mlp\.fc2\.(.+)": r"blocks.\1.mlp.w3.\2",
    }
)


def _dinov3_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the rotary periods, in bfloat16 as DINOv3 computes them, and the masks that keep key biases at zero."""
    vit: Any = model
    channels = vit.embed_dim // vit.blocks[0].attn.num_heads
    buffers = {"rope_embed.periods": _periods(channels, torch.bfloat16)}
    for number, block in enumerate(vit.blocks):
        if block.attn.q_bias is not None:
            mask = torch.ones(3, vit.embed_dim)
            mask[1] = 0
            buffers[f"blocks.{number}.attn.qkv.bias_mask"] = mask.flatten()
    return buffers


def _periods(channels: int, dtype: torch.dtype) -> Tensor:
    return _BASE ** (2 * torch.arange(channels // 4, dtype=dtype) / (channels // 2))


def dinov3_layout(*, swiglu: bool) -> Layout:
    """Return the layout of the published DINOv3 files."""
    unused = {
        "classifier": r"head\..*",
        "training state": r"local_cls_norm\..*",
        "computed": r"rope_embed\.periods|blocks\.\d+\.attn\.qkv\.bias_mask",
    }
    naming = naming_by(_DINOV3_RULES | (_DINOV3_SWIGLU_RULES if swiglu else {}))
    return Layout(naming, MASK_TOKEN | unused, _dinov3_buffers)


DINOV3_HF = Layout(_DINOV3_HF_NAMES, MASK_TOKEN | HEADS)


def describe_dinov3(tensors: Tensors, hints: Hints) -> Family:
    """Describe a DINOv3 vision transformer in the layout of facebookresearch/dinov3. Raises Unrecognised."""
    width, patch_size = patch_sizes(tensors, "patch_embed.proj.weight")
    swiglu = "blocks.0.mlp.w1.weight" in tensors
    hidden = shape_of(tensors, "blocks.0.mlp.w1.weight" if swiglu else "blocks.0.mlp.fc1.weight", 2)[0]
    notices: list[str] = []
    heads = find_num_heads(width, hints.num_heads, {}, notices, published=_DINOV3_HEADS)
    found = tensors.get("rope_embed.periods")
    expected = _periods(width // heads, torch.float32)
    if found is not None and not (
        found.shape == expected.shape and torch.allclose(found.float(), expected, rtol=0.02, atol=0)
    ):
        raise Unrecognised(
            f"has rotary positions other than DINOv3's of base {_BASE:.0f} for {heads} heads, which timm's models have"
        )
    depth = count_blocks(tensors, "blocks.")
    if any(_has_key_bias(tensors, f"blocks.{number}.attn.qkv.bias", width) for number in range(depth)):
        raise Unrecognised(_KEY_BIASES)
    registers = shape_of(tensors, "storage_tokens", 3)[1] if "storage_tokens" in tensors else 0
    sizes = _dinov3_sizes(width, depth, heads, hidden, swiglu)
    biased = "blocks.0.attn.qkv.bias" in tensors
    return _dinov3("DINOv3", sizes, patch_size, registers, dinov3_layout(swiglu=swiglu), notices, biased=biased)


def describe_dinov3_hf(tensors: Tensors, hints: Hints) -> Family:
    """Describe a DINOv3 vision transformer as saved by transformers. Raises Unrecognised."""
    width, patch_size = patch_sizes(tensors, "embeddings.patch_embeddings.weight")
    swiglu = "layer.0.mlp.gate_proj.weight" in tensors
    check_activation(hints, "silu" if swiglu else "gelu")
    hidden = shape_of(tensors, "layer.0.mlp.up_proj.weight", 2)[0]
    notices: list[str] = []
    config = hints.config if hints.config.get("hidden_size") == width else {}
    heads = find_num_heads(width, hints.num_heads, config, notices, published=_DINOV3_HEADS)
    if "layer.0.attention.k_proj.bias" in tensors:
        raise Unrecognised(_KEY_BIASES)
    if (base := config.get("rope_theta", _BASE)) != _BASE:
        raise Unrecognised(f"has rotary positions of base {base}, as config.json says, not DINOv3's {_BASE:.0f}")
    registers = shape_of(tensors, "embeddings.register_tokens", 3)[1]
    sizes = _dinov3_sizes(width, count_blocks(tensors, "layer."), heads, hidden, swiglu)
    biased = "layer.0.attention.q_proj.bias" in tensors
    return _dinov3("Hugging Face DINOv3", sizes, patch_size, registers, DINOV3_HF, notices, biased=biased)


def _has_key_bias(tensors: Tensors, name: str, width: int) -> bool:
    """Return whether a joint bias of queries, keys and values has one of keys that its mask does not remove."""

    def has_keys(name: str) -> bool:
        shape_of(tensors, name, 1)
        return bool(tensors[name][width : 2 * width].any())

    mask = f"{name}_mask"
    return name in tensors and has_keys(name) and (mask not in tensors or has_keys(mask))


_KEY_BIASES = "has key biases, which timm's DINOv3 lacks"
_DINOV3_HEADS = {size["embed_dim"]: size["num_heads"] for size in _DINOV3_MODELS.values()}


def _dinov3_sizes(width: int, depth: int, heads: int, hidden: int, swiglu: bool) -> dict[str, Any]:
    return {"embed_dim": width, "depth": depth, "num_heads": heads, "hidden": hidden, "swiglu_mlp": swiglu}


def _dinov3(
    format_: str,
    sizes: dict[str, Any],
    patch_size: int,
    registers: int,
    layout: Layout,
    notices: list[str],
    *,
    biased: bool,
) -> Family:
    model, options = named_model(_DINOV3_MODELS, sizes, "vit_small_patch16_dinov3")
    if "mlp_ratio" in options and sizes["swiglu_mlp"]:
        options["swiglu_align_to"] = 1
    if biased and model.startswith("vit_7b"):
        options["qkv_bias"] = True
    elif biased:
        model += "_qkvb"
    options |= {"patch_size": patch_size} if patch_size != 16 else {}
    options |= {"num_reg_tokens": registers} if registers != 4 else {}
    size = max(1, _DINOV3_IMAGE_SIZE // patch_size) * patch_size
    notices.append(f"the weights fit images of any size; {size} pixels are assumed")
    return Family(format_, "dinov3", model, options, size, layout, notices=tuple(notices))


def _eva02_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the cosines and sines of the rotary positions, which the model and every block save."""
    vit: Any = model
    channels = vit.embed_dim // vit.blocks[0].attn.num_heads
    side = vit.patch_embed.grid_size[0]
    tables = _eva02_tables(channels, side, vit.rope.ref_feat_shape[0])
    prefixes = ["rope.", *(f"blocks.{number}.attn.rope." for number in range(len(vit.blocks)))]
    return {f"{prefix}{name}": table.clone() for prefix in prefixes for name, table in tables.items()}


def _eva02_tables(channels: int, side: int, reference: int) -> dict[str, Tensor]:
    """Return tables (N, D / H) for a grid with `side` patches per side, in the coordinates of one with `reference`."""
    half = channels // 2
    bands = 1.0 / (10000 ** (torch.arange(0, half, 2)[: half // 2].float() / half))
    angles = (torch.arange(side) / side * reference)[:, None] * bands
    angles = angles.repeat_interleave(2, dim=-1)
    rows, columns = angles[:, None].expand(side, side, -1), angles[None].expand(side, side, -1)
    flat = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return {"freqs_cos": flat.cos(), "freqs_sin": flat.sin()}


EVA02 = Layout(
    _EVA02_NAMES, MASK_TOKEN | HEADS | {"computed": r"(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)"}, _eva02_buffers
)


def describe_eva02(tensors: Tensors, hints: Hints) -> Family:
    """Describe an EVA-02 encoder, pre-trained or fine-tuned, in the layout of baaivision/EVA. Raises Unrecognised."""
    width, patch_size = patch_sizes(tensors, "patch_embed.proj.weight")
    packed = "blocks.0.mlp.w12.weight" in tensors
    hidden = shape_of(tensors, "blocks.0.mlp.w12.weight" if packed else "blocks.0.mlp.w1.weight", 2)[0]
    notices: list[str] = []
    heads = find_num_heads(width, hints.num_heads, {}, notices)
    side = square_side(shape_of(tensors, "pos_embed", 3)[1] - 1, "has positions")
    sizes = {
        "embed_dim": width,
        "depth": count_blocks(tensors, "blocks."),
        "num_heads": heads,
        "hidden": hidden // 2 if packed else hidden,
    }
    model, options = named_model(_EVA02_MODELS, sizes, f"eva02_{'small' if packed else 'base'}_patch14_224")
    options |= {"patch_size": patch_size} if patch_size != 14 else {}
    options |= {"scale_attn_inner": True} if "blocks.0.attn.inner_attn_ln.weight" in tensors else {}
    options |= _reference(tensors, width // heads, side)
    if "norm.weight" in tensors:
        options["global_pool"] = "token"  # otherwise, timm's model normalises only the pooled token
    source = "eva02" if "mask_token" in tensors else None
    return Family(
        "EVA-02", source, model, options, side * patch_size, EVA02, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, tuple(notices)
    )


def _reference(tensors: Tensors, channels: int, side: int) -> Mapping[str, Any]:
    """Return the option for the grid whose coordinates the rotary table uses. Raises Unrecognised for unknown grids."""
    table = tensors.get("rope.freqs_cos", tensors.get("blocks.0.attn.rope.freqs_cos"))
    if table is None:
        return {}
    for reference in (_EVA02_GRID, side):
        expected = _eva02_tables(channels, side, reference)["freqs_cos"]
        if table.shape == expected.shape and torch.allclose(table.float(), expected, atol=1e-2):
            return {} if reference == _EVA02_GRID else {"ref_feat_shape": (side, side)}
    raise Unrecognised(
        f"has rotary positions of shape {tuple(table.shape)}, not EVA-02's for {side} x {side} patches and "
        f"{math.prod(table.shape[1:])} channels"
    )
