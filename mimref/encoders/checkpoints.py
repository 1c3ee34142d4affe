"""Encoders from weights files, and the files that we write, which timm reads too.

From a file to an encoder: `read_checkpoint` reads and recognises it, `choose_architecture` settles the sizes,
`encoder_from` builds the encoder. `reading` opens files, `formats` recognises foreign ones.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from mimref.config.run import EncoderConfig
from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone, find_architecture, native_size, timm_record
from mimref.encoders.formats import Recognised, Unrecognised, mismatches, recognise
from mimref.encoders.published import find_published
from mimref.encoders.reading import first_line, named_tensors, read_file
from mimref.encoders.vit import (
    PAPER_SIZES,
    Architecture,
    Encoder,
    are_sincos,
    build_encoder,
    is_plain_vit,
    resize_positions,
)
from mimref.errors import CheckpointError, ConfigError
from mimref.files import write_bytes
from mimref.progress import LabelledProgress

# Parts of timm's checkpoints that do not belong to the encoder.
_DROPPED_PREFIXES = ("decoder_", "decoder.", "mask_token", "head.")
_TIMM = "timm:"


@dataclass(frozen=True)
class Checkpoint:
    """A file's weights under the file's names, and what is known about them."""

    path: Path
    tensors: dict[str, Tensor]
    """In the file's own types, mapped into memory where the format allows it."""
    header: dict[str, Any] = field(default_factory=dict)
    """Of our own files; empty for foreign ones."""
    architecture: Architecture | None = None
    """From the header, or as recognised; None when unknown."""
    source: str | None = None
    """Pre-training method: of published weights by name, as recognised, or from the header; None when unknown."""
    licence: str | None = None
    """Of published weights by name, or from the header: a layout does not reveal who trained the weights."""
    recognised: Recognised | None = None
    """A foreign file as a plain vision transformer."""
    problem: str = ""
    """Why a foreign file is not recognised."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tensors' names and bytes, independent of the file's name. Reads every tensor."""
        return _digest(self.tensors)

    def notices(self, architecture: Architecture | BackboneArchitecture) -> list[str]:
        """What was assumed or changed to read the file as this architecture, one line each with the file's name."""
        if not self.recognised or isinstance(architecture, BackboneArchitecture) or architecture.from_timm:
            return []
        return [f"{self.path}: {notice}" for notice in self.recognised.notices]


def read_checkpoint(
    path: str | Path, *, num_heads: int | None = None, progress: LabelledProgress | None = None
) -> Checkpoint:
    """Read a weights file, a run's output folder, published weights or `timm:NAME` by name, or `quickstart`.

    num_heads: attention heads of a foreign file; None infers them from the width. progress: of a download.
    Raises CheckpointError with one line for a missing or damaged file.
    """
    if isinstance(path, str) and path.startswith(_TIMM):
        return _from_timm(path)
    file, content, header = read_file(path, progress)
    weights = content
    for wrapper in ("model", "state_dict"):
        if isinstance(weights.get(wrapper), Mapping):
            weights = weights[wrapper]
    source, licence = (value if isinstance(value := header.get(key), str) else None for key in ("source", "licence"))
    checkpoint = Checkpoint(file, dict(named_tensors(weights)), header, source=source, licence=licence)
    if "architecture" in header:
        try:
            return replace(checkpoint, architecture=Architecture.from_dict(header["architecture"]))
        except ConfigError as error:
            raise CheckpointError(f"{file}: damaged header ({error})") from error
    try:
        found = recognise(content, num_heads=num_heads)
    except Unrecognised as reason:
        return replace(checkpoint, problem=str(reason))
    published = None if Path(path).exists() else find_published(str(path))
    source, licence = (published.source, published.licence) if published else (found.source, licence)
    return replace(checkpoint, architecture=found.architecture, source=source, licence=licence, recognised=found)


