"""Export to the layout in which a family's publisher saves its weights; see `families`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimref.config.base import ReadingConfig
from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone
from mimref.encoders.checkpoints import Checkpoint, choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.export import ENDINGS, Export, comparison_noise, kept_facts, named_features, write_verified
from mimref.encoders.families.publishing import container_of, published_state, publisher_layout
from mimref.encoders.writing import write_safetensors
from mimref.errors import ConfigError
from mimref.files import check_new_file
from mimref.progress import Listener, Silent


def read_backbone(
    path: str | Path,
    reading: ReadingConfig | None = None,
    *,
    arch: str | None = None,
    source: str | None = None,
    resolution: int | None = None,
    listener: Listener | None = None,
) -> tuple[TimmBackbone, dict[str, Any], Checkpoint]:
    """As `read_encoder`, of a file that is no plain vision transformer. Raises ConfigError for one that is."""
    listener = listener or Silent()
    checkpoint = read_checkpoint(path, reading, progress=listener.progress)
    architecture = choose_architecture(checkpoint, arch, source, resolution)
    if not isinstance(architecture, BackboneArchitecture):
        raise ConfigError(
            f"--to publisher: {path} is a plain vision transformer, which --to timm, release and hf write"
        )
    for notice in checkpoint.notices(architecture):
        listener.note(notice)
    architecture = replace(architecture, image_size=resolution or architecture.image_size)
    encoder = encoder_from(checkpoint, architecture)
    assert isinstance(encoder, TimmBackbone)
    return encoder, kept_facts(checkpoint, source, architecture.image_size), checkpoint


def export_publisher(
    encoder: TimmBackbone, out: Path, facts: Mapping[str, Any], *, force: bool = False, listener: Listener | None = None
) -> Export:
    """Write the file that the family's own code loads: its names and shapes, and the buffers that it saves.

    encoder: in fp32 on the CPU. out: ends in .safetensors, whose metadata holds `facts`, or in .pth or .pt without it.
    Mask tokens, decoders and heads are not in the file: the encoder has none. Raises ConfigError for a model of another
    family, OutputError as `export_timm`.
    """
    check_new_file(out, ENDINGS["publisher"], force)
    architecture = encoder.architecture
    layout = publisher_layout(architecture, encoder.model.state_dict())
    if layout is None:
        raise ConfigError(f"--to publisher: the layout of {architecture.name}'s publisher is not known; use --to timm")
    state = published_state(layout, encoder.model)
    listener = listener or Silent()
    listener.note("mask tokens, decoders and heads, which the encoder does not have, are not in the file")
    container = container_of(architecture)

    def write(file: Path) -> None:
        if out.suffix == ".safetensors":
            write_safetensors(file, state, facts)
            return
        torch.save({container: state} if container else state, file)
        if facts:
            listener.note(f"{out.suffix} cannot store {', '.join(facts)}; .safetensors can")

    difference = write_verified(out, lambda _: _features(encoder), write, lambda file: _read(file, encoder), listener)
    return Export(out, difference, _reading_line(out, container))


def _reading_line(out: Path, container: str | None) -> str:
    if out.suffix == ".safetensors":
        return f"model.load_state_dict(safetensors.torch.load_file({str(out)!r}), strict=False)"
    inside = f"[{container!r}]" if container else ""
    return f"model.load_state_dict(torch.load({str(out)!r}){inside}, strict=False)"


@torch.inference_mode()
def _features(encoder: TimmBackbone) -> dict[str, Tensor]:
    blocks = range(1, encoder.depth + 1)
    images = comparison_noise(encoder.architecture.image_size, encoder.architecture.channels)
    *tokens, last = encoder.eval().blocks(images, [*blocks, encoder.depth])
    return named_features(tokens, blocks, last)


def _read(file: Path, encoder: TimmBackbone) -> dict[str, Tensor]:
    """Features of the file, recognised as any foreign checkpoint. Raises ConfigError for one that is not."""
    heads = dict(encoder.architecture.options).get("num_heads")
    checkpoint = read_checkpoint(file, ReadingConfig(num_heads=heads if isinstance(heads, int) else None))
    found = checkpoint.recognised
    if found is None or not isinstance(found.architecture, BackboneArchitecture):
        raise ConfigError(f"--to publisher: the layout does not fit {encoder.architecture.name} ({checkpoint.problem})")
    size, channels = encoder.architecture.image_size, encoder.architecture.channels
    read = encoder_from(checkpoint, replace(found.architecture, image_size=size, channels=channels))
    assert isinstance(read, TimmBackbone)
    return _features(read)
