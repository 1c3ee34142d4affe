"""Encoders from weights files, and our own files, which others (timm) read as well.

`reading` says what a file holds, `formats` what it is.
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
from mimref.encoders.backbones import (
    BackboneArchitecture,
    TimmBackbone,
    classifier_layers,
    find_architecture,
    native_size,
)
from mimref.encoders.formats import Recognised, Unrecognised, recognise, shortened
from mimref.encoders.published import PublishedWeights, find_published
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
from mimref.files import atomic_write
from mimref.progress import LabelledProgress

# Parts of timm's checkpoints that are not the encoder.
_DROPPED_PREFIXES = ("decoder_", "decoder.", "mask_token", "head.")
_WRAPPERS = ("model", "state_dict")
_TIMM = "timm:"


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read from a file, by the file's names, and what is known about them."""

    path: Path
    tensors: dict[str, Tensor]
    """In the file's own types, mapped into memory where the format allows it."""
    header: dict[str, Any] = field(default_factory=dict)
    """Of our own files; empty for foreign ones."""
    recognised: Recognised | None = None
    """A foreign file as a plain vision transformer."""
    problem: str = ""
    """Why a foreign file is not recognised."""
    published: PublishedWeights | None = None
    """The published weights that were asked for by name."""

    @property
    def architecture(self) -> Architecture | None:
        """From the header, or as recognised; None where neither tells. Raises CheckpointError for a damaged header."""
        if self.recognised:
            return self.recognised.architecture
        if "architecture" not in self.header:
            return None
        try:
            return Architecture.from_dict(self.header["architecture"])
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: damaged header ({error})") from error

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names and bytes of the file's tensors, whatever the file is called. Reads them all."""
        return _digest(self.tensors)

    @property
    def source(self) -> str | None:
        """Pre-training method, by the name asked for, the header, or as recognised; None where nothing tells."""
        if self.published:
            return self.published.source
        source = self.recognised.source if self.recognised else self.header.get("source")
        return source if isinstance(source, str) else None

    def notices(self, architecture: Architecture | BackboneArchitecture) -> list[str]:
        """What was assumed or changed to read the file as this architecture, a line each with the file's name."""
        if not self.recognised or isinstance(architecture, BackboneArchitecture) or architecture.from_timm:
            return []
        return [f"{self.path}: {notice}" for notice in self.recognised.notices]

    @property
    def licence(self) -> str | None:
        """Of published weights or by the header; a layout does not tell who trained the weights."""
        licence = self.published.licence if self.published else self.header.get("licence")
        return licence if isinstance(licence, str) else None


def read_checkpoint(
    path: str | Path, *, num_heads: int | None = None, progress: LabelledProgress | None = None
) -> Checkpoint:
    """Read `path`, the output folder of a run, published weights by name, or `quickstart` for the packaged encoder.

    num_heads: attention heads of a foreign file, which its weights do not tell; None asks the published sizes.
    progress: told of a download.
    Raises CheckpointError with one line for a missing, damaged or foreign file.
    """
    if isinstance(path, str) and path.startswith(_TIMM):
        return _from_timm(path)
    file = read_file(path, progress)
    published = find_published(str(path)) if not Path(path).exists() else None
    content = file.content
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    own = Checkpoint(file.path, dict(named_tensors(content)), file.header)
    if own.architecture:  # a damaged one is found here, before any work
        return own
    try:
        return replace(own, recognised=recognise(file.content, num_heads=num_heads), published=published)
    except Unrecognised as reason:
        return replace(own, problem=str(reason))


