"""Several encoders measured by the same protocols: `mimref compare`, and the before/after table of `mimref refine`."""

import time
from collections.abc import Iterable
from functools import partial

from mimref.config.base import DataConfig
from mimref.config.run import RunConfig
from mimref.data.open import open_source
from mimref.data.sources import ImageSource
from mimref.distributed.group import end_group
from mimref.encoders.vit import Encoder
from mimref.errors import DataError
from mimref.evaluation.cluster.protocol import check_metrics, cluster
from mimref.evaluation.config import CompareConfig
from mimref.evaluation.knn.protocol import check_neighbours, knn
from mimref.evaluation.lowshot.protocol import check_shots, default_splits, lowshot
from mimref.evaluation.metrics import check_classes, class_indices, split_labels
from mimref.evaluation.probe.protocol import input_columns, probe_features
from mimref.features.encode import PIXELS, Column, Features, PassSettings, columns_of, extract, raw_pixels
from mimref.features.inputs import EncoderInputs, give_distinct_names
from mimref.progress import LabelledProgress, Listener, Silent
from mimref.results import EvaluationResult, Row, main_rows, named


def measure(
    protocol: str,
    model: str,
    pair: tuple[Features, Features],
    columns: list[Column],
    config: CompareConfig,
    progress: LabelledProgress,
) -> list[Row]:
    """Rows of one protocol, `knn`, `lowshot` or `cluster`, for the training and validation features of one model."""
    train, test = pair
    if train.y is None or test.y is None:
        raise DataError("labels are needed to evaluate features")
    test_x = test.matrix(columns)
    if protocol == "cluster":
        labelled = partial(progress, f"k-means of {model}")
        return cluster(test_x, test.y, metrics=config.metrics, runs=config.runs, seed=config.seed, progress=labelled)
    arrays = train.matrix(columns), train.y, test_x, test.y
    if protocol == "knn":
        labelled = partial(progress, f"nearest neighbours of {model}")
        return knn(*arrays, k=[config.k], tau=[config.tau], device=config.device, progress=labelled)
    labelled = partial(progress, f"low-shot of {model}")
    splits = config.splits or default_splits(len(train))
    return lowshot(*arrays, shots=config.shots, splits=splits, seed=config.seed, progress=labelled)


# --- mimref compare


def compare_encoders(config: CompareConfig, *, listener: Listener | None = None) -> EvaluationResult:
    """Rows of every protocol for the base and then the other encoders; one encoder pass per split and encoder.

    All see the same draws, runs and images: those of `config.data`, else those of the base's header.
    Raises UserError subclasses for checkpoints or images that do not fit, before any encoder runs.
    """
    started, listener = time.monotonic(), listener or Silent()
    base = EncoderInputs(config, config.base, listener)
    # The headers of the other encoders may record other images.
    config = config.model_copy(update={"data": base.data})
    opened = [base, *(EncoderInputs(config, checkpoint, listener) for checkpoint in config.refined)]
    give_distinct_names(opened, [config.base, *config.refined])
    for inputs in opened[1:]:
        inputs.share_images(base)
    _check(config, base)
    for inputs in opened:
        columns = _last_block(config, inputs)
        if "probe" in config.protocols:
            columns += [column for group in input_columns(inputs).values() for column in group]
        inputs.prepare(columns)
    rows: list[Row] = []
    for inputs in opened if end_group() else ():
        for protocol in config.protocols:
            if protocol == "probe":
                found = probe_features(inputs, input_columns(inputs), config.probe, config, listener)
                rows += named(found, inputs.name, {})
                continue
            pair, columns = (inputs.features("train"), inputs.features("val")), _last_block(config, inputs)
            found = measure(protocol, inputs.name, pair, columns, config, listener.progress)
            rows += named(found, inputs.name, {"blocks": "last", "pool": config.pool})
    bad = [pair for inputs in opened for pair in inputs.bad]
    return EvaluationResult(rows, time.monotonic() - started, bad, config.data)


def _check(config: CompareConfig, inputs: EncoderInputs) -> None:
    """Fail early; the images are the same for all encoders."""
    train_y, _ = split_labels(inputs)
    if "knn" in config.protocols:
        check_neighbours(config.k, train_y)
    if "lowshot" in config.protocols:
        check_shots(config.shots, train_y)
    if "cluster" in config.protocols:
        check_metrics(config.metrics)


def _last_block(config: CompareConfig, inputs: EncoderInputs) -> list[Column]:
    return columns_of([inputs.depth], config.pool, config.final_norm, inputs.depth)


# --- the before/after table of mimref refine


def labelled_splits(data: DataConfig) -> tuple[ImageSource, ImageSource]:
    """Training and validation images with labels.

    Raises DataError when the images have no labels or no validation split, or when classes are missing.
    """
    train, test = open_source(data, "train", need_labels=True), open_source(data, "val", need_labels=True)
    assert train.labels is not None and test.labels is not None
    class_indices(check_classes(train.labels, "train"), test.labels, "test")
    return train, test


def before_after(
    config: RunConfig,
    images: tuple[ImageSource, ImageSource],
    encoders: Iterable[tuple[str, Encoder]],
    settings: PassSettings,
    progress: LabelledProgress,
) -> tuple[list[Row], list[tuple[str, str]]]:
    """k-NN, low-shot and clustering of raw pixels, and of each encoder's last block (raw output, CLS token).

    images: from `labelled_splits`. encoders: with their names in the results; built one at a time if from a generator.
    Returns rows, and path and reason of the images left out, once for every model.
    """
    evaluate, protocols = config.evaluate, ("knn", "lowshot", "cluster")
    compare = CompareConfig(
        base="base",
        refined=["refined"],
        seed=config.seed,
        device=config.device,
        tau=evaluate.knn_tau,
        shots=[evaluate.shots],
        splits=evaluate.splits,
        runs=evaluate.cluster_runs,
    )
    rows: list[Row] = []
    bad: list[tuple[str, str]] = []

    def add(model: str, pair: tuple[Features, Features], column: Column, where: Row) -> None:
        fitting = compare.model_copy(update={"k": min(evaluate.knn_k, len(pair[0]))})
        found = [measure(protocol, model, pair, [column], fitting, progress) for protocol in protocols]
        rows.extend({"model": model, **row, **where} for part in found for row in main_rows(part))
        bad.extend(pair[0].bad + pair[1].bad)

    train, test = images
    add("raw pixels", (raw_pixels(train, settings), raw_pixels(test, settings)), PIXELS, {})
    for name, encoder in encoders:
        last, label = Column(encoder.depth, "cls"), partial(progress, f"features of {name}")
        found = (extract(encoder, source, settings, [last], progress=label) for source in images)
        add(name, (next(found), next(found)), last, {"blocks": "last", "pool": "cls"})
    return rows, bad
