"""`mimref compare`: the same protocols for several encoders, on the same images."""

import time

from mimref.config.base import CommandConfig
from mimref.distributed.group import end_group
from mimref.evaluation.cluster.config import ClusterConfig
from mimref.evaluation.cluster.protocol import check_metrics, evaluate_cluster
from mimref.evaluation.config import CompareConfig
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import check_neighbours, evaluate_knn
from mimref.evaluation.lowshot.config import LowshotConfig
from mimref.evaluation.lowshot.protocol import check_shots, evaluate_lowshot
from mimref.evaluation.probe.augmented import probe_inputs
from mimref.evaluation.probe.config import ProbeConfig
from mimref.evaluation.probe.protocol import evaluate_probe
from mimref.evaluation.run import EvaluationResult, check_labels
from mimref.features.config import EncoderPassConfig
from mimref.features.encode import Column, columns_of
from mimref.features.inputs import EncoderInputs, give_distinct_names
from mimref.progress import Listener, Silent
from mimref.results import Row


def compare_encoders(config: CompareConfig, *, listener: Listener | None = None) -> EvaluationResult:
    """Rows of every protocol for the base and then the other encoders; one encoder pass per split and encoder.

    All see the same draws, runs and images: those that `config.data` names, else those of the base's header.
    Raises UserError subclasses for checkpoints or images that do not fit, before any encoder runs.
    """
    started, listener = time.monotonic(), listener or Silent()
    checkpoints = [config.base, *config.refined]
    base = EncoderInputs(config, config.base, listener)
    # Other encoders may come with headers of other images.
    config = config.model_copy(update={"data": base.data})
    opened = [base, *(EncoderInputs(config, checkpoint, listener) for checkpoint in config.refined)]
    give_distinct_names(opened, checkpoints)
    _check(config, base)
    for inputs in opened:
        inputs.prepare(_columns(config, inputs))
    rows: list[Row] = []
    for inputs, checkpoint in zip(opened, checkpoints, strict=True) if end_group() else ():
        rows += _measure(config, inputs, checkpoint, listener)
    bad = [pair for inputs in opened for pair in inputs.bad]
    return EvaluationResult(rows, time.monotonic() - started, bad, config.data)


def _check(config: CompareConfig, inputs: EncoderInputs) -> None:
    """Find what a protocol would refuse; the images are the same for all encoders."""
    train_y, _ = check_labels(inputs)
    if "knn" in config.protocols:
        check_neighbours(config.k, train_y)
    if "lowshot" in config.protocols:
        check_shots(config.shots, train_y)
    if "cluster" in config.protocols:
        check_metrics(config.metrics)


def _columns(config: CompareConfig, inputs: EncoderInputs) -> list[Column]:
    """What all protocols together read."""
    wanted = columns_of([inputs.depth], config.pool, config.final_norm, inputs.depth)
    if "probe" in config.protocols:
        for columns in probe_inputs(inputs.depth, inputs.has_cls_token).values():
            wanted += columns
    return wanted


def _measure(config: CompareConfig, inputs: EncoderInputs, checkpoint: str, listener: Listener) -> list[Row]:
    names = {name for name in EncoderPassConfig.model_fields if name not in ("pool", "final_norm", "preset")}
    common = {name: getattr(config, name) for name in CommandConfig.model_fields.keys() | names if name != "preset"}
    last = common | {"checkpoint": checkpoint, "pool": config.pool, "final_norm": config.final_norm}
    rows: list[Row] = []
    for protocol in config.protocols:
        if protocol == "knn":
            found = evaluate_knn(KnnConfig(**last, k=[config.k], tau=[config.tau]), inputs=inputs, listener=listener)
        elif protocol == "lowshot":
            lowshot = LowshotConfig(**last, shots=config.shots, splits=config.splits)
            found = evaluate_lowshot(lowshot, inputs=inputs, listener=listener)
        elif protocol == "cluster":
            cluster = ClusterConfig(**last, metrics=config.metrics, runs=config.runs)
            found, _ = evaluate_cluster(cluster, inputs=inputs, listener=listener)
        else:
            probe = ProbeConfig(**common, checkpoint=checkpoint, cached=True, probe=config.probe)
            found = evaluate_probe(probe, inputs=inputs, listener=listener)
        rows += found.rows
    return rows
