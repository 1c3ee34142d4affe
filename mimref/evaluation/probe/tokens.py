"""Inputs of attentive probes: which tokens of which blocks they read, and whether these fit in the feature cache."""

from collections.abc import Sequence
from dataclasses import dataclass

from mimref.data.sources import Split
from mimref.encoders.backbones import patch_shapes
from mimref.errors import ConfigError
from mimref.evaluation.probe.attentive import TokenShape
from mimref.evaluation.probe.augmented import chosen_blocks
from mimref.evaluation.probe.config import ProbeConfig, ProbeTrainingConfig
from mimref.evaluation.probe.grid import ProbeInput
from mimref.features.cache.partial import DTYPES
from mimref.features.encode import PATCHES, Column
from mimref.features.inputs import EncoderInputs
from mimref.progress import Listener


@dataclass(frozen=True)
class TokenInputs:
    """The inputs of attentive probes."""

    groups: dict[ProbeInput, list[Column]]
    """Columns of every input, side by side: for each block its CLS token, if it is read, then its patches."""
    shapes: list[TokenShape]
    columns: list[Column]
    """Columns of all inputs, once each."""
    numbers: int
    """Values per image in all columns."""


def token_inputs(inputs: EncoderInputs, settings: ProbeTrainingConfig, final_norm: bool) -> TokenInputs:
    """Return the inputs that the settings name. final_norm: apply the encoder's final norm to the last block.

    Raises ConfigError for an encoder without patch tokens, or without the CLS token or the blocks that are named, and
    for numbers of queries that do not divide the width.
    """
    depth = inputs.depth
    if settings.tokens == "cls+patch" and not inputs.has_cls_token:
        name = inputs.architecture.name
        raise ConfigError(f"probe.tokens 'cls+patch': {name} has no CLS token; use probe.tokens='patch'")
    blocks = chosen_blocks(depth, settings.blocks)
    pools = ["patch", "cls+patch"] if settings.tokens == "both" else [settings.tokens]
    if not inputs.has_cls_token:
        pools = ["patch"]
    read = sorted({number for numbers in blocks.values() for number in numbers})
    of_block = block_shapes(inputs, read)
    groups: dict[ProbeInput, list[Column]] = {}
    shapes: list[TokenShape] = []
    for name, members in blocks.items():
        for pool in pools:
            key = ProbeInput(name, pool)
            parts = ["cls", PATCHES] if pool == "cls+patch" else [PATCHES]
            groups[key] = [Column(n, part, final_norm and n == depth) for n in members for part in parts]
            shapes.append(_joined(key, [of_block[n] for n in members], len(parts) - 1, settings.queries))
    columns = list(dict.fromkeys(column for group in groups.values() for column in group))
    numbers = 0
    for column in columns:
        patches, width = of_block[column.block]
        numbers += width * (patches if column.pool == PATCHES else 1)
    return TokenInputs(groups, shapes, columns, numbers)


def block_shapes(inputs: EncoderInputs, blocks: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Return the number of patch tokens and the width of each of these blocks.

    Raises ConfigError for a block with fewer than two patch tokens.
    """
    architecture, size = inputs.architecture, inputs.image_size
    shapes = patch_shapes(architecture, blocks, size)
    for block, (patches, _) in shapes.items():
        if patches < 2:
            number = f"{patches} patch token{'s' * (patches != 1)}"
            raise ConfigError(
                f"probe.kind 'attentive' needs patch tokens: block {block} of {architecture.name} has {number} on "
                f"images of {size} pixels; use probe.kind='linear', or a larger --resolution"
            )
    return shapes


def _joined(key: ProbeInput, blocks: Sequence[tuple[int, int]], cls: int, queries: Sequence[int]) -> TokenShape:
    """Return the shape of several blocks' tokens as one input. cls: CLS tokens per block."""
    counts = sorted({patches for patches, _ in blocks})
    if len(counts) > 1:
        raise ConfigError(
            f"probe.blocks {key.blocks!r}: the blocks have different numbers of patch tokens "
            f"({', '.join(map(str, counts))}); use probe.blocks='last'"
        )
    shape = TokenShape(counts[0] + cls, tuple(width for _, width in blocks))
    for count in queries:
        if shape.width % count:
            fitting = [n for n in range(1, shape.width + 1) if shape.width % n == 0]
            nearest = [n for n in fitting if n < count][-1:] + [n for n in fitting if n > count][:1]
            raise ConfigError(
                f"probe.queries {count} does not divide the width {shape.width} of {key}; choose "
                f"{' or '.join(map(str, nearest))}"
            )
    return shape


def cached_splits(inputs: EncoderInputs, numbers: int, config: ProbeConfig, listener: Listener) -> list[Split]:
    """Return the splits whose tokens are cached: those that fit within the limit `probe.tokens_gb`.

    Training images are cached only along with the validation images, and not when they are augmented. numbers: values
    per image. Notes which images the encoder reads again.
    """
    dtype = "fp32" if config.cache.folder == "off" else config.cache.dtype
    limit_gb = config.probe.tokens_gb
    val_gb, train_gb = (
        len(inputs.source(split)) * numbers * DTYPES[dtype].itemsize / 1e9 for split in ("val", "train")
    )
    if config.cached and val_gb + train_gb <= limit_gb:
        listener.note(f"patch tokens take {val_gb + train_gb:.2g} GB ({dtype}), within probe.tokens_gb={limit_gb:g}")
        return ["train", "val"]
    if config.cached:
        listener.note(
            f"patch tokens would take {val_gb + train_gb:.2g} GB ({dtype}), more than probe.tokens_gb={limit_gb:g}: "
            "the encoder reads the training images in every epoch"
        )
    if val_gb <= limit_gb:
        return ["val"]
    listener.note(
        f"patch tokens of the validation images would take {val_gb:.2g} GB ({dtype}), more than "
        f"probe.tokens_gb={limit_gb:g}: the encoder reads them for scoring"
    )
    return []
