"""Evaluations from a config to rows: find what cannot work before the encoder runs, then apply a protocol.

In a process group all ranks share the passes of the encoder, and k-NN's search. All else is then rank 0's own work; the
other ranks' results have no rows.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mimref.config import DataConfig
from mimref.data.loader import loader_workers
from mimref.data.sources import BadImages, Split
from mimref.errors import ConfigError, DataError
from mimref.evaluation.classes import choose_classes, subset
from mimref.evaluation.cluster import check_metrics, cluster
from mimref.evaluation.embedding import check_count, umap_embedding
from mimref.evaluation.inputs import (
    EncoderInputs,
    FeatureFiles,
    Inputs,
    Labels,
    block_groups,
)
from mimref.evaluation.knn import knn
from mimref.evaluation.lowshot import lowshot
from mimref.evaluation.metrics import Row, check_classes, class_indices
from mimref.evaluation.probe import ProbeInput, default_batch, probe_cached
from mimref.evaluation.probe_augmented import probe_augmented, probe_inputs
from mimref.evaluation.probe_training import Progress
from mimref.evaluation.splits import read_split_files
from mimref.evaluation_config import ClusterConfig, EvaluationConfig, KnnConfig, LowshotConfig, ProbeConfig
from mimref.features.extract import Column, columns_of
from mimref.training.distributed import first_alone
from mimref.training.runlog import Listener, Silent

# Fewer training images than this make a low-shot result depend on which are drawn; more draws then (method of DINO).
MANY_IMAGES = 10_000


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found."""

    rows: list[Row]
    elapsed_s: float
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of every image that was left out."""
    data: DataConfig | None = None
    """The images, which the settings may have left to the encoder's file; None for features made elsewhere."""


@dataclass(frozen=True)
class Embedding:
    """Points in the plane for a figure."""

    points: NDArray[np.float32]
    """(N, 2)."""
    y: Labels
    class_names: list[str] | None


def evaluate_knn(
    config: KnnConfig, *, inputs: Inputs | None = None, listener: Listener | None = None
) -> EvaluationResult:
    """k-NN accuracy (Appendix C.4) of the blocks asked for, at every k, from one encoder pass per split.

    inputs: opened before, for several protocols; the config's checkpoint is then not read. Rows as
    `mimref.evaluation.knn.knn` makes them, with `model`, `blocks` and `pool`. Raises UserError subclasses for a
    checkpoint, images, blocks or numbers of neighbours that do not fit, before the encoder runs.
    """
    started, listener = time.monotonic(), listener or Silent()
    inputs = inputs or open_inputs(config, listener)
    train_y, _ = check_labels(inputs)
    check_neighbours(max(config.k), train_y)
    rows: list[Row] = []
    for where, columns in prepared(config, inputs):
        train_y, test_y = check_labels(inputs)
        found = knn(
            inputs.matrix("train", columns),
            train_y,
            inputs.matrix("val", columns),
            test_y,
            k=config.k,
            tau=config.tau,
            standardize=config.standardize,
            per_class=config.per_class,
            device=config.device,
            progress=partial(listener.progress, _label("nearest neighbours", where)),
        )
        rows += named(found, inputs, where)
    return EvaluationResult(rows, time.monotonic() - started, inputs.bad, inputs.data)


def evaluate_lowshot(
    config: LowshotConfig, *, inputs: Inputs | None = None, listener: Listener | None = None
) -> EvaluationResult:
    """Low-shot logistic regression (Appendix C.5) of the blocks asked for.

    Rows as `mimref.evaluation.lowshot.lowshot` makes them, with `model`, `blocks` and `pool`. Raises UserError
    subclasses as `evaluate_knn` does, also for more shots than a class has images and split files that do not fit.
    """
    started, listener = time.monotonic(), listener or Silent()
    inputs = inputs or open_inputs(config, listener)
    train_y, _ = check_labels(inputs)
    if not config.split_files:
        check_shots(config.shots, train_y)
    elif not isinstance(inputs, EncoderInputs):
        raise ConfigError("--split-file names images, which --features does not; leave one of them out")
    else:
        _given_splits(config, inputs, np.arange(len(train_y)))
    rows: list[Row] = []
    groups = prepared(config, inputs)
    if not first_alone():
        return EvaluationResult(rows, time.monotonic() - started)
    train_y, test_y = check_labels(inputs)
    splits: int | list[list[int]] = config.splits or (3 if len(train_y) >= MANY_IMAGES else 20)
    if config.split_files and isinstance(inputs, EncoderInputs):
        splits = _given_splits(config, inputs, inputs.indices("train"))
    for where, columns in groups:
        found = lowshot(
            inputs.matrix("train", columns),
            train_y,
            inputs.matrix("val", columns),
            test_y,
            shots=config.shots,
            splits=splits,
            seed=config.seed,
            progress=partial(listener.progress, _label("logistic regressions", where)),
        )
        rows += named(found, inputs, where)
    return EvaluationResult(rows, time.monotonic() - started, inputs.bad, inputs.data)


