"""ConvNeXt V2, pre-trained by FCMAE or fine-tuned, and DINOv3's ConvNeXt.

Files from FCMAE's own training have kernels of sparse convolutions; published ones have dense kernels.
"""

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
)
from mimref.encoders.families.origins import Origin, naming_by

_IMAGE_SIZE = 224
_BLOCK = r"stages\.(\d+)\.blocks\.(\d+)\."
_MODELS_V2 = {
    f"convnextv2_{name}": {"depths": depths, "dims": tuple(width * 2**stage for stage in range(4))}
    for name, width, depths in (
        ("atto", 40, (2, 2, 6, 2)),
        ("femto", 48, (2, 2, 6, 2)),
        ("pico", 64, (2, 2, 6, 2)),
        ("nano", 80, (2, 2, 8, 2)),
        ("tiny", 96, (3, 3, 9, 3)),
        ("small", 96, (3, 3, 27, 3)),
        ("base", 128, (3, 3, 27, 3)),
        ("large", 192, (3, 3, 27, 3)),
        ("huge", 352, (3, 3, 27, 3)),
    )
}
_MODELS = {f"convnext_{name}": _MODELS_V2[f"convnextv2_{name}"] for name in ("tiny", "small", "base", "large")}

_DENSE = naming_by(
    {
        r"stem\.(.+)": r"downsample_layers.0.\1",
        r"stages\.(\d+)\.downsample\.(.+)": r"downsample_layers.\1.\2",
        rf"{_BLOCK}conv_dw\.(.+)": r"stages.\1.\2.dwconv.\3",
        rf"{_BLOCK}mlp\.fc([12])\.weight": Origin((r"stages.\1.\2.pwconv\3.weight",), axes=2),
        rf"{_BLOCK}mlp\.fc([12])\.bias": r"stages.\1.\2.pwconv\3.bias",
        rf"{_BLOCK}mlp\.grn\.weight": Origin((r"stages.\1.\2.grn.gamma",), axes=4),
        rf"{_BLOCK}mlp\.grn\.bias": Origin((r"stages.\1.\2.grn.beta",), axes=4),
        rf"{_BLOCK}(.+)": r"stages.\1.\2.\3",
        r"head\.norm\.(.+)": r"norm.\1",
    }
)
_SPARSE = naming_by(
    {
        r"stem\.(.+)": r"downsample_layers.0.\1",
        r"stages\.(\d+)\.downsample\.0\.(.+)": r"downsample_layers.\1.0.ln.\2",
        r"stages\.(\d+)\.downsample\.1\.weight": Origin((r"downsample_layers.\1.1.kernel",), sparse=True),
        r"stages\.(\d+)\.downsample\.1\.bias": Origin((r"downsample_layers.\1.1.bias",), axes=2),
        rf"{_BLOCK}conv_dw\.weight": Origin((r"stages.\1.\2.dwconv.kernel",), sparse=True),
        rf"{_BLOCK}conv_dw\.bias": Origin((r"stages.\1.\2.dwconv.bias",), axes=2),
        rf"{_BLOCK}norm\.(.+)": r"stages.\1.\2.norm.ln.\3",
        rf"{_BLOCK}mlp\.fc([12])\.weight": Origin((r"stages.\1.\2.pwconv\3.linear.weight",), axes=2),
        rf"{_BLOCK}mlp\.fc([12])\.bias": r"stages.\1.\2.pwconv\3.linear.bias",
        rf"{_BLOCK}mlp\.grn\.weight": Origin((r"stages.\1.\2.grn.gamma",), axes=2),
        rf"{_BLOCK}mlp\.grn\.bias": Origin((r"stages.\1.\2.grn.beta",), axes=2),
        r"head\.norm\.(.+)": r"norm.\1",
    }
)
_HF_BLOCK = r"encoder.stages.\1.layers.\2"
_HF_V2 = naming_by(
    {
        r"stem\.0\.(.+)": r"embeddings.patch_embeddings.\1",
        r"stem\.1\.(.+)": r"embeddings.layernorm.\1",
        r"stages\.(\d+)\.downsample\.(.+)": r"encoder.stages.\1.downsampling_layer.\2",
        rf"{_BLOCK}conv_dw\.(.+)": rf"{_HF_BLOCK}.dwconv.\3",
        rf"{_BLOCK}norm\.(.+)": rf"{_HF_BLOCK}.layernorm.\3",
        rf"{_BLOCK}mlp\.fc([12])\.weight": Origin((rf"{_HF_BLOCK}.pwconv\3.weight",), axes=2),
        rf"{_BLOCK}mlp\.fc([12])\.bias": rf"{_HF_BLOCK}.pwconv\3.bias",
        rf"{_BLOCK}mlp\.grn\.(.+)": Origin((rf"{_HF_BLOCK}.grn.\3",), axes=4),
        r"head\.norm\.(.+)": r"layernorm.\1",
    }
)
_HF_DINOV3 = naming_by(
    {
        r"stem\.(.+)": r"stages.0.downsample_layers.\1",
        r"stages\.(\d+)\.downsample\.(.+)": r"stages.\1.downsample_layers.\2",
        rf"{_BLOCK}conv_dw\.(.+)": r"stages.\1.layers.\2.depthwise_conv.\3",
        rf"{_BLOCK}norm\.(.+)": r"stages.\1.layers.\2.layer_norm.\3",
        rf"{_BLOCK}mlp\.fc([12])\.weight": Origin((r"stages.\1.layers.\2.pointwise_conv\3.weight",), axes=2),
        rf"{_BLOCK}mlp\.fc([12])\.bias": r"stages.\1.layers.\2.pointwise_conv\3.bias",
        rf"{_BLOCK}gamma": r"stages.\1.layers.\2.gamma",
        r"head\.norm\.(.+)": r"layer_norm.\1",
    }
)
# FCMAE's decoder is a block; DINOv3's ConvNeXt saves its norm twice.
_UNUSED = {"decoder": r"(decoder|proj|pred)\..*|mask_token", "copy": r"norms\.3\..*"}
PUBLISHER = Layout(_DENSE, HEADS | _UNUSED)
SPARSE = Layout(_SPARSE, HEADS | _UNUSED)
HF_V2 = Layout(_HF_V2, HEADS)
HF_DINOV3 = Layout(_HF_DINOV3, HEADS)


