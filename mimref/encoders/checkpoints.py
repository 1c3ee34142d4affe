"""Encoders from weights files, and files of weights that mimref writes, which timm reads too.

From a file to an encoder: `read_checkpoint` reads and recognises the file, `choose_architecture` determines the sizes,
`encoder_from` builds the encoder. The module `reading` opens files, `formats` recognises foreign ones.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mimref.config.base import ReadingConfig
from mimref.encoders.backbones import (
    BackboneArchitecture,
    EncoderArchitecture,
    TimmBackbone,
    TokenEncoder,
    architecture_from,
    find_architecture,
)
from mimref.encoders.channels import ChannelRule, first_channels, fit_channels, for_images
from mimref.encoders.fitting import tensors_of_model, without_unneeded
from mimref.encoders.folders import saved_config, saved_normalisation, shard_hint
from mimref.encoders.formats import clean_names, mismatches, recognise
from mimref.encoders.layouts import INTERPOLATIONS
from mimref.encoders.likely_models import read_model, unrecognised
from mimref.encoders.parts import NoChoice, Unrecognised
from mimref.encoders.positions import fit_positions
from mimref.encoders.published import find_named
from mimref.encoders.reading import first_line, named_tensors, read_file
from mimref.encoders.timm_models import classifiers, normalisation
from mimref.encoders.vit import PAPER_SIZES, Architecture, Encoder, build_encoder, is_plain_vit, with_fixed_positions
from mimref.encoders.weights import Checkpoint as Checkpoint
from mimref.encoders.writing import write_safetensors
from mimref.errors import CheckpointError, ConfigError
from mimref.progress import LabelledProgress

_TIMM = "timm:"


def read_checkpoint(
    path: str | Path, reading: ReadingConfig | None = None, *, progress: LabelledProgress | None = None
) -> Checkpoint:
    """Read a weights file, a run's or `save_pretrained`'s folder, published or packaged weights, or `timm:NAME`.

    reading: what the file does not record; for mimref's own files, only interpolation and channels apply. progress: of
    a download. Raises CheckpointError with one line for a missing or damaged file; `problem` reports a missing `part`.
    """
    reading = reading or ReadingConfig()
    colors = None if reading.color_channels is None else tuple(reading.color_channels)
    rule = ChannelRule(reading.channel_init or "repeat", colors)
    checkpoint = _with_normalisation(_read(path, reading, progress))
    checkpoint = replace(checkpoint, part=reading.part, grid=reading.grid, channel_rule=rule)
    if reading.interpolation is None:
        return checkpoint
    architecture = checkpoint.architecture
    if isinstance(architecture, Architecture):
        architecture = replace(architecture, interpolation=reading.interpolation)
    return replace(checkpoint, architecture=architecture, interpolation=reading.interpolation)


def _read(path: str | Path, reading: ReadingConfig, progress: LabelledProgress | None) -> Checkpoint:
    if isinstance(path, str) and path.startswith(_TIMM):
        return _from_timm(path)
    file, content, header, ignored = read_file(path, progress)
    weights = content
    for wrapper in ("model", "state_dict"):
        if isinstance(weights.get(wrapper), Mapping):
            weights = weights[wrapper]
    source, licence = (value if isinstance(value := header.get(key), str) else None for key in ("source", "licence"))
    tensors = dict(named_tensors(weights))
    checkpoint = Checkpoint(file, tensors, header, source=source, licence=licence, ignored=ignored)
    if "architecture" in header:
        try:
            return replace(checkpoint, architecture=architecture_from(header["architecture"]))
        except ConfigError as error:
            raise CheckpointError(f"{file}: damaged header ({error})") from error
    config, other = read_model(saved_config(file))
    try:
        checkpoint = replace(checkpoint, named=clean_names(content)[0])
        found = recognise(content, reading, config=config)
        if other and isinstance(found.architecture, Architecture):
            raise Unrecognised(f"is timm's {other}, as config.json says, and no plain vision transformer")
    except NoChoice as reason:
        return replace(checkpoint, problem=str(reason))
    except Unrecognised as reason:
        hint = shard_hint(file)
        advice = "" if hint else f"; pass --arch {other or '(and --source)'}"
        return replace(checkpoint, problem=f"{reason}{hint}", advice=advice)
    architecture, source = found.architecture, found.source
    if published := find_named(path):
        source, licence = published.source, published.licence
        if found.guesses_interpolation and isinstance(architecture, Architecture):
            architecture = replace(architecture, interpolation=INTERPOLATIONS.get(source, "mae"))
    return replace(checkpoint, architecture=architecture, source=source, licence=licence, recognised=found)


def _with_normalisation(checkpoint: Checkpoint) -> Checkpoint:
    """Return a foreign checkpoint with the normalisation in the files beside it, otherwise with its publisher's."""
    if checkpoint.header.keys() & {"architecture", "transform"}:
        return checkpoint
    found = checkpoint.recognised
    channels = first_channels(checkpoint.tensors) if found is None else found.architecture.channels
    if saved := saved_normalisation(checkpoint.path, channels):
        notice = "mean and deviation of the pixels are taken from the configuration beside the file"
        header = checkpoint.header | {"transform": saved}
        return replace(checkpoint, header=header, ignored=[*checkpoint.ignored, notice])
    if found and found.normalisation:
        return replace(checkpoint, header=checkpoint.header | {"transform": found.normalisation | {"assumed": True}})
    return checkpoint


