"""What every export shares: the encoder that is read, and the check of the file that is written.

An export is written elsewhere, read again with the code its users have, and compared with the encoder. Only then does
it get its name. The formats: `export_timm`, `export_release`, `export_onnx`.

Shapes: B images, L tokens, D width, S pixels per side.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.vit import Architecture, Encoder
from mimref.errors import ConfigError, OutputError
from mimref.files import atomic_path
from mimref.progress import Listener, Silent

# Entries of a header that stay true of the weights in any format; `transform` has the normalisation of the images.
_FACTS = ("source", "licence", "preset", "data", "transform")
# Largest difference that passes, as a share of the features' largest magnitude.
_TOLERANCE = 1e-4
# Not the batch size that ONNX is traced with: a size traced as a constant would go unnoticed.
_COMPARED_IMAGES = 3


@dataclass(frozen=True)
class Export:
    """A file that gives the encoder's features when it is read again."""

    path: Path
    difference: float
    """Largest absolute difference of any feature, in fp32."""
    read_with: str
    """A line of Python that reads the file."""
    timm_name: str | None = None
    """The timm model that loads the file; None for other formats, and if timm has no model of these sizes."""


def read_encoder(
    path: str | Path,
    *,
    arch: str | None = None,
    source: str | None = None,
    num_heads: int | None = None,
    resolution: int | None = None,
    listener: Listener | None = None,
) -> tuple[Encoder, dict[str, Any]]:
    """A checkpoint's encoder in fp32 on the CPU, and the facts about it that every export keeps.

    arch, source, num_heads: as in `choose_architecture` and `read_checkpoint`. resolution: pixels per side to
    interpolate positions to. Raises CheckpointError for a file that is no plain vision transformer, ConfigError for
    values that do not fit it.
    """
    listener = listener or Silent()
    checkpoint = read_checkpoint(path, num_heads=num_heads, progress=listener.progress)
    architecture = choose_architecture(checkpoint, arch, source, resolution)
    for notice in checkpoint.notices(architecture):
        listener.note(notice)
    if not isinstance(architecture, Architecture):
        raise ConfigError(f"--arch {arch}: only plain vision transformers can be exported")
    architecture = replace(architecture, image_size=resolution or architecture.image_size)
    encoder = encoder_from(checkpoint, architecture)
    assert isinstance(encoder, Encoder)
    facts = {key: checkpoint.header[key] for key in _FACTS if key in checkpoint.header}
    known = {"source": source or checkpoint.source, "licence": checkpoint.licence}
    if isinstance(facts.get("transform"), dict):
        facts["transform"] = facts["transform"] | {"image_size": architecture.image_size}
    return encoder, facts | {key: value for key, value in known.items() if value}


def write_verified(
    out: Path,
    encoder: Encoder,
    write: Callable[[Path], None],
    read: Callable[[Path], Mapping[str, Tensor]],
    listener: Listener | None,
) -> float:
    """Write `out` once the file gives the encoder's features. Returns their largest difference.

    read: features of a file, as `named_features` names them. The file has its own name in a folder beside `out`:
    readers go by the ending, and ONNX by the name of the file of weights beside it.
    """
    (listener or Silent()).note(f"writing {out}, reading it again and comparing features")
    with (
        atomic_path(out) as temporary,
        TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as folder,
    ):
        file = Path(folder) / out.name
        write(file)
        difference = _largest_difference(out, encoder, read(file))
        if data_file(file).exists():
            with atomic_path(data_file(out)) as temporary_data:
                os.replace(data_file(file), temporary_data)
        os.replace(file, temporary)
    return difference


def data_file(out: Path) -> Path:
    """The file of weights beside a large ONNX file."""
    return out.with_name(f"{out.name}.data")


def plain_state(encoder: Encoder) -> dict[str, Tensor]:
    """The weights as copies: `torch.save` writes all of the memory that a tensor is a part of."""
    return {name: tensor.float().clone() for name, tensor in encoder.vit.state_dict().items()}


def comparison_images(encoder: Encoder) -> Tensor:
    """Noise (B, 3, S, S) that exports are compared on."""
    size = encoder.architecture.image_size
    return torch.randn(_COMPARED_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))


def named_features(tokens: Sequence[Tensor], blocks: Sequence[int], normed: Tensor) -> dict[str, Tensor]:
    """Tokens (B, L, D) as `block_N`, and those of the last block after the final norm as `normed`."""
    return {f"block_{block}": tokens_BLD for block, tokens_BLD in zip(blocks, tokens, strict=True)} | {"normed": normed}


@torch.inference_mode()
def encoder_features(encoder: Encoder, blocks: Sequence[int]) -> dict[str, Tensor]:
    """The encoder's own features; it is put in eval mode. Without a final norm, `normed` is the last block's tokens."""
    tokens = encoder.eval().blocks(comparison_images(encoder), [*blocks, encoder.depth])
    return named_features(tokens[:-1], blocks, encoder.vit.norm(tokens[-1]))


def _largest_difference(out: Path, encoder: Encoder, found: Mapping[str, Tensor]) -> float:
    """Between a file's features and the encoder's. Raises OutputError for more than fp32 explains."""
    wanted = encoder_features(encoder, [int(name.removeprefix("block_")) for name in found if name != "normed"])
    largest = 0.0
    for name, tokens_BLD in found.items():
        if tokens_BLD.shape != wanted[name].shape:
            shapes = f"{tuple(tokens_BLD.shape)} instead of {tuple(wanted[name].shape)}"
            raise OutputError(f"--out {out}: not written: read again, {name} has shape {shapes}")
        difference = float((tokens_BLD - wanted[name]).abs().max())
        magnitude = float(wanted[name].abs().max())
        if not difference <= _TOLERANCE * magnitude:  # NaN fails too
            raise OutputError(
                f"--out {out}: not written: read again, {name} differs by {difference:.2g} from the encoder's "
                f"features of up to {magnitude:.2g}"
            )
        largest = max(largest, difference)
    return largest