def evaluate_cluster(
    config: ClusterConfig, *, embed: bool = False, inputs: Inputs | None = None, listener: Listener | None = None
) -> tuple[EvaluationResult, Embedding | None]:
    """Clustering (Appendix C.12) of one split's images; with `embed`, their UMAP embedding too.

    Rows as `mimref.evaluation.cluster.cluster` makes them, with `model`, `blocks` and `pool`. The embedding is of the
    last of the blocks asked for. Raises UserError subclasses before the encoder runs where that can be told.
    """
    started, listener = time.monotonic(), listener or Silent()
    check_metrics(config.metrics)
    inputs = inputs or open_inputs(config, listener)
    names = inputs.source(config.split).class_names if isinstance(inputs, EncoderInputs) else None
    y = labels_of(inputs, config.split)
    check_classes(y, config.split)
    classes = None if config.classes is None else choose_classes(config.classes, names, y)
    if embed:
        check_count(len(y) if classes is None else int(np.isin(y, classes).sum()))
    rows: list[Row] = []
    embedding = None
    groups = prepared(config, inputs, (config.split,))
    for where, columns in groups if first_alone() else []:
        x, y = inputs.matrix(config.split, columns), labels_of(inputs, config.split)
        if classes is not None:
            x, y = subset(x, y, classes)
        found = cluster(
            x,
            y,
            metrics=config.metrics,
            runs=config.runs,
            seed=config.seed,
            progress=partial(listener.progress, _label("k-means", where)),
        )
        rows += named(found, inputs, where | ({"classes": len(classes)} if classes is not None else {}))
    if embed and rows:
        listener.progress("UMAP", 0, 1)
        embedding = Embedding(umap_embedding(x, seed=config.seed), y, names)
        listener.progress("UMAP", 1, 1)
    return EvaluationResult(rows, time.monotonic() - started, inputs.bad, inputs.data), embedding


def evaluate_probe(
    config: ProbeConfig, *, state: Path | None = None, inputs: Inputs | None = None, listener: Listener | None = None
) -> EvaluationResult:
    """Linear probe (Appendix C.3) by DINOv2's protocol, on augmented images or on cached features.

    state: file that an interrupted probe is continued from. Rows as `mimref.evaluation.probe` makes them, with `model`.
    Raises UserError subclasses as `evaluate_knn` does.
    """
    started, listener = time.monotonic(), listener or Silent()
    inputs = inputs or open_inputs(config, listener)
    if not isinstance(inputs, EncoderInputs) and not config.cached:
        raise ConfigError("--features holds no images to augment; add --cached")
    check_labels(inputs)
    has_cls = not isinstance(inputs, EncoderInputs) or inputs.has_cls_token
    wanted = probe_inputs(inputs.depth, has_cls, final_norm=config.final_norm)
    if isinstance(inputs, FeatureFiles):
        wanted = {key: columns for key, columns in wanted.items() if key.pool == "cls"}
    columns = list(dict.fromkeys(column for group in wanted.values() for column in group))
    inputs.prepare(columns, ("train", "val") if config.cached else ("val",))
    progress = partial(listener.progress, "linear probes")
    bad = BadImages(config.data.max_bad)
    if isinstance(inputs, EncoderInputs) and not config.cached:
        found = _probe_augmented(config, inputs, wanted, bad, state, progress)
    else:
        found = _probe_cached(config, inputs, wanted, state, progress) if first_alone() else []
    left_out = list(dict.fromkeys([*inputs.bad, *bad.items]))
    return EvaluationResult(named(found, inputs, {}), time.monotonic() - started, left_out, inputs.data)


def _probe_cached(
    config: ProbeConfig,
    inputs: Inputs,
    wanted: dict[ProbeInput, list[Column]],
    state: Path | None,
    progress: Progress,
) -> list[Row]:
    train_y, test_y = check_labels(inputs)
    return probe_cached(
        {key: inputs.matrix("train", columns) for key, columns in wanted.items()},
        train_y,
        {key: inputs.matrix("val", columns) for key, columns in wanted.items()},
        test_y,
        lrs=config.probe.lr,
        epochs=config.probe.epochs,
        batch_size=config.probe.batch_size or default_batch(len(train_y)),
        norm=config.probe.norm,
        select=config.probe.select,
        seed=config.seed,
        device=config.device,
        state=state,
        progress=progress,
    )


def _probe_augmented(
    config: ProbeConfig,
    inputs: EncoderInputs,
    wanted: dict[ProbeInput, list[Column]],
    bad: BadImages,
    state: Path | None,
    progress: Progress,
) -> list[Row]:
    train = inputs.source("train")
    return probe_augmented(
        inputs.encoder,
        train,
        {key: inputs.matrix("val", columns) for key, columns in wanted.items()},
        labels_of(inputs, "val"),
        transform=inputs.transform,
        final_norm=config.final_norm,
        lrs=config.probe.lr,
        epochs=config.probe.epochs,
        batch_size=config.probe.batch_size or default_batch(len(train)),
        norm=config.probe.norm,
        select=config.probe.select,
        seed=config.seed,
        device=inputs.device,
        precision=inputs.precision,
        workers=loader_workers(config.workers, train),
        bad=bad,
        state=state,
        progress=progress,
    )


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


def _given_splits(config: LowshotConfig, inputs: EncoderInputs, images: Labels) -> list[list[int]]:
    """Which of the training images, given by their positions in the data set, each of the split files names."""
    source = inputs.source("train")
    names = [source.path(int(index)) for index in images]
    return [rows.tolist() for rows in read_split_files(config.split_files, names)]


def check_neighbours(k: int, y: Labels) -> None:
    """Find what `knn` would refuse before the encoder has run over all images."""
    if k > len(y):
        raise ConfigError(f"--k {k} is more than the {len(y)} training images; choose a smaller k")


def check_shots(shots: Sequence[int], y: Labels) -> None:
    """Find what `lowshot` would refuse before the encoder has run over all images."""
    classes, counts = np.unique(y, return_counts=True)
    if counts.min() < max(shots):
        raise DataError(
            f"class {classes[counts.argmin()]} has only {counts.min()} training images, too few for "
            f"{max(shots)} shots; lower --shots"
        )
