"""Hiera, pre-trained as a masked autoencoder (MAE) or fine-tuned.

Tokens are in the order of mask units throughout; timm's features are put back into rows. In pre-training, the last
stage does not pool; in the published encoders for fine-tuning and in timm's it does, which needs no weights.
"""

from itertools import pairwise
from typing import Any

from mimref.encoders.families.family import (
    HEADS,
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
from mimref.encoders.families.origins import Naming, Origin, naming_by
from mimref.encoders.num_heads import find_num_heads
from mimref.encoders.parts import Unrecognised

_STRIDE = 4
_MODELS = {
    f"hiera_{name}_224": {"embed_dim": width, "stages": stages, "num_heads": heads}
    for name, width, stages, heads in (
        ("tiny", 96, (1, 2, 7, 2), 1),
        ("small", 96, (1, 2, 11, 2), 1),
        ("base", 96, (2, 3, 16, 3), 1),
        ("base_plus", 112, (2, 3, 16, 3), 2),
        ("large", 144, (2, 6, 36, 4), 2),
        ("huge", 256, (2, 6, 36, 4), 4),
    )
}
_MAE_POOLS = 2
_FIRST_HEADS = {96: 1, 112: 2, 144: 2, 256: 4}
"""From the width of the first stage to its heads."""

_DECODER = {
    "decoder": r"(decoder|decoder_embed|decoder_blocks|decoder_norm|decoder_pred|multi_scale_fusion_heads|"
    r"multiscale_fusion)\..*|decoder_pos_embed|mask_token"
}


def layout(norm: str) -> Layout:
    """Return facebookresearch/hiera's layout. norm: `encoder_norm`, of pre-training's fused stages, or `norm`."""
    return Layout(naming_by({r"head\.norm\.(.+)": rf"{norm}.\1"}), _DECODER | {"classifier": r"head\..*"})


def hf_layout(stages: tuple[int, ...], *, pretrained: bool) -> Layout:
    """Return the layout of transformers."""
    return Layout(_hf_names(stages, "encoder_norm" if pretrained else "pooler.layernorm"), _DECODER | HEADS)


def _hf_names(stages: tuple[int, ...], norm: str) -> Naming:
    places = [(stage, layer) for stage, depth in enumerate(stages) for layer in range(depth)]
    rules: dict[str, Origin | str] = {
        r"patch_embed\.proj\.(.+)": r"embeddings.patch_embeddings.projection.\1",
        "pos_embed": "embeddings.position_embeddings",
        r"head\.norm\.(.+)": rf"{norm}.\1",
    }
    for number, (stage, layer) in enumerate(places):
        start = f"encoder.stages.{stage}.layers.{layer}"
        rules[rf"blocks\.{number}\.norm1\.(.+)"] = rf"{start}.layernorm_before.\1"
        rules[rf"blocks\.{number}\.norm2\.(.+)"] = rf"{start}.layernorm_after.\1"
        rules[rf"blocks\.{number}\.(.+)"] = rf"{start}.\1"
    return naming_by(rules)


def describe(tensors: Tensors, hints: Hints) -> Family:
    """Describe a Hiera in the layout of facebookresearch/hiera. Raises Unrecognised."""
    depth = count_blocks(tensors, "blocks.")
    # The first block of every stage but the first changes the width.
    starts = [0, *(number for number in range(depth) if f"blocks.{number}.proj.weight" in tensors), depth]
    stages = tuple(after - start for start, after in pairwise(starts))
    # The last is timm's own name.
    norm = next((name for name in ("encoder_norm", "norm", "head.norm") if f"{name}.weight" in tensors), None)
    # A file without these heads is taken to pool as every published model does.
    pools = _count_heads(tensors, "multi_scale_fusion_heads.") or _MAE_POOLS if norm == "encoder_norm" else None
    return _family(
        "Hiera",
        tensors,
        hints,
        ("patch_embed.proj.weight", "pos_embed"),
        stages,
        layout(norm or "norm"),
        pools=pools,
        normed=norm is not None,
    )


def describe_hf(tensors: Tensors, hints: Hints) -> Family:
    """Describe a Hiera as saved by transformers. Raises Unrecognised."""
    check_activation(hints, "gelu")
    count = count_blocks(tensors, "encoder.stages.")
    stages = tuple(count_blocks(tensors, f"encoder.stages.{stage}.layers.") for stage in range(count))
    pools = _count_heads(tensors, "multiscale_fusion.multi_scale_fusion_heads.") or None
    saved = hints.config.get("num_query_pool")
    return _family(
        "Hugging Face Hiera",
        tensors,
        hints,
        ("embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"),
        stages,
        hf_layout(stages, pretrained=pools is not None),
        pools=pools or (saved if type(saved) is int else None),
        normed="encoder_norm.weight" in tensors or "pooler.layernorm.weight" in tensors,
    )


def _count_heads(names: Tensors, start: str) -> int:
    return sum(name.startswith(start) and name.endswith(".weight") for name in names)


def _family(
    format_: str,
    tensors: Tensors,
    hints: Hints,
    names: tuple[str, str],
    stages: tuple[int, ...],
    found_layout: Layout,
    *,
    pools: int | None,
    normed: bool,
) -> Family:
    """Describe a Hiera. names: the patch embedding's weight and the positions. pools: pooling stages, if known."""
    width, kernel = patch_sizes(tensors, names[0])
    side = square_side(shape_of(tensors, names[1], 3)[1], "has positions")
    if kernel != 7 or len(stages) != 4 or not all(stages) or side % 8:
        raise Unrecognised(
            f"is a Hiera of stages {stages} with a stem of {kernel} pixels for {side} x {side} tokens; four stages, 7 "
            "pixels and units of 8 x 8 tokens are expected"
        )
    notices: list[str] = []
    config = {"num_attention_heads": heads[0]} if isinstance(heads := hints.config.get("num_heads"), list) else {}
    first = find_num_heads(width, hints.num_heads, config, notices, published=_FIRST_HEADS, channels=width)
    sizes: dict[str, Any] = {"embed_dim": width, "stages": stages, "num_heads": first}
    model, options = named_model(_MODELS, sizes, "hiera_tiny_224")
    if pools is not None and pools != 3:
        options["q_pool"] = pools
        notices.append(f"{pools} stages pool, as in pre-training; timm's {model} pools in 3")
    if not normed:
        notices.append("the file has no final norm")
    return Family(
        format_,
        "mae" if pools == _MAE_POOLS else None,
        model,
        options,
        side * _STRIDE,
        found_layout,
        notices=tuple(notices),
    )
