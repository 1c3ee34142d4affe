"""BEiT, BEiT v2, data2vec 1.0 for images, and SimMIM's vision transformers, which share the layout of BEiT's code.

Positions are relative: one table for all blocks during pre-training, one table per block after fine-tuning. Queries and
values have biases, keys have none.
"""

from typing import Any

from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch import Tensor, nn

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
from mimref.encoders.parts import Unrecognised

_BLOCK = r"blocks\.(\d+)\."
_HF_BLOCK = r"encoder.layer.\1"
_MODELS = {
    f"{version}_{name}_patch16_224": {"embed_dim": width, "depth": depth, "num_heads": heads, "hidden": 4 * width}
    for version in ("beit", "beitv2")
    for name, width, depth, heads in (("base", 768, 12, 12), ("large", 1024, 24, 16))
}

_HF_NAMES = naming_by(
    {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        r"patch_embed\.proj\.(.+)": r"embeddings.patch_embeddings.projection.\1",
        r"rel_pos_bias\.(.+)": r"encoder.relative_position_bias.\1",
        rf"{_BLOCK}attn\.(relative_position_bias_table)": (
            rf"{_HF_BLOCK}.attention.attention.relative_position_bias.\2"
        ),
        rf"{_BLOCK}norm1\.(.+)": rf"{_HF_BLOCK}.layernorm_before.\2",
        rf"{_BLOCK}norm2\.(.+)": rf"{_HF_BLOCK}.layernorm_after.\2",
        rf"{_BLOCK}gamma_([12])": rf"{_HF_BLOCK}.lambda_\2",
        rf"{_BLOCK}attn\.qkv\.weight": Origin(
            tuple(rf"{_HF_BLOCK}.attention.attention.{part}.weight" for part in ("query", "key", "value"))
        ),
        rf"{_BLOCK}attn\.q_bias": rf"{_HF_BLOCK}.attention.attention.query.bias",
        rf"{_BLOCK}attn\.v_bias": rf"{_HF_BLOCK}.attention.attention.value.bias",
        rf"{_BLOCK}attn\.proj\.(.+)": rf"{_HF_BLOCK}.attention.output.dense.\2",
        rf"{_BLOCK}mlp\.fc1\.(.+)": rf"{_HF_BLOCK}.intermediate.dense.\2",
        rf"{_BLOCK}mlp\.fc2\.(.+)": rf"{_HF_BLOCK}.output.dense.\2",
        r"norm\.(.+)": r"layernorm.\1",
        r"fc_norm\.(.+)": r"pooler.layernorm.\1",
    }
)


