"""The timm models that a file with timm's names may hold, for messages that ask for `--arch`.

Such files are not recognised by their tensors, which show neither window sizes nor image sizes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimref.encoders.meta import RatesOnCpu
from mimref.errors import CheckpointError

# Module and pattern of names of timm's models, and names of tensors that show them.
_TELLTALES = (
    ("swin_transformer", "", "layers.3.downsample.norm.weight", "layers.0.blocks.0.attn.relative_position_bias_table"),
    ("swin_transformer_v2", "", "layers.3.downsample.norm.weight", "layers.0.blocks.0.attn.logit_scale"),
    ("convnext", "", "stem.0.weight", "stages.0.blocks.0.conv_dw.weight"),
    ("hieradet_sam2", "", "patch_embed.proj.weight", "pos_embed_window"),
    ("hiera", "", "patch_embed.proj.weight", "pos_embed_win"),
    ("eva", "*dinov3*", "patch_embed.proj.weight", "reg_token", "blocks.0.gamma_1"),
    ("eva", "eva*", "patch_embed.proj.weight", "blocks.0.attn.q_bias"),
    ("eva", "eva*", "patch_embed.proj.weight", "blocks.0.attn.q_proj.weight"),
    ("vision_transformer", "aimv2*", "patch_embed.proj.weight", "blocks.0.mlp.fc1_g.weight"),
)
# Tensors of layers after pooling, and computed ones that older versions of timm saved.
_BESIDE = re.compile(r"(head|fc_norm)\.|.*\.(attn_mask|relative_position_index|relative_coords_table)$")
_MOST_NAMED = 4
# Of the plain encoders here: of MLPs, and of SwiGLU's.
_ACTIVATIONS = (str(nn.GELU()), str(nn.SiLU()))


def likely_models(named: Mapping[str, Tensor]) -> list[str]:
    """Return the names of timm's models, of the families in `_TELLTALES`, whose tensors a file holds; takes seconds.

    named: the file's tensors; those outside the encoder and those of a classifier are ignored.
    """
    for module, pattern, first, *others in _TELLTALES:
        for found in (name for name in named if name == first or name.endswith(f".{first}")):
            prefix = found[: -len(first)]
            if all(prefix + name in named for name in others):
                return [model for model in timm.list_models(pattern, module=module) if _fits(model, named, prefix)]
    return []


def _fits(model: str, named: Mapping[str, Tensor], prefix: str) -> bool:
    with torch.device("meta"), RatesOnCpu():
        wanted = timm.create_model(model, pretrained=False, num_classes=0).state_dict()
    shapes = {name: tensor.shape for name, tensor in wanted.items() if not _BESIDE.match(name)}
    parts = {name.partition(".")[0] for name in shapes}
    below = {name[len(prefix) :]: tensor.shape for name, tensor in named.items() if name.startswith(prefix)}
    own = {name: shape for name, shape in below.items() if name.partition(".")[0] in parts}
    return shapes == {name: shape for name, shape in own.items() if not _BESIDE.match(name)}


def named_models(named: Mapping[str, Tensor]) -> str:
    """Return the message that names a file's `likely_models`; empty if there are none."""
    models = likely_models(named)
    if not models:
        return ""
    others = models[1:_MOST_NAMED]
    more = f" (or {', '.join(others)}{', ...' if len(models) > _MOST_NAMED else ''})" if others else ""
    return f"has timm's names, which do not show the model; load it with --arch {models[0]}{more}"


def read_model(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return `config.json` with the attention heads of the plain ViT of timm's that it names; for others, their name.

    Others have rotary positions or another activation, which no tensor shows.
    """
    name, options = config.get("architecture"), config.get("model_args") or {}
    if not isinstance(name, str) or not timm.is_model(name):
        return config, ""
    try:
        with torch.device("meta"), RatesOnCpu():
            model = timm.create_model(name, pretrained=False, **options)
    except Exception:  # each constructor raises its own errors for unsuitable values
        return config, ""
    if type(model) is not VisionTransformer:
        return config, name
    block: Any = model.blocks[0]
    if str(block.mlp.act) not in _ACTIVATIONS:
        return config, name
    return {**config, "hidden_size": model.embed_dim, "num_attention_heads": block.attn.num_heads}, ""


def unrecognised(path: Path, problem: str, advice: str, named: Mapping[str, Tensor]) -> CheckpointError:
    """Return the error for a file that is not recognised, with values for `--arch` if timm's models fit.

    problem, advice, named: as in `Checkpoint`.
    """
    return CheckpointError(f"{path}: {(advice and named_models(named)) or problem + advice}")
