"""`mimref analyze-blocks`: scores of every block of one or several encoders, on the same images."""

import time
from dataclasses import dataclass, field
from functools import partial
from math import isfinite

import numpy as np

from mimref.data.decode import skipped_line
from mimref.distributed.group import end_group
from mimref.errors import Checks
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.evaluation.blocks.reconstruction import check_maskable, few_updates, reconstruct_blocks
from mimref.evaluation.blocks.statistics import analyze_blocks, recommend_heads
from mimref.evaluation.exhibits.collect import Exhibition, IllustratedResult, Voting
from mimref.evaluation.knn.protocol import check_neighbours
from mimref.evaluation.metrics import check_labels, labelled, labelled_pair
from mimref.features.inputs import EncoderInputs
from mimref.features.matrix import Matrix
from mimref.features.opening import Opened, open_encoders
from mimref.progress import Listener, Silent, optional
from mimref.results import Row, named


@dataclass(frozen=True)
class BlocksResult(IllustratedResult):
    """Rows per block, and the blocks that need heads."""

    heads: dict[str, list[int]] = field(default_factory=dict)
    """Recommended blocks of every model that has labelled images."""


def evaluate_blocks(
    config: BlocksConfig, *, exhibits: bool = False, listener: Listener | None = None, checks: Checks | None = None
) -> BlocksResult:
    """Compute k-NN, statistics and, if requested, reconstruction loss of blocks (Fig. 3b, Fig. 3d, Fig. 6, Table 14).

    Rows are those of `analyze_blocks` and `reconstruct_blocks`, with `model` and `pool`. Without labels or validation
    images, there are statistics only. exhibits: also collect the images that a report shows, by the last block and the
    best one. Raises UserError subclasses for checkpoints or images that do not fit.
    """
    started, listener, checks = time.monotonic(), listener or Silent(), checks or Checks()
    found_inputs = open_encoders(config, config.checkpoints, listener, checks, "checkpoints", need_labels=False)
    opened = [inputs for each in found_inputs if isinstance(inputs := each.inputs, EncoderInputs)]
    _check(config, opened, found_inputs[0], listener, checks)
    config = config.model_copy(update={"data": opened[0].data})
    for inputs in opened:
        columns = inputs.columns(range(1, inputs.depth + 1))
        inputs.prepare(columns, ("train", "val") if _labelled(inputs) else ("val",))
    rows: list[Row] = []
    bad = [pair for inputs in opened for pair in inputs.bad]
    heads: dict[str, list[int]] = {}
    exhibition = Exhibition(opened[0].source("val"), opened[0].settings, config.seed, listener)
    for inputs in opened if end_group() else ():
        found = _rows(config, inputs)
        accuracies = [float(row["value"]) for row in found if row["metric"] == "block_knn_top1"]
        if any(map(isfinite, accuracies)):
            heads[inputs.name] = recommend_heads(accuracies)
        if exhibits:
            _exhibit(exhibition, config, inputs, accuracies)
        if config.reconstruct:
            with optional(f"no reconstruction loss of {inputs.name}", listener):
                advice = few_updates(config.reconstruction, len(inputs.source("train")))
                if advice and inputs is opened[0]:
                    listener.note(advice)
                reconstruction = reconstruct_blocks(
                    inputs.encoder,
                    inputs.source("train"),
                    inputs.source("val"),
                    inputs.settings,
                    config.reconstruction,
                    seed=config.seed,
                    progress=partial(listener.progress, f"decoders of {inputs.name}"),
                )
                inputs.tell("train")
                found += reconstruction.rows
                if unseen := [pair for pair in reconstruction.bad if pair not in bad]:
                    listener.warn(skipped_line(unseen))
                bad += unseen
        rows += named(found, inputs.name, {"pool": inputs.pool})
    bad = list(dict.fromkeys(bad))
    return BlocksResult(rows, time.monotonic() - started, bad, config.data, exhibition.made(), heads)


def _exhibit(exhibition: Exhibition, config: BlocksConfig, inputs: EncoderInputs, accuracies: list[float]) -> None:
    """Add the last block to an exhibition and, if k-NN accuracy is known, the best one."""
    blocks = {inputs.depth}
    if any(map(isfinite, accuracies)):
        blocks.add(1 + int(np.nanargmax(accuracies)))
    for block in sorted(blocks):
        columns = inputs.columns([block])
        voting = None
        if _labelled(inputs):
            train = inputs.features("train")
            voting = Voting(*labelled(train, columns), config.k, config.tau)
        exhibition.add(f"{inputs.name}, block {block}", inputs.features("val"), columns, voting=voting)


def _labelled(inputs: EncoderInputs) -> bool:
    return all(inputs.source(split).labels is not None for split in ("train", "val"))


def _check(
    config: BlocksConfig, encoders: list[EncoderInputs], first: Opened, listener: Listener, checks: Checks
) -> None:
    """Fail early; the images are the same for all encoders."""
    for inputs in encoders if config.reconstruct else ():
        size = inputs.image_size
        checks.run("reconstruct", partial(check_maskable, inputs.architecture, size))
    train_y, test_y = first.labels("train"), first.labels("val")
    if train_y is not None and test_y is not None:
        check_labels(first, checks)
        checks.run("k", lambda: check_neighbours(config.k, train_y))
    checks.finish()
    if train_y is None or test_y is None:
        listener.note("the images have no labels: feature statistics only, without k-NN")


def _rows(config: BlocksConfig, inputs: EncoderInputs) -> list[Row]:
    """Return the rows of `analyze_blocks` on prepared features."""
    depth, test = inputs.depth, inputs.features("val")
    groups = [inputs.columns([block]) for block in range(1, depth + 1)]
    train_x: list[Matrix] = []
    train_y = test_y = None
    if _labelled(inputs):
        train = inputs.features("train")
        train_x = [train.matrix(columns) for columns in groups]
        _, train_y, _, test_y = labelled_pair(train, test, groups[-1])
    return analyze_blocks(
        train_x,
        train_y,
        [test.matrix(columns) for columns in groups],
        test_y,
        k=config.k,
        tau=config.tau,
        device=config.device,
        progress=partial(inputs.listener.progress, f"blocks of {inputs.name}"),
    )
