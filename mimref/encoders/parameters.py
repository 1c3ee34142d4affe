"""An encoder's parameters: layer-wise learning rates, weight decay, freezing, and what identifies them."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mimref.encoders.vit import Encoder

# Parts of timm's models that the tokens of blocks do not pass through.
_POOLING = ("fc_norm.", "attn_pool.")
_TOKENS = ("cls_token", "reg_token", "pos_embed")


def _layer_of(name: str, depth: int) -> int:
    """An encoder parameter's layer: embeddings 0, block i is i, final norm depth + 1 (as BEiT counts)."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return depth + 1 if name.startswith(("norm.", "fc_norm.")) else 0


def freeze_untrained(encoder: Encoder, *, first: int, last: int) -> None:
    """Freeze what does not train if heads read blocks up to `last`, and the `first` blocks are frozen.

    Frozen blocks include what feeds them: patch embedding, CLS and register tokens, positions. Later blocks, the norm
    after the last one and pooling do not reach the heads.
    """
    reached = encoder.depth + 1 if last == encoder.depth else last
    for name, parameter in encoder.vit.named_parameters():
        layer = _layer_of(name, encoder.depth)
        if (first and layer <= first) or layer > reached or name.startswith(_POOLING):
            parameter.requires_grad_(False)


def encoder_groups(encoder: Encoder, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of an encoder's trainable parameters, one per layer with weight decay and one without.

    Each group has `lr_scale` = layer_decay ** (depth + 1 - layer): 1 for the final norm, one decay for the last block.
    Biases, norms, CLS and register tokens and positions have no weight decay.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in encoder.vit.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = _layer_of(name, encoder.depth)
        decayed = parameter.ndim > 1 and not name.startswith(_TOKENS)
        scale, decay = layer_decay ** (encoder.depth + 1 - layer), weight_decay if decayed else 0.0
        new_group = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay}
        group = groups.setdefault((layer, decayed), new_group)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def weights_hash(encoder: Encoder) -> str:
    """SHA-256 of an encoder's tensors, to see whether two runs start from the same weights."""
    return tensors_hash(encoder.vit.state_dict())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors' names and bytes. Reads every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
