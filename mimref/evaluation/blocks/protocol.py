"""`mimref analyze-blocks`: every block of one or several encoders, on the same images."""

import time
from dataclasses import dataclass, field
from functools import partial

from mimref.data.loader import loader_workers
from mimref.distributed.group import end_group
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.evaluation.blocks.reconstruction import Reconstruction, check_maskable, reconstruct_blocks
from mimref.evaluation.blocks.statistics import analyze_blocks, recommend_heads
from mimref.evaluation.knn.protocol import check_neighbours
from mimref.evaluation.run import EvaluationResult, check_labels, named
from mimref.features.encode import Column, columns_of
from mimref.features.inputs import EncoderInputs, give_distinct_names
from mimref.progress import Listener, Silent
from mimref.results import Row


@dataclass(frozen=True)
class BlocksResult(EvaluationResult):
    """Rows per block, and where heads belong."""

    heads: dict[str, list[int]] = field(default_factory=dict)
    """Recommended blocks of every model that has labelled images."""


def evaluate_blocks(config: BlocksConfig, *, listener: Listener | None = None) -> BlocksResult:
    """k-NN, statistics and, if asked for, reconstruction loss of every block (Fig. 3b, Fig. 3d, Fig. 6, Table 14).

    Rows as `analyze_blocks` and `reconstruct_blocks` make them, with `model` and `pool`.
    Images without labels, or without validation images, give statistics alone.
    Raises UserError subclasses for checkpoints or images that do not fit.
    """
    started, listener = time.monotonic(), listener or Silent()
    opened: list[EncoderInputs] = []
    for checkpoint in config.checkpoints:
        opened.append(EncoderInputs(config, checkpoint, listener, need_labels=False))
        # Other encoders may come with headers of other images.
        config = config.model_copy(update={"data": opened[0].data})
    give_distinct_names(opened, config.checkpoints)
    rows: list[Row] = []
    bad: list[tuple[str, str]] = []
    heads: dict[str, list[int]] = {}
    for inputs in opened:
        _check(config, inputs)
    for inputs in opened:
        wanted = [column for columns in _groups(config, inputs) for column in columns]
        inputs.prepare(wanted, ("train", "val") if _labelled(inputs) else ("val",))
    for inputs in opened if end_group() else ():
        found = _blocks(config, inputs, listener)
        accuracies = [float(row["value"]) for row in found if row["metric"] == "block_knn_top1"]
        if accuracies:
            heads[inputs.name] = recommend_heads(accuracies)
        if config.reconstruct:
            reconstruction = _reconstruction(config, inputs, listener)
            found, bad = found + reconstruction.rows, bad + reconstruction.bad
        rows += named(found, inputs, {"pool": config.pool})
    bad = [pair for inputs in opened for pair in inputs.bad] + bad
    return BlocksResult(rows, time.monotonic() - started, list(dict.fromkeys(bad)), config.data, heads)


def _groups(config: BlocksConfig, inputs: EncoderInputs) -> list[list[Column]]:
    """Columns of every block."""
    blocks = range(1, inputs.depth + 1)
    return [columns_of([block], config.pool, config.final_norm, inputs.depth) for block in blocks]


def _labelled(inputs: EncoderInputs) -> bool:
    return all(inputs.source(split).labels is not None for split in ("train", "val"))


def _check(config: BlocksConfig, inputs: EncoderInputs) -> None:
    """Find what cannot work before any encoder runs."""
    if config.reconstruct:
        check_maskable(inputs.architecture, inputs.transform.image_size)
    if _labelled(inputs):
        train_y, _ = check_labels(inputs)
        check_neighbours(config.k, train_y)
    else:
        inputs.listener.note("the images have no labels: statistics of the features alone, without k-NN")


def _blocks(config: BlocksConfig, inputs: EncoderInputs, listener: Listener) -> list[Row]:
    labelled = _labelled(inputs)
    groups = _groups(config, inputs)
    return analyze_blocks(
        [inputs.matrix("train", columns) for columns in groups] if labelled else [],
        inputs.labels("train") if labelled else None,
        [inputs.matrix("val", columns) for columns in groups],
        inputs.labels("val") if labelled else None,
        k=config.k,
        tau=config.tau,
        device=config.device,
        progress=partial(listener.progress, f"blocks of {inputs.name}"),
    )


def _reconstruction(config: BlocksConfig, inputs: EncoderInputs, listener: Listener) -> Reconstruction:
    train = inputs.source("train")
    return reconstruct_blocks(
        inputs.encoder,
        train,
        inputs.source("val"),
        inputs.transform,
        config.reconstruction,
        seed=config.seed,
        device=inputs.device,
        precision=inputs.precision,
        workers=loader_workers(config.workers, train),
        max_bad=config.data.max_bad,
        progress=partial(listener.progress, f"decoders of {inputs.name}"),
    )
