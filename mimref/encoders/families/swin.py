"""Swin transformers, versions 1 and 2, as SimMIM pre-trains them.

The published code merges patches at the end of a stage, timm at the start of the next one: the same weights under
another number. The weights do not show the image size: after five halvings, one window covers SimMIM's own images of
192 pixels, as it does Swin's of 224.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

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
    mlp_ratio,
    named_model,
    patch_sizes,
    shape_of,
)
from mimref.encoders.families.origins import Naming, Origin, naming_by
from mimref.encoders.parts import Unrecognised

_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."
_HF_BLOCK = r"encoder.layers.\1.blocks.\2"
_SIZES = (
    ("tiny", 96, (2, 2, 6, 2), (3, 6, 12, 24)),
    ("small", 96, (2, 2, 18, 2), (3, 6, 12, 24)),
    ("base", 128, (2, 2, 18, 2), (4, 8, 16, 32)),
    ("large", 192, (2, 2, 18, 2), (6, 12, 24, 48)),
)
_MODELS = {
    f"swin_{name}_patch4_window7_224": {"embed_dim": width, "depths": depths, "num_heads": heads, "window_size": 7}
    for name, width, depths, heads in _SIZES
}
# timm has a large SwinV2 only for another window size.
_MODELS_V2 = {
    f"swinv2_{name}_window8_256": {"embed_dim": width, "depths": depths, "num_heads": heads, "window_size": 8}
    for name, width, depths, heads in _SIZES[:3]
}

_HF_RULES: dict[str, Origin | str] = {
    r"patch_embed\.proj\.(.+)": r"embeddings.patch_embeddings.projection.\1",
    r"patch_embed\.norm\.(.+)": r"embeddings.norm.\1",
    rf"{_BLOCK}norm1\.(.+)": rf"{_HF_BLOCK}.layernorm_before.\3",
    rf"{_BLOCK}norm2\.(.+)": rf"{_HF_BLOCK}.layernorm_after.\3",
    rf"{_BLOCK}attn\.qkv\.(.+)": Origin(
        tuple(rf"{_HF_BLOCK}.attention.self.{part}.\3" for part in ("query", "key", "value"))
    ),
    rf"{_BLOCK}attn\.q_bias": rf"{_HF_BLOCK}.attention.self.query.bias",
    rf"{_BLOCK}attn\.v_bias": rf"{_HF_BLOCK}.attention.self.value.bias",
    rf"{_BLOCK}attn\.cpb_mlp\.(.+)": rf"{_HF_BLOCK}.attention.self.continuous_position_bias_mlp.\3",
    rf"{_BLOCK}attn\.logit_scale": rf"{_HF_BLOCK}.attention.self.logit_scale",
    rf"{_BLOCK}attn\.relative_position_bias_table": rf"{_HF_BLOCK}.attention.self.relative_position_bias_table",
    rf"{_BLOCK}attn\.proj\.(.+)": rf"{_HF_BLOCK}.attention.output.dense.\3",
    rf"{_BLOCK}mlp\.fc1\.(.+)": rf"{_HF_BLOCK}.intermediate.dense.\3",
    rf"{_BLOCK}mlp\.fc2\.(.+)": rf"{_HF_BLOCK}.output.dense.\3",
    r"(layers\.\d+\.downsample\..+)": r"encoder.\1",
    r"norm\.(.+)": r"layernorm.\1",
}


def _one_earlier(naming: Naming) -> Naming:
    """Return the naming with patch merging numbered by the stage that it ends."""

    def earlier(name: str) -> Origin:
        merging = re.fullmatch(r"layers\.(\d+)\.(downsample\..+)", name)
        return naming(f"layers.{int(merging[1]) - 1}.{merging[2]}" if merging else name)

    return earlier


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the relative positions of tokens in a window; the publisher's code computes shifted windows' masks."""
    ends = ("relative_position_index", "relative_coords_table")
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(ends)}


_UNUSED = {"decoder": r"decoder\..*", "computed": r".+\.(relative_position_index|relative_coords_table|attn_mask)"}
PUBLISHER = Layout(_one_earlier(naming_by({})), MASK_TOKEN | HEADS | _UNUSED, _buffers)
HF = Layout(_one_earlier(naming_by(_HF_RULES)), MASK_TOKEN | HEADS | _UNUSED)


def describe(tensors: Tensors, hints: Hints) -> Family:
    """Describe a Swin in the layout of microsoft/SimMIM and microsoft/Swin-Transformer. Raises Unrecognised."""
    width, patch_size = patch_sizes(tensors, "patch_embed.proj.weight")
    is_v2 = "layers.0.blocks.0.attn.logit_scale" in tensors
    depths = _depths(tensors, "layers.")
    heads = _heads(tensors, [f"layers.{stage}.blocks.0.attn." for stage in range(len(depths))], is_v2=is_v2)
    window = _window(tensors, "layers.0.blocks.0.attn.", is_v2=is_v2)
    if window is None:
        raise Unrecognised("is a Swin transformer, version 2, without relative_coords_table, which shows its windows")
    masks = _mask_size(tensors, window, patch_size)
    hidden = shape_of(tensors, "layers.0.blocks.0.mlp.fc1.weight", 2)[0]
    sizes = {"embed_dim": width, "depths": depths, "num_heads": heads, "window_size": window}
    is_simmim = "mask_token" in tensors or "decoder.0.weight" in hints.beside
    size = _image_size(masks, window, patch_size, len(depths))
    return _family("", sizes, hidden, patch_size, size, PUBLISHER, is_v2=is_v2, is_simmim=is_simmim)


