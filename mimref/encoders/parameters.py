"""An encoder's parameters for training: layer-wise learning rates, weight decay, freezing."""

import re
from typing import Any

from mimref.encoders.vit import Encoder

# Parts of timm's models that the tokens of blocks do not pass.
_POOLING = ("fc_norm.", "attn_pool.")
_TOKENS = ("cls_token", "reg_token", "pos_embed")


def layer_of(name: str, depth: int) -> int:
    """An encoder parameter's layer: embeddings 0, block i is i, final norm depth + 1 (as BEiT counts)."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return depth + 1 if name.startswith(("norm.", "fc_norm.")) else 0


def freeze_untrained(encoder: Encoder, *, first: int, last: int) -> None:
    """Freeze the `first` blocks, and all that does not train with heads on the blocks up to `last`."""
    freeze_first(encoder, first)
    freeze_unreached(encoder, last)


def freeze_first(encoder: Encoder, blocks: int) -> None:
    """Freeze the first `blocks` blocks and all that feeds them: patch embedding, CLS and register tokens, positions."""
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
    """AdamW groups of an encoder's trainable parameters, one per layer with weight decay and one without.

    Each group has `lr_scale` = layer_decay ** (depth + 1 - layer): 1 for the final norm, one decay for the last block.
    Biases, norms, CLS and register tokens and positions have no weight decay.
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
