"""Description of a weights file, for display and as JSON."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mimref.config.base import ReadingConfig
from mimref.encoders.backbones import EncoderArchitecture
from mimref.encoders.checkpoints import Checkpoint, choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.grids import Grid
from mimref.encoders.parts import show_part


@dataclass(frozen=True)
class TensorOrigin:
    """One tensor of the encoder and where it comes from."""

    name: str
    """timm's name."""
    origin: list[str]
    """The file's names; several if the file stores parts separately."""
    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class Inspection:
    """Description of a file that holds an encoder."""

    file: str
    format: str
    source: str | None
    """Pre-training method, if known."""
    licence: str | None
    architecture: EncoderArchitecture
    prefix: str
    """Prefix of the encoder's names in the file; a dot if they have none."""
    others: list[str]
    """Prefixes of other encoders in the file."""
    grid: Grid
    """Rows and columns of patches that the file has positions for."""
    parameters: int
    tensors: list[TensorOrigin]
    dropped: dict[str, list[str]]
    """Names of the tensors that no encoder needs, by group."""
    notices: list[str]
    guesses_interpolation: bool
    """Whether the rule that interpolates positions is a guess: families with different rules share the layout."""
    header: dict[str, Any]
    """Header of mimref's own files, without the architecture."""


def inspect_file(
    path: str | Path, reading: ReadingConfig | None = None, arch: str | None = None, source: str | None = None
) -> Inspection:
    """Recognise a file without loading its tensors.

    reading: as in `read_checkpoint`. arch, source: as in `choose_architecture`, for files that are not recognised;
    their tensors are loaded, which shows whether they fit. Raises CheckpointError if the file holds no encoder, or
    another one; ConfigError for an `arch` that contradicts the file.
    """
    checkpoint = read_checkpoint(path, reading)
    architecture = choose_architecture(checkpoint, arch, source)
    recognised, format = checkpoint.recognised, "mimref"
    side = architecture.image_size // architecture.patch_size
    tensors = recognised.tensors if recognised else checkpoint.tensors
    origins = recognised.origins if recognised else {name: [name] for name in tensors}
    dropped = recognised.dropped if recognised else {}
    if recognised is not None:
        format = recognised.format
    if architecture != checkpoint.architecture:
        recognised, format = None, f"read as {architecture.name}"
        tensors, origins, dropped = _loaded_as(checkpoint, architecture)
    return Inspection(
        file=str(checkpoint.path),
        format=format,
        source=checkpoint.source,
        licence=checkpoint.licence,
        architecture=architecture,
        prefix=show_part(recognised.prefix) if recognised else ".",
        others=[show_part(prefix) for prefix in recognised.others] if recognised else [],
        grid=recognised.grid if recognised else (side, side),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        tensors=[
            TensorOrigin(
                name, origins[name], list(tensors[name].shape), str(tensors[name].dtype).removeprefix("torch.")
            )
            for name in sorted(tensors, key=_model_order)
        ],
        dropped=dropped,
        notices=[
            *checkpoint.unused_settings(architecture),
            *checkpoint.ignored,
            *(recognised.notices if recognised else []),
        ],
        guesses_interpolation=checkpoint.guesses_interpolation,
        header={key: value for key, value in checkpoint.header.items() if key != "architecture"},
    )


def _loaded_as(
    checkpoint: Checkpoint, architecture: EncoderArchitecture
) -> tuple[dict[str, Tensor], dict[str, list[str]], dict[str, list[str]]]:
    """Return tensors, origins and dropped names of a file whose architecture was named. Raises CheckpointError."""
    tensors: dict[str, Tensor] = encoder_from(checkpoint, architecture).model.state_dict()
    found, _ = checkpoint.selection(tensors)
    names = {id(tensor): name for name, tensor in checkpoint.named.items()}
    # timm's filter of published files may rename, join or convert the others.
    origins = {name: [names[id(found[name])]] if name in found else ["converted by timm"] for name in tensors}
    used = {each for origin in origins.values() for each in origin}
    others = [] if "converted by timm" in used else [name for name in checkpoint.named if name not in used]
    dropped = {"not part of the model": others} if others else {}
    return {name: found.get(name, tensor) for name, tensor in tensors.items()}, origins, dropped


def _model_order(name: str) -> tuple[int, int, str]:
    """Return a sort key in the order of the model: tokens, embeddings, blocks by number, norm."""
    part, number, *_ = (*name.split("."), "")
    order = ("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre", "blocks", part)
    return order.index(part), int(number) if part == "blocks" else 0, name


def by_block(tensors: list[TensorOrigin]) -> list[tuple[str, str, str]]:
    """Return lines of name, origin, and shape with type; blocks that differ only in their number share a line."""
    lines: dict[tuple[str, str, str], list[int]] = {}
    for tensor in tensors:
        number = re.match(r"blocks\.(\d+)\.", tensor.name)
        origin = " + ".join(tensor.origin)
        if number:
            origin = re.sub(rf"(?<![\w]){number[1]}(?![\w])", "*", origin)
        key = re.sub(r"^blocks\.\d+\.", "blocks.*.", tensor.name), origin, f"{tuple(tensor.shape)} {tensor.dtype}"
        lines.setdefault(key, []).append(int(number[1]) if number else -1)
    return [(name.replace("*", _range(numbers)), origin, shape) for (name, origin, shape), numbers in lines.items()]


def _range(numbers: list[int]) -> str:
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))
