"""`mimref analyze-blocks`: every block of one or several encoders, on the same images."""

import time
from dataclasses import dataclass, field
from functools import partial

from mimref.distributed.group import end_group
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.evaluation.blocks.reconstruction import check_maskable, reconstruct_blocks
from mimref.evaluation.blocks.statistics import analyze_blocks, recommend_heads
from mimref.evaluation.knn.protocol import check_neighbours
from mimref.evaluation.metrics import split_labels
from mimref.features.encode import columns_of
from mimref.features.inputs import EncoderInputs, give_distinct_names
from mimref.progress import Listener, Silent
from mimref.results import EvaluationResult, Row, named


@dataclass(frozen=True)
class BlocksResult(EvaluationResult):
    """Rows per block, and the blocks that need heads."""

    heads: dict[str, list[int]] = field(default_factory=dict)
    """Recommended blocks of every model that has labelled images."""


def evaluate_blocks(config: BlocksConfig, *, listener: Listener | None = None) -> BlocksResult:
    """k-NN, statistics and, if asked for, reconstruction loss of every block (Fig. 3b, Fig. 3d, Fig. 6, Table 14).

    Rows as `analyze_blocks` and `reconstruct_blocks` return them, with `model` and `pool`. Images without labels or
    without validation images give statistics only. Raises UserError subclasses for checkpoints or images that do not
    fit.
    """
    started, listener = time.monotonic(), listener or Silent()
    opened: list[EncoderInputs] = []
    for checkpoint in config.checkpoints:
        opened.append(EncoderInputs(config, checkpoint, listener, need_labels=False))
        # The headers of the other encoders may record other images.
        config = config.model_copy(update={"data": opened[0].data})
    give_distinct_names(opened, config.checkpoints)
    for inputs in opened:
        inputs.share_images(opened[0])
        _check(config, inputs)
    for inputs in opened:
        columns = columns_of(range(1, inputs.depth + 1), config.pool, config.final_norm, inputs.depth)
        inputs.prepare(columns, ("train", "val") if _labelled(inputs) else ("val",))
    rows: list[Row] = []
    bad: list[tuple[str, str]] = []
    heads: dict[str, list[int]] = {}
    for inputs in opened if end_group() else ():
        found = _rows(config, inputs)
        accuracies = [float(row["value"]) for row in found if row["metric"] == "block_knn_top1"]
        if accuracies:
            heads[inputs.name] = recommend_heads(accuracies)
        if config.reconstruct:
            reconstruction = reconstruct_blocks(
                inputs.encoder,
                inputs.source("train"),
                inputs.source("val"),
                inputs.settings,
                config.reconstruction,
                seed=config.seed,
                progress=partial(listener.progress, f"decoders of {inputs.name}"),
            )
            found, bad = found + reconstruction.rows, bad + reconstruction.bad
        rows += named(found, inputs.name, {"pool": config.pool})
    bad = [pair for inputs in opened for pair in inputs.bad] + bad
    return BlocksResult(rows, time.monotonic() - started, list(dict.fromkeys(bad)), config.data, heads)


def _labelled(inputs: EncoderInputs) -> bool:
    return all(inputs.source(split).labels is not None for split in ("train", "val"))


def _check(config: BlocksConfig, inputs: EncoderInputs) -> None:
    """Fail early."""
    if config.reconstruct:
        check_maskable(inputs.architecture, inputs.settings.transform.image_size)
    if _labelled(inputs):
        train_y, _ = split_labels(inputs)
        check_neighbours(config.k, train_y)
    else:
        inputs.listener.note("the images have no labels: feature statistics only, without k-NN")


def _rows(config: BlocksConfig, inputs: EncoderInputs) -> list[Row]:
    """Rows of `analyze_blocks` on prepared features."""
    depth = inputs.depth
    groups = [columns_of([block], config.pool, config.final_norm, depth) for block in range(1, depth + 1)]
    train, test = inputs.features("train") if _labelled(inputs) else None, inputs.features("val")
    return analyze_blocks(
        [] if train is None else [train.matrix(columns) for columns in groups],
        None if train is None else train.y,
        [test.matrix(columns) for columns in groups],
        None if train is None else test.y,
        k=config.k,
        tau=config.tau,
        device=config.device,
        progress=partial(inputs.listener.progress, f"blocks of {inputs.name}"),
    )