def describe(tensors: Tensors, hints: Hints) -> Family:
    """Describe a ConvNeXt V2, or DINOv3's ConvNeXt, in the publishers' layout. Raises Unrecognised."""
    is_sparse = "stages.0.0.dwconv.kernel" in tensors
    is_v2 = "stages.0.0.grn.gamma" in tensors
    first = "pwconv1.linear.weight" if is_sparse else "pwconv1.weight"
    sizes = _sizes(tensors, "downsample_layers.0.0.weight", "stages.{stage}.", first)
    found_layout = SPARSE if is_sparse else PUBLISHER
    has_norm = "norm.weight" in tensors
    if is_v2:
        # Only the fine-tuned models have a classifier.
        source = None if "head.weight" in tensors else "fcmae"
        return _family("ConvNeXt V2" + " (FCMAE)" * is_sparse, source, sizes, found_layout, has_norm=has_norm)
    source = "dinov3" if "norms.3.weight" in tensors else None
    format_ = "DINOv3 ConvNeXt" if source else "ConvNeXt"
    return _family(format_, source, sizes, found_layout, has_norm=has_norm, is_v2=False)


def describe_hf_v2(tensors: Tensors, hints: Hints) -> Family:
    """Describe a ConvNeXt V2 as saved by transformers. Raises Unrecognised."""
    check_activation(hints, "gelu")
    sizes = _sizes(tensors, "embeddings.patch_embeddings.weight", "encoder.stages.{stage}.layers.", "pwconv1.weight")
    has_norm = "layernorm.weight" in tensors
    return _family("Hugging Face ConvNeXt V2", None, sizes, HF_V2, has_norm=has_norm)


def describe_hf_dinov3(tensors: Tensors, hints: Hints) -> Family:
    """Describe DINOv3's ConvNeXt as saved by transformers. Raises Unrecognised."""
    check_activation(hints, "gelu")
    stem = "stages.0.downsample_layers.0.weight"
    sizes = _sizes(tensors, stem, "stages.{stage}.layers.", "pointwise_conv1.weight")
    has_norm = "layer_norm.weight" in tensors
    return _family("Hugging Face DINOv3 ConvNeXt", "dinov3", sizes, HF_DINOV3, has_norm=has_norm, is_v2=False)


def _sizes(tensors: Tensors, stem: str, blocks: str, first: str) -> dict[str, Any]:
    """Return the sizes. blocks: how names of a stage's blocks begin. first: a block's first pointwise convolution."""
    width, patch_size = patch_sizes(tensors, stem)
    starts = [blocks.format(stage=stage) for stage in range(4)]
    depths = tuple(count_blocks(tensors, start) for start in starts)
    dims = tuple(shape_of(tensors, f"{start}0.{first}", 2)[1] for start in starts)
    sizes: dict[str, Any] = {"depths": depths, "dims": (width, *dims[1:])}
    return sizes | ({"patch_size": patch_size} if patch_size != 4 else {})


def _family(
    format_: str, source: str | None, sizes: dict[str, Any], layout: Layout, *, has_norm: bool, is_v2: bool = True
) -> Family:
    models, other = (_MODELS_V2, "convnextv2_tiny") if is_v2 else (_MODELS, "convnext_tiny")
    model, options = named_model(models, sizes, other)
    notices = () if has_norm else ("the file has no final norm",)
    return Family(format_, source, model, options, _IMAGE_SIZE, layout, notices=notices)
