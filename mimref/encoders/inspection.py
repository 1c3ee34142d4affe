"""Description of a weights file, for display and as JSON."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimref.config.base import ReadingConfig
from mimref.encoders.backbones import EncoderArchitecture
from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.grids import Grid
from mimref.encoders.likely_models import named_models
from mimref.encoders.parts import show_part
from mimref.errors import CheckpointError


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


def inspect_file(path: str | Path, reading: ReadingConfig | None = None) -> Inspection:
    """Recognise a file without loading its tensors. Raises CheckpointError with the reason if it holds no encoder.

    reading: as in `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path, reading)
    architecture = checkpoint.architecture
    if architecture is None:
        what = "not recognised: " if checkpoint.advice else ""
        models = named_models(checkpoint.named) if checkpoint.advice else ""
        raise CheckpointError(f"{checkpoint.path}: {what}{models or checkpoint.problem}")
    recognised = checkpoint.recognised
    side = architecture.image_size // architecture.patch_size
    tensors = recognised.tensors if recognised else checkpoint.tensors
    origins = recognised.origins if recognised else {name: [name] for name in tensors}
    return Inspection(
        file=str(checkpoint.path),
        format=recognised.format if recognised else "mimref",
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
        dropped=recognised.dropped if recognised else {},
        notices=[*checkpoint.ignored, *(recognised.notices if recognised else [])],
        guesses_interpolation=checkpoint.guesses_interpolation,
        header={key: value for key, value in checkpoint.header.items() if key != "architecture"},
    )


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
