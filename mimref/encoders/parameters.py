"""An encoder's parameters: layer-wise learning rates, weight decay, freezing and hashes."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mimref.distributed.sharding import gathered
from mimref.encoders.backbones import BackboneArchitecture, EncoderArchitecture, TimmBackbone, TokenEncoder, reached
from mimref.encoders.timm_models import layer_ids
from mimref.encoders.vit import Encoder

# Parts of timm's models through which the tokens of blocks do not pass.
_POOLING = ("fc_norm.", "attn_pool.")
_TOKENS = ("cls_token", "reg_token", "pos_embed")
# Relative positions and attention scales, which not every version of timm exempts from weight decay.
_OF_ATTENTION = ("relative_position_bias_table", "cpb_mlp", "logit_scale")


def freeze_untrained(encoder: TokenEncoder, *, first: int, last: int) -> None:
    """Freeze all parameters that do not train if heads read blocks up to `last` and the first `first` are frozen.

    Whatever feeds frozen blocks is frozen too: patch embedding, CLS and register tokens, positions. So is whatever does
    not reach the heads: pooling, blocks after `last` and, unless `last` is the encoder's last block, the final norm.
    """
    if isinstance(encoder, TimmBackbone):
        fed = reached(encoder.architecture, first) if first else set[str]()
        trained = set(reached(encoder.architecture, last)) - fed
    else:
        reach = encoder.last_layer if last == encoder.depth else last
        layers = {name: encoder.layer_of(name) for name, _ in encoder.vit.named_parameters()}
        lowest = first + 1 if first else 0
        trained = {name for name, layer in layers.items() if lowest <= layer <= reach and not name.startswith(_POOLING)}
    for name, parameter in encoder.model.named_parameters():
        if name not in trained:
            parameter.requires_grad_(False)


def encoder_groups(encoder: TokenEncoder, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Return AdamW groups of an encoder's trainable parameters: per layer, one with weight decay and one without.

    Each group has `lr_scale` = layer_decay ** (last layer - layer): 1 for the final norm, layer_decay for the last
    block. Biases, norms, CLS and register tokens, positions and what timm's model exempts have no weight decay.
    """
    names: Callable[[], Iterable[str]] | None = getattr(encoder.model, "no_weight_decay", None)
    undecayed = set(names()) if names and isinstance(encoder, TimmBackbone) else set[str]()
    undecayed |= {name for name, _ in encoder.model.named_parameters() if any(part in name for part in _OF_ATTENTION)}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in encoder.model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Layers are looked up only if layer decay needs them: not every model groups its parameters.
        layered = layer_decay != 1 or isinstance(encoder, Encoder)
        layer, last = (encoder.layer_of(name), encoder.last_layer) if layered else (0, 0)
        decayed = parameter.ndim > 1 and not name.startswith(_TOKENS) and name not in undecayed
        scale, decay = layer_decay ** (last - layer), weight_decay if decayed else 0.0
        new_group = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay}
        group = groups.setdefault((layer, decayed), new_group)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def check_layers(architecture: EncoderArchitecture, layer_decay: float) -> None:
    """Raise ConfigError for layer decay on a model for which timm does not define layers."""
    if isinstance(architecture, BackboneArchitecture) and layer_decay != 1:
        with torch.device("meta"):
            layer_ids(architecture.build())


def weights_hash(encoder: TokenEncoder) -> str:
    """Return the SHA-256 of an encoder's tensors, which shows whether two runs start from the same weights."""
    return tensors_hash(encoder.model.state_dict())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors' names and bytes. Reads every tensor; for sharded ones, all ranks must call it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(gathered(tensor).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