def _from_timm(path: str) -> Checkpoint:
    """`timm:NAME`: a plain vision transformer with the weights that timm downloads for it."""
    name = path.removeprefix(_TIMM)
    if not is_plain_vit(name):
        raise CheckpointError(
            f"{path}: not a plain vision transformer, so it needs a file; evaluations read it with --arch {name}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's client fails in many ways
        raise CheckpointError(
            f"{path}: timm cannot fetch it ({first_line(error)}); pass the weights as a file"
        ) from error
    config = EncoderConfig(arch=name, image_size=native_size(name))
    tensors = dict(model.state_dict())
    architecture = with_fixed_positions(Architecture.from_config(config), tensors)
    header = {"architecture": architecture.to_dict(), "source": "timm"}
    return Checkpoint(Path(path), tensors, header, architecture, source="timm")


def with_fixed_positions(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Architecture:
    """The architecture of a timm model, with positions fixed when they are MAE's sin-cos ones, which never train."""
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return architecture
    return replace(architecture, fixed_positions=any(are_sincos(positions, num_prefix=prefix) for prefix in (0, 1)))


def choose_architecture(
    checkpoint: Checkpoint, arch: str | None = None, source: str | None = None, resolution: int | None = None
) -> Architecture | BackboneArchitecture:
    """The checkpoint's own architecture; the one of `--arch` and `--source` for timm models and unrecognised files.

    resolution: pixels of the images it will see; None is its own size. Raises CheckpointError if the architecture is
    unknown, ConfigError for an `arch` that contradicts the checkpoint or a resolution that patches do not divide.
    """
    recorded = checkpoint.architecture
    chosen: Architecture | BackboneArchitecture
    # The file of a timm model may look like a plain vision transformer of another kind.
    if arch is not None and (recorded is None or (checkpoint.recognised and arch not in PAPER_SIZES)):
        chosen = find_architecture(arch, source, resolution)
    elif recorded is None:
        raise CheckpointError(f"{checkpoint.path}: {checkpoint.problem}; pass --arch (and --source)")
    elif arch in (None, recorded.name):
        chosen = recorded
    else:
        raise ConfigError(f"--arch {arch}: {checkpoint.path} contains {recorded.name}; omit --arch")
    if isinstance(chosen, Architecture):
        chosen.check_size(resolution or chosen.image_size, "--resolution" if resolution else "image_size")
    return chosen


def encoder_from(checkpoint: Checkpoint, architecture: Architecture | BackboneArchitecture) -> Encoder | TimmBackbone:
    """An encoder with a checkpoint's weights, whose memory it may share. Raises CheckpointError if they do not fit."""
    if isinstance(architecture, BackboneArchitecture):
        backbone = TimmBackbone(architecture)
        layers = timm_record(architecture.name).classifier or ()
        dropped = tuple(f"{layer}." for layer in ([layers] if isinstance(layers, str) else layers))
        _load(backbone.model, architecture.name, checkpoint.tensors, checkpoint.path, share=True, dropped=dropped)
        return backbone
    with torch.device("meta"):
        encoder = build_encoder(architecture)
    load_weights(encoder, checkpoint, share=True)
    return encoder


def load_weights(encoder: Encoder, checkpoint: Checkpoint, *, share: bool = False) -> None:
    """Load a checkpoint's weights, with positions interpolated to the encoder's grid.

    share: use the checkpoint's memory instead of a copy. Raises CheckpointError naming the tensors that do not fit.
    """
    given = checkpoint.tensors
    # timm's own models may need tensors that no plain encoder has.
    by_timm = encoder.architecture.from_timm and given.keys() >= encoder.vit.state_dict().keys()
    if checkpoint.recognised and not by_timm:
        given = checkpoint.recognised.tensors
    positions, wanted = given.get("pos_embed"), encoder.vit.pos_embed
    if positions is not None and wanted is not None and positions.shape != wanted.shape:
        given = given | {"pos_embed": _fit_positions(encoder, positions)}
    _load(encoder.vit, encoder.architecture.name, given, checkpoint.path, share=share)


def _fit_positions(encoder: Encoder, positions: Tensor) -> Tensor:
    """Positions interpolated to the encoder's grid; as they are where they form no square of patches."""
    prefix = 0 if encoder.vit.no_embed_class else encoder.num_prefix_tokens
    side = encoder.architecture.image_size // encoder.patch_size
    patches = positions.shape[1] - prefix if positions.ndim == 3 and len(positions) == 1 else 0
    if patches <= 0 or int(patches**0.5) ** 2 != patches or not positions.is_floating_point():
        return positions
    # In float32, so that a file in half precision is rounded only once.
    positions = positions.float()
    return torch.cat([positions[:, :prefix], resize_positions(positions[:, prefix:], (side, side))], dim=1)


def _load(
    module: nn.Module,
    name: str,
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    share: bool,
    dropped: tuple[str, ...] = (),
) -> None:
    """dropped: prefixes of further tensors that may be left over."""
    wanted = module.state_dict()
    # What the model needs is never dropped: some have a norm where others have a classifier.
    given = {key: tensors[key] for key in tensors if key in wanted or not key.startswith(_DROPPED_PREFIXES + dropped)}
    if problems := mismatches(given, wanted):
        raise CheckpointError(f"{path}: does not fit {name}: {problems}")
    try:
        fitting = {key: given[key].to(wanted[key].dtype) for key in wanted}
        if not share:
            fitting = {key: value.clone() if value is given[key] else value for key, value in fitting.items()}
        # Assigned, so that a module on the meta device gets its memory here, and only once.
        module.load_state_dict(fitting, assign=True)
    except (RuntimeError, TypeError) as error:  # sparse or quantised tensors, or tensors without data
        raise CheckpointError(f"{path}: its tensors cannot be loaded ({first_line(error)})") from error


def save_encoder(
    path: Path, encoder: Encoder, header: Mapping[str, Any], *, dtype: torch.dtype = torch.float32
) -> None:
    """Write an encoder atomically as safetensors under timm's names; the architecture is added to `header`."""
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in encoder.vit.state_dict().items()}
    described = {"architecture": encoder.architecture.to_dict(), **header}
    write_bytes(path, save(tensors, metadata={"mimref": json.dumps(described), "format": "pt"}))


def weights_hash(encoder: Encoder) -> str:
    """SHA-256 of an encoder's tensors, to see whether two runs start from the same weights."""
    return _digest(encoder.vit.state_dict())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
