"""Export to the layout in which a family's publisher saves its weights; see `families`."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimref.config.base import ReadingConfig
from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone, TokenEncoder
from mimref.encoders.checkpoints import encoder_from, read_checkpoint
from mimref.encoders.export import ENDINGS, Export, note_lost, write_verified
from mimref.encoders.export_backbone import own_features
from mimref.encoders.families.publishing import container_of, published_state, publisher_layout
from mimref.encoders.writing import write_safetensors
from mimref.errors import ConfigError
from mimref.files import check_new_file
from mimref.progress import Listener, Silent


def export_publisher(
    encoder: TokenEncoder, out: Path, facts: Mapping[str, Any], *, force: bool = False, listener: Listener | None = None
) -> Export:
    """Write a file that the family's own code loads, with its names and shapes and the buffers that it saves.

    encoder: in fp32 on the CPU. out: ends in .safetensors, whose metadata holds `facts`, or in .pth or .pt without it.
    Mask tokens, decoders and heads are not in the file: the encoder has none. Raises ConfigError for a plain vision
    transformer, a model of another family and images without 3 channels, OutputError as in `export_timm`.
    """
    check_new_file(out, ENDINGS["publisher"], force)
    if not isinstance(encoder, TimmBackbone):
        raise ConfigError(
            f"--to publisher: {encoder.architecture.name} is a plain vision transformer; use --to timm, release or hf"
        )
    architecture = encoder.architecture
    layout = publisher_layout(architecture, encoder.model.state_dict())
    if layout is None:
        raise ConfigError(f"--to publisher: the layout of {architecture.name}'s publisher is not known; use --to timm")
    if architecture.channels != 3:
        raise ConfigError(
            f"--to publisher: publishers' code takes images of 3 channels, this encoder of {architecture.channels}; "
            "use --to timm"
        )
    state = published_state(layout, encoder.model)
    listener = listener or Silent()
    listener.note("mask tokens, decoders and heads, which the encoder does not have, are not in the file")
    container = container_of(architecture)

    def write(file: Path) -> None:
        if out.suffix == ".safetensors":
            write_safetensors(file, state, facts)
            return
        torch.save({container: state} if container else state, file)
        note_lost(out, facts, listener)

    read = partial(_read, encoder=encoder)
    difference = write_verified(out, partial(own_features, encoder), write, read, listener)
    return Export(out, difference, _reading_line(out, container))


def _reading_line(out: Path, container: str | None) -> str:
    if out.suffix == ".safetensors":
        return f"model.load_state_dict(safetensors.torch.load_file({str(out)!r}), strict=False)"
    inside = f"[{container!r}]" if container else ""
    return f"model.load_state_dict(torch.load({str(out)!r}){inside}, strict=False)"


def _read(file: Path, encoder: TimmBackbone) -> dict[str, Tensor]:
    """Return the file's features, read as any foreign checkpoint. Raises ConfigError if it is not recognised."""
    heads = dict(encoder.architecture.options).get("num_heads")
    checkpoint = read_checkpoint(file, ReadingConfig(num_heads=heads if isinstance(heads, int) else None))
    found = checkpoint.recognised
    if found is None or not isinstance(found.architecture, BackboneArchitecture):
        raise ConfigError(f"--to publisher: the layout does not fit {encoder.architecture.name} ({checkpoint.problem})")
    read = encoder_from(checkpoint, replace(found.architecture, image_size=encoder.architecture.image_size))
    assert isinstance(read, TimmBackbone)
    return own_features(read, [f"block_{block}" for block in range(1, read.depth + 1)])
