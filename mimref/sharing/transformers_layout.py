"""Encoders as models of transformers: ViT, I-JEPA (no CLS token), DINOv2 (LayerScale, SwiGLU), DINOv2 with registers.

Tensors have the names of published checkpoints, which every version of transformers reads. Where a class has a part
that the encoder lacks, that part is written so that it changes nothing: LayerScale of 1, a CLS position of 0, a pooler
that passes the CLS token on, a classifier weight of 0 for tokens that are not read.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mimref.config.base import ReadingConfig
from mimref.data.transforms import EvalTransform
from mimref.encoders.classifier import Classifier
from mimref.encoders.formats import recognise
from mimref.encoders.parts import Unrecognised
from mimref.encoders.vit import Architecture, Encoder
from mimref.errors import ConfigError
from mimref.sharing.layout import Layout, Subject, with_layer_scale

_CLASSES = {"vit": "ViT", "ijepa": "IJepa", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
"""Maps `model_type` to the start of its classes' names."""
_BLOCK = {
    "attn.proj": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_DINOV2_BLOCK = _BLOCK | {
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls1": "layer_scale1",
    "ls2": "layer_scale2",
}
_SWIGLU = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
_TOKENS = {
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_BICUBIC = 3
_MOST_RATIO = 32


def transformers_layout(subject: Subject) -> Layout:
    """Lay out the files. Raises ConfigError, naming an alternative, for what no class of transformers computes."""
    encoder = subject.encoder
    if not isinstance(encoder, Encoder):
        raise ConfigError(
            f"--layout transformers: {encoder.architecture.name} is not a plain vision transformer; use --layout timm"
        )
    architecture, state = _plain(encoder)
    kind = _kind(architecture)
    config = _config(kind, architecture, state)
    if kind.startswith("dinov2"):
        state = with_layer_scale(state, architecture.depth, architecture.width)
    tensors = _tensors(kind, architecture, state)
    base = _CLASSES[kind]
    if subject.classifier is None:
        if kind == "vit":
            tensors |= _passing_pooler(architecture.width)
        name = f"{base}Model"
    else:
        tensors = {f"{kind}.{key}": tensor for key, tensor in tensors.items()}
        tensors |= _classifier(kind, subject.classifier)
        name = f"{base}ForImageClassification"
        config |= {
            "id2label": {str(number): label for number, label in enumerate(subject.classes)},
            "label2id": {label: number for number, label in enumerate(subject.classes)},
        }
    config = {"architectures": [name], "model_type": kind, **config, "torch_dtype": "float32"}
    return Layout("transformers", name, tensors, config, subject.header, processor_config(subject.transform))


def processor_config(transform: EvalTransform) -> dict[str, Any]:
    """Return the `preprocessor_config.json` for an evaluation transform."""
    size = transform.image_size
    square = {"height": size, "width": size}
    direct = transform.resize == "direct"
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": len(transform.mean) == 3,
        "do_resize": True,
        "size": square if direct else {"shortest_edge": round(size / transform.crop_fraction)},
        "resample": _BICUBIC,
        "do_center_crop": not direct,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }


def _refusal(what: str) -> ConfigError:
    return ConfigError(f"--layout transformers: none of its classes has {what}; use --layout timm")


def _plain(encoder: Encoder) -> tuple[Architecture, Mapping[str, Tensor]]:
    """Return sizes and tensors in mimref's own form, from which named timm models may differ."""
    architecture, state = encoder.architecture, encoder.vit.state_dict()
    if architecture.post_norm:
        raise ConfigError(
            f"--to hf: neither transformers nor timm has post-norm blocks (data2vec 2.0), which {architecture.name} "
            "needs; use --to release or --to onnx"
        )
    if not architecture.from_timm:
        return architecture, state
    first: Any = encoder.vit.blocks[0]
    eps = float(first.norm1.eps)
    config = {"hidden_size": architecture.width, "layer_norm_eps": eps}
    try:
        found = recognise(state, ReadingConfig(num_heads=architecture.num_heads), config=config)
    except Unrecognised as reason:
        raise _refusal(f"the parts of {architecture.name} ({reason})") from reason
    if not isinstance(found.architecture, Architecture):
        raise _refusal(f"the parts of {architecture.name} ({found.format})")
    return found.architecture, found.tensors


def _kind(architecture: Architecture) -> str:
    """Return the `model_type` of the class that computes the same."""
    if not architecture.final_norm:
        raise _refusal(f"blocks without a norm after the last one, as {architecture.name}")
    special = architecture.registers or architecture.layer_scale or architecture.swiglu
    if not architecture.class_token:
        if special:
            raise _refusal(f"registers, LayerScale or SwiGLU without a CLS token, as {architecture.name}")
        return "ijepa"
    if architecture.registers:
        return "dinov2_with_registers"
    return "dinov2" if special else "vit"


def _config(kind: str, architecture: Architecture, state: Mapping[str, Tensor]) -> dict[str, Any]:
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    config: dict[str, Any] = {
        "hidden_size": architecture.width,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.num_heads,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": architecture.norm_eps,
        "image_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "num_channels": architecture.channels,
        "qkv_bias": True,
    }
    if not kind.startswith("dinov2"):
        # transformers before 4.50 supports no pooler activation other than tanh.
        return config | {"intermediate_size": hidden} | ({"pooler_act": "linear"} if kind == "vit" else {})
    config |= {"mlp_ratio": _mlp_ratio(architecture, hidden), "use_swiglu_ffn": architecture.swiglu}
    return config | ({"num_register_tokens": architecture.registers} if architecture.registers else {})


def _mlp_ratio(architecture: Architecture, hidden: int) -> int:
    """Return the MLP's width as DINOv2's classes state it: a multiple of the token's, less a third for SwiGLU."""
    for ratio in range(1, _MOST_RATIO):
        full = architecture.width * ratio
        if hidden == ((int(full * 2 / 3) + 7) // 8 * 8 if architecture.swiglu else full):
            return ratio
    raise _refusal(f"an MLP of {hidden} channels beside LayerScale, SwiGLU or registers, as {architecture.name}")


def _tensors(kind: str, architecture: Architecture, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors to those of the class without a head."""
    names = _BLOCK if not kind.startswith("dinov2") else _DINOV2_BLOCK | (_SWIGLU if architecture.swiglu else {})
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", name)
        if match is None:
            tensors[_TOKENS[name]] = tensor
            continue
        start, part, parameter = ".".join(["encoder", "layer", match[1]]), match[2], match[3]
        if part == "attn.qkv":
            for own, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[f"{start}.attention.attention.{own}.{parameter}"] = third
        else:
            tensors[f"{start}.{names[part]}.{'lambda1' if parameter == 'gamma' else parameter}"] = tensor
    if kind.startswith("dinov2"):
        tensors["embeddings.mask_token"] = torch.zeros(1, architecture.width)
    if architecture.registers:
        # With registers, mimref's encoder has positions for patches only.
        of_patches = tensors[_TOKENS["pos_embed"]]
        tensors[_TOKENS["pos_embed"]] = torch.cat([torch.zeros_like(of_patches[:, :1]), of_patches], dim=1)
    return tensors


def _passing_pooler(width: int) -> dict[str, Tensor]:
    return {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}


def _classifier(kind: str, classifier: Classifier) -> dict[str, Tensor]:
    """Return the head's tensors. Raises ConfigError for pooling that the class does not support."""
    if not classifier.final_norm:
        raise _refusal("a classifier that norms pooled tokens, as one trained with finetune.pool = mean")
    weight, bias = classifier.head.weight.detach(), classifier.head.bias.detach()
    if kind.startswith("dinov2"):
        # Its classifier reads the mean of the patches in addition to the CLS token.
        weight = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    return {"classifier.weight": weight, "classifier.bias": bias}
