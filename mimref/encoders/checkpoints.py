"""Weights in and out: our own safetensors with a header, and foreign files converted to timm's names.

Files users keep are safetensors in timm's key names; the JSON header (key `mimref` of the metadata) tells the
architecture, the source, the preset, the data and the metrics.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone, classifier_layers
from mimref.encoders.vit import Architecture, Encoder, build_encoder, resize_positions
from mimref.errors import CheckpointError, ConfigError
from mimref.files import atomic_write

# Parts of public checkpoints that are not the encoder: MAE's decoder, classifiers.
_DROPPED_PREFIXES = ("decoder_", "decoder.", "mask_token", "head.")
_WRAPPERS = ("model", "state_dict")


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read from a file: tensors by name, in the file's own types, and for our own files the header."""

    path: Path
    tensors: dict[str, Tensor]
    header: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture | None:
        """Architecture from the header; None for foreign files. Raises CheckpointError when it makes no sense."""
        if "architecture" not in self.header:
            return None
        try:
            return Architecture.from_dict(self.header["architecture"])
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: damaged header ({error})") from error


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read `path`, `quickstart` for the packaged encoder, or the output folder of a run.

    Raises CheckpointError with one line for a missing, damaged or foreign file.
    """
    try:
        file = _find(path)
        with file.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not start:
        raise CheckpointError(f"{file}: the file is empty")
    # A safetensors file starts with the length of its JSON header, 8 bytes, and the header's brace.
    checkpoint = _read_safetensors(file) if start[8:] == b"{" else _read_pickle(file, zipped=start[:2] == b"PK")
    if not checkpoint.tensors:
        raise CheckpointError(f"{file}: holds no tensors with names")
    return checkpoint


def _find(path: str | Path) -> Path:
    if path == "quickstart":
        return Path(str(resources.files("mimref") / "assets" / "quickstart.safetensors"))
    file = Path(path)
    if file.is_dir():
        file = file / "encoder.safetensors"
        if not file.is_file():
            raise CheckpointError(f"{path}: the folder holds no encoder.safetensors; finish its run with --resume")
    if not file.is_file():
        raise CheckpointError(f"{file}: {'not a file' if file.exists() else 'no such file'}; give a checkpoint")
    return file


def _read_safetensors(file: Path) -> Checkpoint:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file}: damaged safetensors file ({_first_line(error)})") from error
    try:
        header = json.loads(metadata.get("mimref", "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged header ({_first_line(error)})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: damaged header (not a JSON object)")
    checkpoint = Checkpoint(file, tensors, header)
    _ = checkpoint.architecture  # a damaged one is found here, before any work
    return checkpoint


def _read_pickle(file: Path, *, zipped: bool) -> Checkpoint:
    """A file of `torch.save`; only those in the zip format, torch's default since 1.6, can be mapped into memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old kinds of pickles, nothing that a user could change
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damaged pickles fail in every possible way
        raise CheckpointError(f"{file}: {_why_unreadable(error)}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {
        name: tensor
        for name, tensor in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    return Checkpoint(file, tensors)


def _why_unreadable(error: Exception) -> str:
    # torch's own message advises to switch the check off.
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return (
            f"refused, because it holds {refused[1]}, which is not weights and could run code; "
            "where you trust it, load it with torch yourself and save its state_dict as safetensors"
        )
    detail = re.search(r"WeightsUnpickler error: (.+)", str(error))
    return f"not a checkpoint, or a damaged one ({detail[1] if detail else _first_line(error)})"


def _first_line(error: Exception) -> str:
    """An exception's first sentence; its type where that says nothing."""
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    tells = re.search("[a-z]", sentence) and not sentence.startswith("Weights only load failed")
    return sentence if tells else type(error).__name__


def load_weights(encoder: Encoder, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's tensors into an encoder; positions are interpolated to the encoder's grid.

    Raises CheckpointError naming the tensors that are missing, unexpected or of another shape.
    """
    given = dict(checkpoint.tensors)
    positions, wanted = given.get("pos_embed"), encoder.vit.pos_embed
    if positions is not None and wanted is not None and positions.shape != wanted.shape:
        given["pos_embed"] = _fit_positions(encoder, positions)
    _load(encoder.vit, encoder.architecture.name, given, checkpoint.path)


def _load(
    module: nn.Module, name: str, given: Mapping[str, Tensor], path: Path, *, dropped: tuple[str, ...] = ()
) -> None:
    """dropped: prefixes of tensors that may be left over, beside those of all formats."""
    wanted = module.state_dict()
    dropped += _DROPPED_PREFIXES
    # Some models have a norm in what others only have as classifier: what is wanted is never dropped.
    given = {key: value for key, value in given.items() if key in wanted or not key.startswith(dropped)}
    problems = [f"{key} is missing" for key in wanted if key not in given]
    problems += [f"{key} is unexpected" for key in given if key not in wanted]
    for key in wanted:
        if key not in given:
            continue
        if given[key].shape != wanted[key].shape:
            problems.append(f"{key} has shape {tuple(given[key].shape)} instead of {tuple(wanted[key].shape)}")
        elif given[key].is_floating_point() != wanted[key].is_floating_point():
            problems.append(f"{key} is of type {_dtype(given[key])} instead of {_dtype(wanted[key])}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{path}: does not fit {name}: {'; '.join(problems[:4])}{more}")
    try:
        module.load_state_dict(given)
    except (RuntimeError, TypeError) as error:  # tensors that are sparse, quantised or without data
        raise CheckpointError(f"{path}: its tensors cannot be copied ({_first_line(error)})") from error


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _fit_positions(encoder: Encoder, positions: Tensor) -> Tensor:
    prefix = 0 if encoder.vit.no_embed_class else encoder.num_prefix_tokens
    side = encoder.architecture.image_size // encoder.patch_size
    patches = positions.shape[1] - prefix if positions.ndim == 3 and len(positions) == 1 else 0
    if patches <= 0 or int(patches**0.5) ** 2 != patches or not positions.is_floating_point():
        return positions
    # Rounded to the file's half precision only once.
    positions = positions.float()
    return torch.cat([positions[:, :prefix], resize_positions(positions[:, prefix:], (side, side))], dim=1)


def load_encoder(
    path: str | Path, architecture: Architecture | BackboneArchitecture | None = None
) -> tuple[Encoder | TimmBackbone, dict[str, Any]]:
    """An encoder with a file's weights, and the file's header (empty for foreign files).

    architecture: needed for foreign files; for ours the header's is used unless one is given.
    Raises CheckpointError for a file that is none or does not fit, ConfigError for an image size that does not.
    """
    checkpoint = read_checkpoint(path)
    chosen = architecture or checkpoint.architecture
    if chosen is None:
        raise CheckpointError(f"{checkpoint.path}: does not say its architecture; pass --arch")
    return encoder_from(checkpoint, chosen), checkpoint.header


def encoder_from(checkpoint: Checkpoint, architecture: Architecture | BackboneArchitecture) -> Encoder | TimmBackbone:
    """An encoder of this architecture with a checkpoint's weights; see `load_encoder`."""
    if isinstance(architecture, BackboneArchitecture):
        backbone = TimmBackbone(architecture)
        classifier = tuple(f"{layer}." for layer in classifier_layers(architecture.name))
        _load(backbone.model, architecture.name, checkpoint.tensors, checkpoint.path, dropped=classifier)
        return backbone
    encoder = build_encoder(architecture)
    load_weights(encoder, checkpoint)
    return encoder


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
