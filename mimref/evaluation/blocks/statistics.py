"""Scores of every block of an encoder: k-NN, feature statistics, and where contrastive heads belong (Fig. 3)."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from mimref.errors import ConfigError, DataError
from mimref.evaluation.assess.spectra import effective_rank, moments, spectrum
from mimref.evaluation.knn.protocol import knn_accuracy
from mimref.evaluation.metrics import check_features
from mimref.features.matrix import Labels, Matrix
from mimref.progress import Progress
from mimref.results import Row


class FeatureStatistics(NamedTuple):
    """Statistics of the features of a set of images."""

    mean: float
    """Mean of each feature, averaged over features (Table 14)."""
    variance: float
    """Variance of each feature, ddof 0, averaged over features (Table 14)."""
    effective_rank: float
    """exp of the entropy of the covariance's normalised eigenvalues (Roy & Vetterli 2007), between 1 and D."""


def analyze_blocks(
    train: Sequence[Matrix],
    train_y: Labels | None,
    test: Sequence[Matrix],
    test_y: Labels | None,
    *,
    blocks: Sequence[int] | None = None,
    k: int = 10,
    tau: float = 0.07,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Row]:
    """Return k-NN accuracy and feature statistics of every block, and what each adds (Fig. 3b, Fig. 3d, Table 14).

    train, test: features of the blocks in ascending order, (N, D) and (M, D) each; blocks: their 1-based numbers, by
    default 1, 2, ... Without labels (None), train is not read and there are statistics only. Rows, each with `block`:
    `block_knn_top1` in percent, as from `knn`, with `k` and `tau`; `block_mean`, `block_variance` and
    `block_effective_rank` of the test images; `block_knn_delta`, the gain over the previous block, from the second
    block on, see `normalised_deltas`.
    Raises ConfigError for k beyond the training set, DataError for features or labels that cannot be used.
    """
    numbers = list(range(1, len(test) + 1)) if blocks is None else list(blocks)
    labelled = train_y is not None and test_y is not None
    _check_blocks(numbers, len(train) if labelled else len(test), len(test))
    rows: list[Row] = []
    accuracies: list[float] = []
    for done, (number, test_x) in enumerate(zip(numbers, test, strict=True)):
        check_features(test_x, f"block {number}, validation")
        if train_y is not None and test_y is not None:
            accuracies.append(knn_accuracy(train[done], train_y, test_x, test_y, k=k, tau=tau, device=device))
            rows.append({"metric": "block_knn_top1", "value": accuracies[-1], "block": number, "k": k, "tau": tau})
        found = feature_statistics(test_x)._asdict()
        rows += [{"metric": f"block_{name}", "value": value, "block": number} for name, value in found.items()]
        if progress is not None:
            progress(done + 1, len(numbers))
    return rows + delta_rows("block_knn_delta", numbers, accuracies)


def delta_rows(
    metric: str, blocks: Sequence[int], values: Sequence[float], *, falling_is_better: bool = False
) -> list[Row]:
    """Return rows of what each block adds, from the second of `blocks` on; see `normalised_deltas`."""
    deltas = normalised_deltas(values, falling_is_better=falling_is_better)
    pairs = zip(blocks[1:], deltas, strict=False)  # no deltas without labels
    return [{"metric": metric, "value": delta, "block": block} for block, delta in pairs]


def feature_statistics(x: Matrix) -> FeatureStatistics:
    """Return the spread of features x (N, D), in float64; x is read twice, in blocks of rows; memory use is D x D.

    Features that are all constant have an effective rank of 1.
    """
    found = moments(x)
    eigenvalues = spectrum(found.covariance)
    variance = float(eigenvalues.sum() / x.shape[1])
    return FeatureStatistics(float(np.mean(found.mean)), variance, effective_rank(eigenvalues))


def normalised_deltas(values: Sequence[float], *, falling_is_better: bool = False) -> list[float]:
    """Return the improvement from each value to the next, divided by the largest improvement (Fig. 3d, Appendix C.2).

    falling_is_better: for a loss, where a decrease is an improvement. There is one delta fewer than values; each is at
    most 1. If nothing improves, the largest worsening is -1 (dividing by the largest delta would flip the signs);
    without any change, all are 0. The deltas of a NaN value are NaN.
    """
    deltas = np.diff(values) * (-1.0 if falling_is_better else 1.0)
    known = deltas[np.isfinite(deltas)]
    largest = known.max(initial=0) or np.abs(known).max(initial=0)
    return [float(delta) for delta in (deltas / largest if largest > 0 else deltas)]


def recommend_heads(knn_by_block: Sequence[float]) -> list[int]:
    """Return the blocks (1-based) for contrastive heads, from the k-NN accuracy of every block, first to last.

    The paper uses the last 8 of 24 and the last 12 of 32 blocks: the last third, rounded up to a multiple of four (4 of
    12, where the paper has no model). Heads belong on all later blocks, including the best one; earlier ones cost time
    and add nothing (Table 1a). So heads start at the first block of the last third, or at the best block (the first of
    equals) if it comes earlier, but never in the first half: a best block there only indicates a flat curve. They end
    at the last block. Raises DataError if no accuracy is finite.
    """
    accuracies = np.asarray(knn_by_block, dtype=np.float64)
    if not np.isfinite(accuracies).any():
        raise DataError("no block has a score to recommend heads by; check the encoder, or name blocks with --heads")
    depth = len(accuracies)
    third = 4 * -(-depth // 12)
    best = int(np.where(np.isfinite(accuracies), accuracies, -np.inf).argmax()) + 1
    first = max(min(best, depth - third + 1), depth // 2 + 1)
    return list(range(first, depth + 1))


def blocks_text(blocks: Sequence[int]) -> str:
    """Return blocks as `--heads` accepts them: `17-24`, `20,22,24` or `17-20,24`."""
    # Blocks of a consecutive run have the same difference between number and position.
    runs = [list(run) for _, run in groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)


def _check_blocks(numbers: Sequence[int], train: int, test: int) -> None:
    if not numbers:
        raise ConfigError("no block is named; give the features of at least one")
    if not len(numbers) == train == test:
        raise ConfigError(f"{len(numbers)} blocks are named, but features of {train} (train) and {test} (validation)")
    if any(later <= earlier for earlier, later in pairwise(numbers)):
        raise ConfigError(f"blocks {', '.join(map(str, numbers))}: name them in ascending order, each once")
