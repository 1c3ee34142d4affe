"""Probes on cached features of centre crops."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mimref.config.load import validated
from mimref.devices import resolve_device
from mimref.draws import permutation
from mimref.errors import DataError
from mimref.evaluation.metrics import check_features, row_blocks
from mimref.evaluation.probe.attentive import TokenShape
from mimref.evaluation.probe.config import LEARNING_RATES, ProbeTrainingConfig
from mimref.evaluation.probe.ensemble import Batch, Norm
from mimref.evaluation.probe.grid import ProbeGrid, ProbeInput, described, fingerprint, to_tensor, widths_of
from mimref.features.matrix import Labels, Matrix
from mimref.progress import Progress
from mimref.results import Row

# Training features of one input below this size stay on the device.
HELD_BYTES = 2 << 30


def probe_cached(
    train: Mapping[ProbeInput, Matrix],
    train_y: Labels,
    test: Mapping[ProbeInput, Matrix],
    test_y: Labels,
    *,
    lrs: Sequence[float] = LEARNING_RATES,
    epochs: int = 50,
    batch_size: int | None = 1024,
    norm: Norm = "none",
    select: Literal["test", "val-split"] = "test",
    seed: int = 0,
    device: str = "cpu",
    state: Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Train linear classifiers on features of unchanged images; return their top-1 accuracy in percent, the best first.

    train, test: (N, D) and (M, D) of every input, each with its own D; read by rows. A training matrix of up to 2 GB is
    kept on the device. Labels are any whole numbers. lrs are scaled by batch / 256. The last, partial batch of an epoch
    is left out; fewer images than a batch form one smaller batch. batch_size None: see `default_batch`. norm: "none" is
    DINOv2's probe, "batch" the paper's released code (see `schedule`). select: "test" is the published choice;
    "val-split" holds out a fixed, stratified tenth of the training images, chooses on them and trains on the rest.
    Rows, all `probe_top1`: first that of the best classifier, with `select`; then one per classifier, numbered from 1
    in `classifier` (inputs in the order of `train`, lrs for each). With "val-split", all rows have `held_out_top1`. Of
    equal classifiers the first is chosen; one that has diverged scores 0 and is never chosen.
    state: a file from which an interrupted probe resumes, bit for bit on the CPU. The caller removes it at the end.
    Raises ConfigError for invalid settings or a state saved with others; DataError for unusable features or labels;
    OutputError for a state that is damaged or cannot be written; DivergenceError if every classifier has diverged.
    """
    values = {"lr": [float(lr) for lr in lrs], "epochs": epochs, "batch_size": batch_size}
    settings = validated(ProbeTrainingConfig, values | {"norm": norm, "select": select})
    target = resolve_device(device)
    return probe_matrices(train, train_y, test, test_y, settings, seed, target, state=state, progress=progress)


def probe_matrices(
    train: Mapping[ProbeInput, Matrix],
    train_y: Labels,
    test: Mapping[ProbeInput, Matrix],
    test_y: Labels,
    settings: ProbeTrainingConfig,
    seed: int,
    device: torch.device,
    *,
    shapes: Sequence[TokenShape] = (),
    state: Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Run `probe_cached` for either kind. shapes: token shapes of attentive probes' inputs, whose rows hold tokens."""
    for key, x in train.items():
        check_features(x, f"train ({key})", train_y)
    ours, theirs = described(widths_of(train)), described(widths_of(test))
    if set(ours) != set(theirs):
        raise DataError(
            f"train features are of {', '.join(ours) or 'nothing'}, test features of {', '.join(theirs) or 'nothing'}; "
            "use the same inputs for both"
        )
    ordered = {key: test[key] for key in train}
    grid = ProbeGrid(settings, seed, train_y, ordered, test_y, device, shapes=shapes, state=state)
    readers = [_reader(x, device) for x in train.values()]

    def read(rows: Labels) -> Batch:
        return [reader(rows) for reader in readers], torch.from_numpy(grid.labels[rows])

    def batches(first: int) -> Iterator[Batch]:
        """Yield batches in an order that depends only on (seed, epoch)."""
        for update in range(first, grid.total):
            epoch, number = divmod(update, grid.steps_per_epoch)
            if number == 0 or update == first:
                order = grid.train_rows[permutation(seed, epoch, len(grid.train_rows)).numpy()]
            # Sorted, because a file is read faster in order.
            yield read(np.sort(order[number * grid.batch : (number + 1) * grid.batch]))

    grid.train(batches, lambda: fingerprint(train, grid.labels), progress)
    held = (grid.held_rows[start : start + grid.score_rows] for start in range(0, len(grid.held_rows), grid.score_rows))
    return grid.rows("cached", map(read, held))


def _reader(x: Matrix, device: torch.device) -> Callable[[Labels], Tensor]:
    """Return a function that reads rows of a matrix, from a copy on the device if that is small enough."""
    first = to_tensor(x[:1])
    if len(x) * first.nbytes > HELD_BYTES:
        return lambda rows: to_tensor(x[rows])
    held = first.new_empty(x.shape, device=device)
    for block in row_blocks(x):
        held[block] = to_tensor(x[block])
    return lambda rows: held[torch.from_numpy(rows).to(device, non_blocking=True)]