def _from_timm(path: str) -> Checkpoint:
    """`timm:NAME`: a plain vision transformer with the weights that timm fetches for it."""
    name = path.removeprefix(_TIMM)
    if not is_plain_vit(name):
        raise CheckpointError(f"{path}: not a plain vision transformer; give its file, and its name by --arch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's client has many ways to fail
        raise CheckpointError(
            f"{path}: timm cannot fetch its weights ({first_line(error)}); give the file of its weights"
        ) from error
    config = EncoderConfig(arch=name, image_size=native_size(name))
    tensors = dict(model.state_dict())
    architecture = with_fixed_positions(Architecture.from_config(config), tensors)
    return Checkpoint(Path(path), tensors, {"architecture": architecture.to_dict(), "source": "timm"})


def with_fixed_positions(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Architecture:
    """The architecture of a timm model with MAE's sin-cos positions fixed, which are never trained."""
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return architecture
    return replace(architecture, fixed_positions=any(are_sincos(positions, num_prefix=prefix) for prefix in (0, 1)))


def load_weights(encoder: Encoder, checkpoint: Checkpoint, *, share: bool = False) -> None:
    """Give an encoder a checkpoint's weights; positions are interpolated to the encoder's grid.

    share: let the encoder have the checkpoint's memory, which costs none, instead of a copy.
    Raises CheckpointError naming the tensors that are missing, unexpected or of another shape.
    """
    given = dict(checkpoint.tensors)
    # timm's own models may want what no plain encoder has.
    by_timm = encoder.architecture.from_timm and given.keys() >= encoder.vit.state_dict().keys()
    if checkpoint.recognised and not by_timm:
        given = dict(checkpoint.recognised.tensors)
    positions, wanted = given.get("pos_embed"), encoder.vit.pos_embed
    if positions is not None and wanted is not None and positions.shape != wanted.shape:
        given["pos_embed"] = _fit_positions(encoder, positions)
    _load(encoder.vit, encoder.architecture.name, given, checkpoint.path, share=share)


def _load(
    module: nn.Module,
    name: str,
    given: Mapping[str, Tensor],
    path: Path,
    *,
    share: bool = False,
    dropped: tuple[str, ...] = (),
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
        elif given[key].layout is not torch.strided or given[key].is_meta:
            problems.append(f"{key} is sparse or without data")
        elif given[key].is_floating_point() != wanted[key].is_floating_point():
            problems.append(f"{key} is of type {_dtype(given[key])} instead of {_dtype(wanted[key])}")
    if problems:
        raise CheckpointError(f"{path}: does not fit {name}: {shortened(problems)}")
    try:
        fitting = {key: given[key].to(wanted[key].dtype) for key in wanted}
        if not share:
            fitting = {key: value.clone() if value is given[key] else value for key, value in fitting.items()}
        # Assigned, so that a module on the meta device gets its memory here, and only once.
        module.load_state_dict(fitting, assign=True)
    except (RuntimeError, TypeError) as error:  # tensors that are sparse, quantised or without data
        raise CheckpointError(f"{path}: its tensors cannot be copied ({first_line(error)})") from error


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

    architecture: needed for files that are not recognised; else what the file says, unless one is given.
    Raises CheckpointError for a file that is none or does not fit, ConfigError for an image size that does not.
    """
    checkpoint = read_checkpoint(path)
    return encoder_from(checkpoint, architecture or choose_architecture(checkpoint)), checkpoint.header


def choose_architecture(
    checkpoint: Checkpoint, arch: str | None = None, source: str | None = None, resolution: int | None = None
) -> Architecture | BackboneArchitecture:
    """What a checkpoint says it is; what `--arch` and `--source` name for one that does not say, or for a timm model.

    resolution: pixels of the images it will see; None is its own size.
    Raises CheckpointError when nothing tells, ConfigError for an `arch` that contradicts the checkpoint, or a
    resolution that cannot be cut into patches.
    """
    chosen = _choose(checkpoint, arch, source, resolution)
    if isinstance(chosen, Architecture):
        chosen.check_size(resolution or chosen.image_size, "--resolution" if resolution else "encoder.image_size")
    return chosen


def _choose(
    checkpoint: Checkpoint, arch: str | None, source: str | None, resolution: int | None
) -> Architecture | BackboneArchitecture:
    recorded = checkpoint.architecture
    if arch is None:
        if recorded is None:
            raise CheckpointError(f"{checkpoint.path}: {checkpoint.problem}; pass --arch (and --source)")
        return recorded
    # A file of a timm model may look like that of a plain vision transformer and still be another.
    if recorded is None or (checkpoint.recognised and arch not in PAPER_SIZES):
        return find_architecture(arch, source, resolution)
    if arch != recorded.name:
        raise ConfigError(f"--arch {arch}: {checkpoint.path} says that it is {recorded.name}; leave --arch out")
    return recorded


def encoder_from(checkpoint: Checkpoint, architecture: Architecture | BackboneArchitecture) -> Encoder | TimmBackbone:
    """An encoder of this architecture with a checkpoint's weights, whose memory it shares.

    Raises CheckpointError for weights that do not fit it.
    """
    if isinstance(architecture, BackboneArchitecture):
        backbone = TimmBackbone(architecture)
        classifier = tuple(f"{layer}." for layer in classifier_layers(architecture.name))
        _load(backbone.model, architecture.name, checkpoint.tensors, checkpoint.path, dropped=classifier)
        return backbone
    with torch.device("meta"):
        encoder = build_encoder(architecture)
    load_weights(encoder, checkpoint, share=True)
    return encoder


def weights_hash(encoder: Encoder) -> str:
    """SHA-256 over an encoder's tensors: tells whether two runs started from the same weights."""
    return _digest(encoder.vit.state_dict())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
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
