"""An encoder's parameters for training: layer-wise learning rates, weight decay, freezing."""

import re
from typing import Any

from mimref.encoders.vit import Encoder

# Of timm's models, which the tokens of blocks do not go through.
_POOLING = ("fc_norm.", "attn_pool.")
_TOKENS = ("cls_token", "reg_token", "pos_embed")


def layer_of(name: str, depth: int) -> int:
    """Layer that an encoder parameter counts to: embeddings 0, block i is i, final norm depth + 1 (BEiT's counting)."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return depth + 1 if name.startswith(("norm.", "fc_norm.")) else 0


def freeze_untrained(encoder: Encoder, *, first: int, last: int) -> None:
    """Freeze what training heads on the blocks up to `last` leaves as it is, when the `first` blocks are frozen."""
    freeze_first(encoder, first)
    freeze_unreached(encoder, last)


def freeze_first(encoder: Encoder, blocks: int) -> None:
    """Freeze the first `blocks` blocks, and with them patch embedding, CLS and register tokens and positions."""
    for name, parameter in encoder.vit.named_parameters():
        if blocks and layer_of(name, encoder.depth) <= blocks:
            parameter.requires_grad_(False)


def freeze_unreached(encoder: Encoder, last: int) -> None:
    """Freeze what no output of the blocks up to `last` depends on: later blocks, the norm after the last, pooling."""
    for name, parameter in encoder.vit.named_parameters():
        later = layer_of(name, encoder.depth) > (encoder.depth + 1 if last == encoder.depth else last)
        if later or name.startswith(_POOLING):
            parameter.requires_grad_(False)


def encoder_groups(encoder: Encoder, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of an encoder's trainable parameters, one per (layer, decayed or not).

    Each group has `lr_scale` = layer_decay ** (depth + 1 - layer): the final norm has 1, the last block is already
    decayed once. Biases, norms, CLS and register tokens and positions are not decayed.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in encoder.vit.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, encoder.depth)
        decayed = parameter.ndim > 1 and not name.startswith(_TOKENS)
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "names": [],
                "lr_scale": layer_decay ** (encoder.depth + 1 - layer),
                "weight_decay": weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
