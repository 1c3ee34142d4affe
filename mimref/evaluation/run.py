"""Evaluations from a config to rows: find what cannot work before the encoder runs, then apply a protocol.

In a process group all ranks share the passes of the encoder, and k-NN's search. All else is then rank 0's own work; the
other ranks' results have no rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mimref.config.base import DataConfig
from mimref.data.sources import Split
from mimref.errors import ConfigError
from mimref.evaluation.metrics import check_classes, class_indices
from mimref.features.config import EvaluationConfig
from mimref.features.encode import Column, block_groups, columns_of
from mimref.features.files import FeatureFiles
from mimref.features.inputs import EncoderInputs, Inputs
from mimref.features.matrix import Labels
from mimref.progress import Listener
from mimref.results import Row


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found."""

    rows: list[Row]
    elapsed_s: float
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of every image that was left out."""
    data: DataConfig | None = None
    """The images, which the settings may have left to the encoder's file; None for features made elsewhere."""


def open_inputs(config: EvaluationConfig, listener: Listener) -> Inputs:
    """The features that a config names: of an encoder, or of files."""
    if config.features is None:
        return EncoderInputs(config, config.checkpoint, listener)
    if "checkpoint" in config.model_fields_set:
        raise ConfigError(f"--features is evaluated in place of an encoder's; leave {config.checkpoint} out")
    return FeatureFiles(*config.features)


def prepared(
    config: EvaluationConfig, inputs: Inputs, splits: Sequence[Split] = ("train", "val")
) -> list[tuple[Row, list[Column]]]:
    """What is evaluated together, with all its features at hand: how rows name it, and its columns."""
    groups = block_groups(config.blocks, inputs.depth)
    if isinstance(inputs, FeatureFiles):
        # What stands in one unnamed column is not ours to name.
        found: list[tuple[Row, list[Column]]] = [
            ({"blocks": name} if inputs.depth > 1 else {}, [Column(block, "cls") for block in group])
            for name, group in groups.items()
        ]
        return found
    found = [
        ({"blocks": name, "pool": config.pool}, columns_of(group, config.pool, config.final_norm, inputs.depth))
        for name, group in groups.items()
    ]
    inputs.prepare([column for _, columns in found for column in columns], splits)
    return found


def check_labels(inputs: Inputs) -> tuple[Labels, Labels]:
    """Labels of training and validation images. Raises DataError when they are of one class, or of others."""
    train_y, test_y = labels_of(inputs, "train"), labels_of(inputs, "val")
    class_indices(check_classes(train_y, "train"), test_y, "test")
    return train_y, test_y


def labels_of(inputs: Inputs, split: Split) -> Labels:
    """Labels of one split, which the inputs were opened to have."""
    labels = inputs.labels(split)
    assert labels is not None
    return labels


def named(rows: Sequence[Row], inputs: Inputs, where: Row) -> list[Row]:
    """Rows with the model's name and what was evaluated."""
    return [{"model": inputs.name, "metric": row["metric"], "value": row["value"], **where, **row} for row in rows]


def _label(work: str, where: Row) -> str:
    blocks = str(where.get("blocks", "last"))
    return f"{work} of block {blocks}" if blocks.isdigit() else work
