"""Export to the layout of the MIM-Refiner releases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimref.encoders.checkpoints import encoder_from, read_checkpoint
from mimref.encoders.export import Export, encoder_features, plain_state, write_verified
from mimref.encoders.vit import Encoder
from mimref.errors import CheckpointError, ConfigError
from mimref.files import check_new_file
from mimref.progress import Listener

_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def export_release(
    encoder: Encoder, out: Path, facts: Mapping[str, Any], *, force: bool = False, listener: Listener | None = None
) -> Export:
    """Write what the MIM-Refiner repository's models load: `state_dict`, and `ctor_kwargs` for their constructors.

    out: ends in .th, .pth or .pt. `facts` are saved as `mimref`, which other programs ignore.
    Raises ConfigError for what the layout has no place for, OutputError as `export_timm`.
    """
    check_new_file(out, (".th", ".pth", ".pt"), force)
    architecture = encoder.architecture
    state = _release_state(encoder)
    sizes = {
        "patch_size": architecture.patch_size,
        "dim": architecture.width,
        "depth": architecture.depth,
        "num_heads": architecture.num_heads,
        "input_shape": (3, architecture.image_size, architecture.image_size),
        "mlp_hidden_dim": state["blocks.0.mlp.fc1.bias"].shape[0],
    }
    content = {"state_dict": state, "ctor_kwargs": sizes, "mimref": dict(facts)}
    difference = write_verified(
        out, encoder, lambda file: torch.save(content, file), lambda file: _read_release(file, encoder), listener
    )
    return Export(out, difference, f"torch.load({str(out)!r})['state_dict']")


def _release_state(encoder: Encoder) -> dict[str, Tensor]:
    """Weights under the layout's names. Raises ConfigError naming what it has no place for, and another export."""
    state, architecture = plain_state(encoder), encoder.architecture
    unsupported = {
        "register tokens": "reg_token" in state,
        "an encoder without CLS token": "cls_token" not in state,
        "LayerScale": "blocks.0.ls1.gamma" in state,
        "SwiGLU": architecture.swiglu,
    }
    for feature, present in unsupported.items():
        if present:
            raise ConfigError(f"--to release: the layout has no place for {feature}; use --to timm or --to onnx")
    if not architecture.post_norm and "norm.weight" not in state:
        raise ConfigError("--to release: the layout has no place for an encoder without final norm; use --to onnx")
    positions, token = state.pop("pos_embed"), state.pop("cls_token")
    side = architecture.image_size // encoder.patch_size
    num_prefix = positions.shape[1] - side**2
    if architecture.post_norm:
        state = {name.replace("norm_pre.", "embed_norm."): tensor for name, tensor in state.items()}
    state["pos_embed.embed"] = positions[:, num_prefix:].reshape(1, side, side, -1).clone()
    state["cls_tokens.tokens"] = token + positions[:, :num_prefix] if num_prefix else token
    if different := sorted(state.keys() ^ _release_names(encoder.depth, post_norm=architecture.post_norm)):
        raise ConfigError(
            f"--to release: the layout has other tensors than {architecture.name} ({different[0]}); "
            "use --to timm or --to onnx"
        )
    return state


def _release_names(depth: int, *, post_norm: bool) -> set[str]:
    """The tensors that the repository's models load strictly."""
    layers = ["patch_embed.proj", "embed_norm" if post_norm else "norm"]
    layers += [f"blocks.{block}.{layer}" for block in range(depth) for layer in _BLOCK]
    names = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    return names | {"pos_embed.embed", "cls_tokens.tokens"}


def _read_release(file: Path, encoder: Encoder) -> dict[str, Tensor]:
    """Features of the file, recognised as any foreign checkpoint."""
    checkpoint = read_checkpoint(file, num_heads=encoder.architecture.num_heads)
    if checkpoint.recognised is None:
        raise CheckpointError(f"{file.name}: is not recognised when read again: {checkpoint.problem}")
    found = encoder_from(checkpoint, checkpoint.recognised.architecture)
    assert isinstance(found, Encoder)
    return encoder_features(found, range(1, found.depth + 1))