def _from_timm(path: str) -> Checkpoint:
    """Read `timm:NAME`, a model with the weights that timm downloads for it."""
    name = path.removeprefix(_TIMM)
    is_plain_vit(name)  # raises ConfigError if timm lacks it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's client raises many kinds of errors
        raise CheckpointError(
            f"{path}: timm cannot fetch it ({first_line(error)}); pass the weights as a file"
        ) from error
    tensors, architecture = dict(model.state_dict()), find_architecture(name, None, None)
    if isinstance(architecture, Architecture):
        architecture = with_fixed_positions(architecture, tensors)
    header = {"architecture": architecture.to_dict(), "source": "timm", "transform": normalisation(name)}
    return Checkpoint(Path(path), tensors, header, architecture, source="timm")


def with_file_values(architecture: Architecture, checkpoint: Checkpoint) -> Architecture:
    """Return a timm model's architecture with the channels and the LayerNorm epsilon of the file's encoder."""
    found = checkpoint.recognised and checkpoint.recognised.architecture
    if not isinstance(found, Architecture):
        return architecture
    return replace(architecture, channels=found.channels, norm_eps=found.norm_eps)


def choose_architecture(
    checkpoint: Checkpoint, arch: str | None = None, source: str | None = None, resolution: int | None = None
) -> EncoderArchitecture:
    """Return the checkpoint's own architecture, or that of `--arch` and `--source` for timm models and unknown files.

    Its channels are those of the weights. resolution: image size in pixels per side; None means its own. Raises
    CheckpointError if the architecture is unknown, ConfigError for an `arch` that contradicts the checkpoint or a
    resolution that is not divisible by the patch size.
    """
    recorded = checkpoint.architecture
    chosen: EncoderArchitecture
    # The file of a timm model may look like a plain vision transformer of another kind.
    if arch is not None and (recorded is None or (checkpoint.recognised and arch not in (*PAPER_SIZES, recorded.name))):
        chosen = find_architecture(arch, source, resolution)
        if isinstance(chosen, Architecture):
            chosen = with_file_values(chosen, checkpoint)
        chosen = for_images(chosen, checkpoint.channels_as(arch))
    elif recorded is None:
        raise unrecognised(checkpoint.path, checkpoint.problem, checkpoint.advice, checkpoint.named)
    elif arch in (None, recorded.name):
        chosen = recorded
    else:
        raise ConfigError(f"--arch {arch}: {checkpoint.path} contains {recorded.name}; omit --arch")
    if isinstance(chosen, Architecture) and checkpoint.interpolation:
        chosen = replace(chosen, interpolation=checkpoint.interpolation)
    if isinstance(chosen, Architecture) or chosen is recorded:
        chosen.check_size(resolution or chosen.image_size, "--resolution" if resolution else "image_size")
    return chosen


