"""Parameter groups, AdamW, and the one place where a learning rate is computed."""

import math
import re
from typing import Any

import torch
from torch import nn

from mimref.encoders.vit import Encoder

# Of timm's models, which the tokens of blocks do not go through.
_POOLING = ("fc_norm.", "attn_pool.")
_TOKENS = ("cls_token", "reg_token", "pos_embed")


def learning_rate(update: int, *, peak: float, warmup_updates: int, total_updates: int, end: float) -> float:
    """Linear warm-up, then cosine, per update (0-based).

    During warm-up update u has `peak * (u + 1) / (warmup_updates + 1)`; afterwards a cosine falls from `peak` towards
    `end`, which the last update all but reaches.
    """
    if update < warmup_updates:
        return peak * (update + 1) / (warmup_updates + 1)
    position = (update - warmup_updates) / max(1, total_updates - warmup_updates)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, position)))


def warmup_updates(warmup_epochs: float | None, epochs: int, updates_per_epoch: int) -> int:
    """Length of the warm-up: 4 epochs in the paper (Table 10), a fifth of shorter runs unless set."""
    chosen = min(4.0, epochs / 5) if warmup_epochs is None else warmup_epochs
    return round(chosen * updates_per_epoch)


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


def module_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of heads or a decoder, at the full learning rate; vectors and `no_decay_names` are not decayed."""
    decayed: dict[str, Any] = {"params": [], "names": [], "lr_scale": 1.0, "weight_decay": weight_decay}
    plain: dict[str, Any] = {"params": [], "names": [], "lr_scale": 1.0, "weight_decay": 0.0}
    undecayed: frozenset[str] = getattr(module, "no_decay_names", frozenset())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = plain if parameter.ndim <= 1 or name in undecayed else decayed
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in (decayed, plain) if group["params"]]


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW, fused on CUDA and over lists of tensors elsewhere; learning rates are set before every update."""
    # Fused updates on the CPU are faster too, but round otherwise: published numbers were made without.
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=fused or None, foreach=None if fused else True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
