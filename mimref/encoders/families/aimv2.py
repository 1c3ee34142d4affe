"""AIMv2's image encoders: vision transformers with RMSNorm, SwiGLU and no CLS token, without biases."""

from typing import Any

from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mimref.encoders.families.family import (
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

_CHANNELS = 128
"""Channels per head in every published size."""
_BLOCK = r"blocks\.(\d+)\."
_MODELS = {
    f"aimv2_{name}_patch14_224": {"embed_dim": width, "depth": 24, "num_heads": heads, "hidden": hidden}
    for name, width, heads, hidden in (
        ("large", 1024, 8, 2816),
        ("huge", 1536, 12, 4096),
        ("1b", 2048, 16, 5632),
        ("3b", 3072, 24, 8192),
    )
}

_NAMES = naming_by(
    {
        r"patch_embed\.(.+)": r"preprocessor.patchifier.\1",
        "pos_embed": "preprocessor.pos_embed",
        rf"{_BLOCK}norm([12])\.(.+)": r"trunk.blocks.\1.norm_\2.\3",
        rf"{_BLOCK}mlp\.fc1_g\.(.+)": r"trunk.blocks.\1.mlp.fc1.\2",
        rf"{_BLOCK}mlp\.fc1_x\.(.+)": r"trunk.blocks.\1.mlp.fc3.\2",
        rf"{_BLOCK}(.+)": r"trunk.blocks.\1.\2",
        r"norm\.(.+)": r"trunk.post_trunk_norm.\1",
    }
)
_HF_NAMES = naming_by(
    {
        r"patch_embed\.proj\.(.+)": r"embeddings.patch_embed.\1",
        r"patch_embed\.norm\.(.+)": r"embeddings.rms_norm.\1",
        "pos_embed": Origin(("embeddings.position_embedding.weight",), axes=2),
        rf"{_BLOCK}norm([12])\.(.+)": r"encoder.layers.\1.rms_norm\2.\3",
        rf"{_BLOCK}attn\.qkv\.(.+)": Origin(tuple(rf"encoder.layers.\1.attention.{part}_proj.\2" for part in "qkv")),
        rf"{_BLOCK}attn\.proj\.(.+)": r"encoder.layers.\1.attention.out_proj.\2",
        rf"{_BLOCK}mlp\.fc1_g\.(.+)": r"encoder.layers.\1.ffn.gate_proj.\2",
        rf"{_BLOCK}mlp\.fc1_x\.(.+)": r"encoder.layers.\1.ffn.up_proj.\2",
        rf"{_BLOCK}mlp\.fc2\.(.+)": r"encoder.layers.\1.ffn.down_proj.\2",
        r"norm\.(.+)": r"rms_norm.\1",
    }
)
_UNUSED = {"attention pooling": r"head\..*", "computed": r"embeddings\.position_ids"}
PUBLISHER = Layout(_NAMES, MASK_TOKEN | _UNUSED)
HF = Layout(_HF_NAMES, MASK_TOKEN | _UNUSED)


def describe(tensors: Tensors, hints: Hints) -> Family:
    """Describe an AIMv2 image encoder in the layout of apple/ml-aim. Raises Unrecognised."""
    if "preprocessor.pos_embed" not in tensors:
        raise Unrecognised("has no positions: it is AIMv2 for native resolutions, which timm lacks")
    patches = shape_of(tensors, "preprocessor.pos_embed", 3)[1]
    return _family(
        "AIMv2",
        tensors,
        hints,
        ("preprocessor.patchifier.proj.weight", "trunk.blocks.", "trunk.blocks.0.mlp.fc1.weight"),
        patches,
        PUBLISHER,
    )


def describe_hf(tensors: Tensors, hints: Hints) -> Family:
    """Describe an AIMv2 image encoder as saved by transformers. Raises Unrecognised."""
    check_activation(hints, "silu")
    if "embeddings.position_embedding.weight" not in tensors:
        raise Unrecognised("has no positions: it is AIMv2 for native resolutions, which timm lacks")
    patches = shape_of(tensors, "embeddings.position_embedding.weight", 2)[0]
    return _family(
        "Hugging Face AIMv2",
        tensors,
        hints,
        ("embeddings.patch_embed.weight", "encoder.layers.", "encoder.layers.0.ffn.gate_proj.weight"),
        patches,
        HF,
    )


def _family(
    format_: str, tensors: Tensors, hints: Hints, names: tuple[str, str, str], patches: int, layout: Layout
) -> Family:
    """Describe AIMv2. names: the patch embedding's weight, how blocks' names begin, and the first layer of an MLP."""
    width, patch_size = patch_sizes(tensors, names[0])
    side = square_side(patches, "has positions")
    notices: list[str] = []
    config = hints.config if hints.config.get("hidden_size") == width else {}
    heads = find_num_heads(width, hints.num_heads, config, notices, published=_HEADS, channels=_CHANNELS)
    hidden = shape_of(tensors, names[2], 2)[0]
    sizes: dict[str, Any] = {"embed_dim": width, "depth": count_blocks(tensors, names[1])}
    sizes |= {"num_heads": heads, "hidden": hidden}
    model, options = named_model(_MODELS, sizes, "aimv2_large_patch14_224")
    options |= {"patch_size": patch_size} if patch_size != 14 else {}
    size = side * patch_size
    return Family(format_, "aimv2", model, options, size, layout, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, tuple(notices))


_HEADS = {768: 6, **{own["embed_dim"]: own["num_heads"] for own in _MODELS.values()}}