def describe_hf(tensors: Tensors, hints: Hints) -> Family:
    """Describe a Swin transformer as saved by transformers. Raises Unrecognised."""
    check_activation(hints, "gelu")
    width, patch_size = patch_sizes(tensors, "embeddings.patch_embeddings.projection.weight")
    first = "encoder.layers.0.blocks.0."
    is_v2 = f"{first}attention.self.logit_scale" in tensors
    depths = _depths(tensors, "encoder.layers.")
    config = hints.config if hints.config.get("embed_dim") == width else {}
    starts = [f"encoder.layers.{stage}.blocks.0.attention.self." for stage in range(len(depths))]
    heads = _heads(tensors, starts, is_v2=is_v2)
    saved_window, saved_size = (value if type(value := config.get(key)) is int else None for key in _SAVED)
    pretrained = _pretrained_windows(config, len(depths)) if is_v2 else ()
    units = pretrained[0] if pretrained else 0
    window = _window(tensors, f"{first}attention.self.", is_v2=is_v2, units=units) or saved_window
    if not window:
        raise Unrecognised("is a Swin transformer, version 2, whose window size is only in its config.json")
    hidden = shape_of(tensors, f"{first}intermediate.dense.weight", 2)[0]
    sizes = {"embed_dim": width, "depths": depths, "num_heads": heads, "window_size": window}
    sizes |= {"pretrained_window_sizes": pretrained} if pretrained else {}
    is_simmim = "embeddings.mask_token" in tensors or "decoder.0.weight" in hints.beside
    size = _image_size(saved_size, window, patch_size, len(depths))
    return _family("Hugging Face ", sizes, hidden, patch_size, size, HF, is_v2=is_v2, is_simmim=is_simmim)


_SAVED = ("window_size", "image_size")


def _pretrained_windows(config: Mapping[str, Any], stages: int) -> tuple[int, ...]:
    """Return the windows of each stage in whose coordinates positions are; empty if each has its own."""
    saved = config.get("pretrained_window_sizes") or ()
    valid = isinstance(saved, list) and all(type(size) is int and size >= 0 for size in saved)
    if not saved or (valid and not any(saved)):
        return ()
    if not valid or len(saved) != stages:
        raise Unrecognised(f"has pretrained_window_sizes {saved!r} in config.json, not one number per stage")
    return tuple(saved)


def _depths(tensors: Tensors, layers: str) -> tuple[int, ...]:
    stages = count_blocks(tensors, layers)
    return tuple(count_blocks(tensors, f"{layers}{stage}.blocks.") for stage in range(stages))


def _heads(tensors: Tensors, starts: Sequence[str], *, is_v2: bool) -> tuple[int, ...]:
    if is_v2:
        return tuple(shape_of(tensors, f"{start}logit_scale", 3)[0] for start in starts)
    return tuple(shape_of(tensors, f"{start}relative_position_bias_table", 2)[1] for start in starts)


def _window(tensors: Tensors, start: str, *, is_v2: bool, units: int = 0) -> int | None:
    """Return the tokens per side of a window; None if only the configuration shows them.

    units: tokens per side of the window in whose coordinates positions are; 0 means the window itself.
    """
    if not is_v2:
        name = f"{start}relative_position_bias_table"
        distances = shape_of(tensors, name, 2)[0]
    elif (name := f"{start}relative_coords_table") in tensors:
        distances = math.prod(shape_of(tensors, name, 4)[1:3])
    else:
        return None
    window, odd = divmod(math.isqrt(distances) + 1, 2)
    if (2 * window - 1) ** 2 != distances or odd:
        raise Unrecognised(f"{name} of {distances} relative positions does not fit a square window")
    if is_v2:
        # Coordinates are from -8 to 8, or beyond if the units are those of a smaller window.
        farthest = math.log2(1 + 8 * (window - 1) / max(1, (units or window) - 1)) / 3
        if abs(float(tensors[name].float().max()) - farthest) > 0.01:
            raise Unrecognised("has relative positions for another window size, from which it was fine-tuned")
    return window


def _mask_size(tensors: Tensors, window: int, patch_size: int) -> int | None:
    """Return the image size in pixels by the mask of the first stage's shifted windows; None without a mask."""
    mask = tensors.get("layers.0.blocks.1.attn_mask")
    return math.isqrt(len(mask)) * window * patch_size if mask is not None and mask.ndim == 3 else None


def _image_size(known: int | None, window: int, patch_size: int, stages: int) -> tuple[int, list[str]]:
    """Return the image size in pixels and, if it is not known, a notice that assumes one window in the last stage."""
    if known:
        return known, []
    size: int = window * patch_size * 2 ** (stages - 1)
    return size, [f"images of {size} pixels are assumed, whose last stage is one window of {window} x {window}"]


def _family(
    prefix: str,
    sizes: dict[str, Any],
    hidden: int,
    patch_size: int,
    size: tuple[int, list[str]],
    layout: Layout,
    *,
    is_v2: bool,
    is_simmim: bool,
) -> Family:
    models, other = (_MODELS_V2, "swinv2_tiny_window8_256") if is_v2 else (_MODELS, "swin_tiny_patch4_window7_224")
    near = dict(sizes)
    window = near.pop("window_size")
    without_window = {
        name: {key: value for key, value in own.items() if key != "window_size"} for name, own in models.items()
    }
    model, options = named_model(without_window, near, other)
    usual = models[model]["window_size"] if model in models else None
    options |= {"window_size": window} if window != usual else {}
    options |= {"patch_size": patch_size} if patch_size != 4 else {}
    ratio = mlp_ratio(hidden, sizes["embed_dim"])
    options |= {"mlp_ratio": ratio} if ratio != 4 else {}
    version = "Swin V2" if is_v2 else "Swin"
    format_ = f"{prefix}{'SimMIM ' if is_simmim else ''}{version}"
    return Family(format_, "simmim" if is_simmim else None, model, options, size[0], layout, notices=tuple(size[1]))
