"""Weights in and out: our own safetensors with a header, and foreign files converted to timm's names.

Files users keep are safetensors in timm's key names; the JSON header (key `mimref` of the metadata) tells the
architecture, the source, the preset, the data and the metrics.
"""

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mimref.encoders.vit import Architecture, Encoder, build_encoder, resize_positions
from mimref.errors import CheckpointError
from mimref.files import atomic_write

# Parts of public checkpoints that are not the encoder: MAE's decoder, classifiers.
_DROPPED_PREFIXES = ("decoder_", "decoder.", "mask_token", "head.")
_WRAPPERS = ("model", "state_dict")


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read from a file: timm-named tensors and, for our own files, the header."""

    path: Path
    tensors: dict[str, Tensor]
    header: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture | None:
        """Architecture from the header; None for foreign files."""
        return Architecture.from_dict(self.header["architecture"]) if "architecture" in self.header else None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read `path`, `quickstart` for the packaged encoder, or the output folder of a run.

    Raises CheckpointError with one line for a missing, damaged or foreign file.
    """
    file = _find(path)
    try:
        with file.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    if not start:
        raise CheckpointError(f"{file}: the file is empty")
    # A safetensors file starts with the length of its JSON header, 8 bytes, and the header's brace.
    return _read_safetensors(file) if start[8:] == b"{" else _read_pickle(file)


def _find(path: str | Path) -> Path:
    if path == "quickstart":
        return Path(str(resources.files("mimref") / "assets" / "quickstart.safetensors"))
    file = Path(path)
    if file.is_dir():
        file = file / "encoder.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{file}: no such checkpoint")
    return file


def _read_safetensors(file: Path) -> Checkpoint:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        header = json.loads(metadata.get("mimref", "{}"))
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"{file}: damaged safetensors file ({error})") from error
    return Checkpoint(file, {name: tensor.float() for name, tensor in _encoder_part(tensors).items()}, header)


def _read_pickle(file: Path) -> Checkpoint:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: not a readable checkpoint ({reason})") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {
        name: tensor
        for name, tensor in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    if not tensors:
        raise CheckpointError(f"{file}: holds no tensors with names")
    return Checkpoint(file, {name: tensor.float() for name, tensor in _encoder_part(tensors).items()})


def _encoder_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_DROPPED_PREFIXES)}


def load_weights(encoder: Encoder, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's tensors into an encoder; positions are interpolated to the encoder's grid.

    Raises CheckpointError naming the tensors that are missing, unexpected or of another shape.
    """
    wanted = encoder.vit.state_dict()
    given = dict(checkpoint.tensors)
    if "pos_embed" in given and "pos_embed" in wanted and given["pos_embed"].shape != wanted["pos_embed"].shape:
        given["pos_embed"] = _fit_positions(encoder, given["pos_embed"])
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is unexpected" for name in given if name not in wanted]
    problems += [
        f"{name} has shape {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        name = encoder.architecture.name
        raise CheckpointError(f"{checkpoint.path}: does not fit {name}: {'; '.join(problems[:4])}{more}")
    encoder.vit.load_state_dict(given)


def _fit_positions(encoder: Encoder, positions: Tensor) -> Tensor:
    prefix = 0 if encoder.vit.no_embed_class else encoder.num_prefix_tokens
    side = encoder.architecture.image_size // encoder.patch_size
    patches = positions.shape[1] - prefix if positions.ndim == 3 else 0
    if patches <= 0 or int(patches**0.5) ** 2 != patches:
        return positions
    return torch.cat([positions[:, :prefix], resize_positions(positions[:, prefix:], (side, side))], dim=1)


def load_encoder(path: str | Path, architecture: Architecture | None = None) -> tuple[Encoder, dict[str, Any]]:
    """An encoder with a file's weights, and the file's header (empty for foreign files).

    architecture: needed for foreign files; for ours the header's is used unless one is given.
    """
    checkpoint = read_checkpoint(path)
    chosen = architecture or checkpoint.architecture
    if chosen is None:
        raise CheckpointError(f"{checkpoint.path}: does not say its architecture; pass --arch")
    encoder = build_encoder(chosen)
    load_weights(encoder, checkpoint)
    return encoder, checkpoint.header


def weights_hash(encoder: Encoder) -> str:
    """SHA-256 over an encoder's tensors: tells whether two runs started from the same weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.vit.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_encoder(
    path: Path, encoder: Encoder, header: Mapping[str, Any], *, dtype: torch.dtype = torch.float32
) -> None:
    """Write an encoder atomically as safetensors in timm's names; `header` gains the architecture."""
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in encoder.vit.state_dict().items()}
    described = {"architecture": encoder.architecture.to_dict(), **header}
    payload = save(tensors, metadata={"mimref": json.dumps(described), "format": "pt"})
    with atomic_write(path) as stream:
        stream.write(payload)