def encoder_from(checkpoint: Checkpoint, architecture: EncoderArchitecture, *, share: bool = True) -> TokenEncoder:
    """Build an encoder with a checkpoint's weights. Raises CheckpointError if they do not fit.

    share: use the checkpoint's memory instead of a copy.
    """
    if isinstance(architecture, BackboneArchitecture):
        backbone = TimmBackbone(architecture)
        dropped = classifiers(architecture.name)
        given = _timm_tensors(checkpoint, architecture, backbone.model, dropped)
        given = fit_channels(given, backbone.model.state_dict(), architecture.channels, checkpoint.channel_rule)
        _load(backbone.model, architecture.name, given, checkpoint.path, share=share, dropped=dropped)
        return backbone
    with torch.device("meta"):
        encoder = build_encoder(architecture)
    load_weights(encoder, checkpoint, share=share)
    return encoder


def load_weights(encoder: Encoder, checkpoint: Checkpoint, *, share: bool = False) -> None:
    """Load a checkpoint's weights, with positions interpolated to the encoder's grid.

    share: use the checkpoint's memory instead of a copy. Raises CheckpointError naming the tensors that do not fit.
    """
    given = _tensors_for(encoder, checkpoint)
    positions, wanted = given.get("pos_embed"), encoder.vit.pos_embed
    if positions is not None and wanted is not None and positions.shape != wanted.shape:
        num_prefix = 0 if encoder.vit.no_embed_class else encoder.num_prefix_tokens
        side = encoder.architecture.image_size // encoder.patch_size
        fitting = fit_positions(positions, num_prefix, side, encoder.architecture.interpolation)
        given = {**given, "pos_embed": fitting}
    given = fit_channels(given, encoder.vit.state_dict(), encoder.architecture.channels, checkpoint.channel_rule)
    _load(encoder.vit, encoder.architecture.name, given, checkpoint.path, share=share)


def _tensors_for(encoder: Encoder, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Return a file's tensors under the encoder's names."""
    if "architecture" in checkpoint.header:
        return checkpoint.tensors
    wanted = encoder.vit.state_dict()
    if encoder.architecture.from_timm:
        # timm's own models may need tensors that no plain encoder has.
        selected, _ = checkpoint.selection(wanted)
        if selected.keys() >= wanted.keys():
            return selected
    if checkpoint.recognised:
        return checkpoint.recognised.tensors
    if encoder.architecture.from_timm:
        return _timm_tensors(checkpoint, encoder.architecture, encoder.vit, ())
    return checkpoint.selection(wanted)[0]


def _timm_tensors(
    checkpoint: Checkpoint, architecture: EncoderArchitecture, model: nn.Module, dropped: tuple[str, ...]
) -> Mapping[str, Tensor]:
    """Return a file's tensors under a timm model's names, if necessary through timm's filter of published files."""
    selected, everything = checkpoint.tensors, checkpoint.tensors
    if checkpoint.recognised and checkpoint.recognised.is_of(architecture):
        selected = everything = checkpoint.recognised.tensors
    elif "architecture" not in checkpoint.header:
        selected, _ = checkpoint.selection(model.state_dict())
    return tensors_of_model(architecture.name, model, selected, everything, dropped)


def _load(
    module: nn.Module,
    name: str,
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    share: bool,
    dropped: tuple[str, ...] = (),
) -> None:
    """Load tensors into a module. dropped: prefixes of further tensors that may be left over."""
    wanted = module.state_dict()
    given = without_unneeded(tensors, wanted, dropped)
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
    path: Path, encoder: TokenEncoder, header: Mapping[str, Any], *, dtype: torch.dtype = torch.float32
) -> None:
    """Write an encoder atomically as safetensors under timm's names; the architecture is added to `header`."""
    state = encoder.model.state_dict()
    # BatchNorm counts its batches in integers.
    tensors = {name: (x.to(dtype) if x.is_floating_point() else x).contiguous() for name, x in state.items()}
    described = {"architecture": encoder.architecture.to_dict(), **header}
    write_safetensors(path, tensors, described)