def _indices(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that hold the table's row for every pair of tokens."""
    buffers = model.named_buffers()
    return {name: buffer for name, buffer in buffers if name.endswith("relative_position_index")}


_UNUSED = {
    "classifier": r"(head|fc_norm|lm_head|classifier|pooler|cls_pt_layers)\..*",
    "computed": r"(.+\.)?relative_position_index",
}
PUBLISHER = Layout(naming_by({}), MASK_TOKEN | _UNUSED, _indices)
HF = Layout(_HF_NAMES, MASK_TOKEN | _UNUSED)


def describe(tensors: Tensors, hints: Hints) -> Family:
    """Describe an encoder of BEiT's code in the layout of microsoft/unilm. Raises Unrecognised."""
    table = next(
        (name for name in ("rel_pos_bias", "blocks.0.attn") if f"{name}.relative_position_bias_table" in tensors), ""
    )
    sizes, patch_size, side = _sizes(
        tensors,
        patches="patch_embed.proj.weight",
        table=f"{table}.relative_position_bias_table",
        hidden="blocks.0.mlp.fc1.weight",
        blocks="blocks.",
    )
    options = _options(
        shared="rel_pos_bias.relative_position_bias_table" in tensors,
        own="blocks.0.attn.relative_position_bias_table" in tensors,
        absolute="pos_embed" in tensors,
        normed="norm.weight" in tensors,
    )
    format_, source = _publisher(tensors, hints, sizes["embed_dim"])
    return _family(format_, source, sizes, options, patch_size, side, PUBLISHER)


def describe_hf(tensors: Tensors, hints: Hints) -> Family:
    """Describe a BEiT or data2vec 1.0 as saved by transformers. Raises Unrecognised."""
    check_activation(hints, "gelu")
    own = "encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table"
    shared = "encoder.relative_position_bias.relative_position_bias_table"
    sizes, patch_size, side = _sizes(
        tensors,
        patches="embeddings.patch_embeddings.projection.weight",
        table=shared if shared in tensors else own,
        hidden="encoder.layer.0.intermediate.dense.weight",
        blocks="encoder.layer.",
    )
    options = _options(
        shared=shared in tensors,
        own=own in tensors,
        absolute="embeddings.position_embeddings" in tensors,
        normed="layernorm.weight" in tensors,
    )
    is_data2vec = hints.config.get("model_type") == "data2vec-vision"
    name, source = ("data2vec 1.0", "d2v1") if is_data2vec else ("BEiT (also data2vec 1.0)", None)
    return _family(f"Hugging Face {name}", source, sizes, options, patch_size, side, HF)


def _publisher(tensors: Tensors, hints: Hints, width: int) -> tuple[str, str | None]:
    """Return the format and the source."""
    if any(name.startswith("cls_pt_layers.") for name in tensors):
        return "BEiT v2", "beitv2"
    if "decoder.0.weight" in hints.beside:
        return "SimMIM (vision transformer)", "simmim"
    head = tensors.get("lm_head.weight")
    if head is not None and head.ndim == 2:
        # BEiT predicts one of 8192 visual tokens, data2vec the features themselves.
        return ("data2vec 1.0", "d2v1") if len(head) == width else ("BEiT", "beit")
    return "BEiT (or BEiT v2, data2vec 1.0)", None


def _sizes(tensors: Tensors, *, patches: str, table: str, hidden: str, blocks: str) -> tuple[dict[str, Any], int, int]:
    """Return the sizes of the model, the patch size, and the rows of patches."""
    width, patch_size = patch_sizes(tensors, patches)
    distances, heads = shape_of(tensors, table, 2)
    # There are 2 * side - 1 distances in each direction, and three more with the CLS token.
    side, odd = divmod(square_side(distances - 3, "has a table of relative positions") + 1, 2)
    if odd or width % heads:
        raise Unrecognised(f"{table} of shape {(distances, heads)} does not fit a width of {width}")
    sizes = {"embed_dim": width, "depth": count_blocks(tensors, blocks), "num_heads": heads}
    return sizes | {"hidden": shape_of(tensors, hidden, 2)[0]}, patch_size, side


def _options(*, shared: bool, own: bool, absolute: bool, normed: bool) -> dict[str, Any]:
    """Return the options of timm's Beit that differ from those of its named models."""
    options: dict[str, Any] = {"use_shared_rel_pos_bias": True} if shared else {}
    options |= {} if own else {"use_rel_pos_bias": False}
    options |= {"use_abs_pos_emb": True} if absolute else {}
    # Otherwise, timm's models normalise only the pooled token.
    return options | ({"global_pool": "token"} if normed else {})


def _family(
    format_: str,
    source: str | None,
    sizes: dict[str, Any],
    options: dict[str, Any],
    patch_size: int,
    side: int,
    layout: Layout,
) -> Family:
    version, is_v2 = "beitv2" if source == "beitv2" else "beit", source == "beitv2"
    published = {name: own for name, own in _MODELS.items() if name.startswith(f"{version}_")}
    model, more = named_model(published, sizes, f"{version}_base_patch16_224")
    more |= {"patch_size": patch_size} if patch_size != 16 else {}
    notices = []
    if source is None:
        notices.append("BEiT's normalisation of pixels (0.5) is assumed; BEiT v2 uses ImageNet's")
    imagenet = is_v2 or source == "simmim"
    mean = IMAGENET_DEFAULT_MEAN if imagenet else IMAGENET_INCEPTION_MEAN
    std = IMAGENET_DEFAULT_STD if imagenet else IMAGENET_INCEPTION_STD
    return Family(format_, source, model, options | more, side * patch_size, layout, mean, std, tuple(notices))
