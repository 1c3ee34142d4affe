"""Low-shot logistic regression against scikit-learn, and the drawing of splits."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

from mimref.errors import ConfigError, DataError
from mimref.evaluation.lowshot.protocol import LAMBDA, TOLERANCE, draw_split, fit_logistic, lowshot
from mimref.evaluation.lowshot.split_files import read_split_files
from mimref.features.matrix import SideBySide
from mimref.results import main_rows

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


def digits(classes: int = 10) -> tuple[NDArray[np.float32], Labels, NDArray[np.float32], Labels]:
    x, y = load_digits(n_class=classes, return_X_y=True)
    x, y = x.astype(np.float32), y.astype(np.int64)
    return x[::2], y[::2], x[1::2], y[1::2]


def normalised(x: NDArray[np.float32]) -> Array:
    centred = x.astype(np.float64) - x.astype(np.float64).mean(1, keepdims=True)
    return np.asarray(centred / np.linalg.norm(centred, axis=1, keepdims=True))


def objective(weights: Array, x: Array, y: Labels) -> float:
    """Mean cross-entropy + lambda / 2 * |W|^2 with lambda = LAMBDA / n."""
    scores = x @ weights
    loss = (logsumexp(scores, axis=1) - scores[np.arange(len(y)), y]).mean()
    return float(loss + LAMBDA / len(x) / 2 * np.square(weights).sum())


@pytest.mark.parametrize("shots", [1, 5])
def test_fit_equals_scikit_learn(shots: int) -> None:
    train_x, train_y, test_x, _ = digits()
    split = draw_split(train_y, shots, split=0, seed=0)
    x, y, test = normalised(train_x[split]), train_y[split], normalised(test_x)
    weights = fit_logistic(x, y, 10)
    # scikit-learn minimises C * sum of losses + |W|^2 / 2, so C = 1 / (n lambda).
    reference = LogisticRegression(C=1 / LAMBDA, fit_intercept=False, tol=1e-8, max_iter=10000).fit(x, y)
    best = objective(reference.coef_.T, x, y)
    assert best <= objective(weights, x, y) <= best * (1 + 2 * TOLERANCE)
    assert ((test @ weights).argmax(1) == reference.predict(test)).mean() > 0.99


def test_two_classes_equal_scikit_learn() -> None:
    train_x, train_y, test_x, test_y = digits(2)
    split = draw_split(train_y, 5, split=0, seed=0)
    x, y = normalised(train_x[split]), train_y[split]
    weights = fit_logistic(x, y, 2)
    reference = LogisticRegression(C=1 / LAMBDA, fit_intercept=False, tol=1e-8, max_iter=10000).fit(x, y)
    margin = weights[:, 1] - weights[:, 0]

    def binary(w: Array) -> float:
        return float(np.logaddexp(0, -(2 * y - 1) * (x @ w)).mean() + LAMBDA / len(x) / 2 * (w @ w))

    assert binary(margin) <= binary(reference.coef_[0]) * (1 + 2 * TOLERANCE)
    assert main_rows(lowshot(train_x, train_y, test_x, test_y, shots=(5,)))[0]["value"] > 95


def test_rows() -> None:
    rows = lowshot(*digits(), shots=(2, 1), splits=3)
    assert [row["shots"] for row in main_rows(rows)] == [2, 1]
    for main in main_rows(rows):
        scores = [row["value"] for row in rows if row["shots"] == main["shots"] and "split" in row]
        assert [row["split"] for row in rows if row["shots"] == main["shots"] and "split" in row] == [0, 1, 2]
        assert main["value"] == main["mean"] == pytest.approx(np.mean(scores))
        assert main["std"] == pytest.approx(np.std(scores, ddof=1))
        assert main["splits"] == 3
    assert main_rows(lowshot(*digits(), shots=(1,), splits=1))[0]["std"] == 0


def test_same_seed_same_numbers_whatever_else_is_asked() -> None:
    arrays = digits()
    rows = lowshot(*arrays, shots=(1, 2), splits=2, seed=3)
    assert lowshot(*arrays, shots=(1, 2), splits=2, seed=3) == rows
    more = lowshot(*arrays, shots=(5, 2), splits=4, seed=3)
    assert [row for row in rows if row["shots"] == 2 and "split" in row] == [
        row for row in more if row["shots"] == 2 and row.get("split", 9) in (0, 1)
    ]
    assert lowshot(*arrays, shots=(1, 2), splits=2, seed=4) != rows


def test_labels_with_gaps() -> None:
    train_x, train_y, test_x, test_y = digits()
    assert lowshot(train_x, train_y * 3 + 7, test_x, test_y * 3 + 7, shots=(2,)) == lowshot(
        train_x, train_y, test_x, test_y, shots=(2,)
    )


def test_draws_have_the_right_size_and_differ() -> None:
    y = np.repeat([4, 8, 15], 20)
    draws = [draw_split(y, 3, split=split, seed=seed) for split in range(3) for seed in range(3)]
    for draw in draws:
        assert len(set(draw.tolist())) == 9
        assert y[draw].tolist() == [4] * 3 + [8] * 3 + [15] * 3
    assert len({tuple(draw.tolist()) for draw in draws}) == 9


def test_given_splits() -> None:
    train_x, train_y, test_x, test_y = digits()
    one, two = (draw_split(train_y, shots, split=0, seed=0) for shots in (1, 2))
    rows = lowshot(train_x, train_y, test_x, test_y, splits=[one.tolist(), two.tolist()])
    drawn = lowshot(train_x, train_y, test_x, test_y, shots=(1, 2), splits=1)
    assert rows == drawn


def test_rows_name_their_protocol() -> None:
    assert {row["protocol"] for row in lowshot(*digits(), shots=(1,), splits=2)} == {"logistic regression"}


def test_splits_from_files(tmp_path: Path) -> None:
    train_x, train_y, test_x, test_y = digits()
    names = [f"train/{label}/{index}.png" for index, label in enumerate(train_y)]
    draws = [draw_split(train_y, 2, split=split, seed=0) for split in range(2)]
    for number, draw in enumerate(draws):
        (tmp_path / f"{number}.txt").write_text("".join(f"{index}.png\n" for index in draw))
    splits = read_split_files([tmp_path / "0.txt", tmp_path / "1.txt"], names)
    drawn = lowshot(train_x, train_y, test_x, test_y, shots=(2,), splits=2)
    assert lowshot(train_x, train_y, test_x, test_y, splits=splits) == drawn


class Reads:
    """A matrix that remembers the largest number of rows read at once."""

    ndim = 2

    def __init__(self, x: NDArray[np.floating]) -> None:
        self.x, self.shape, self.dtype = x, x.shape, x.dtype
        self.most = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> NDArray[np.floating]:
        found = self.x[rows]
        self.most = max(self.most, len(found))
        return found


def test_half_precision_parts_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_x, train_y, test_x, test_y = digits()
    expected = lowshot(train_x, train_y, test_x, test_y, shots=(2,))
    # Pixels are integers up to 16, which half precision represents exactly.
    np.save(tmp_path / "train.npy", train_x[:, :30].astype(np.float16))
    train = SideBySide([np.load(tmp_path / "train.npy", mmap_mode="r"), train_x[:, 30:].astype(np.float16)])
    reads = Reads(test_x.astype(np.float16))
    monkeypatch.setattr("mimref.evaluation.metrics.BLOCK_ELEMENTS", 64 * 100)
    assert lowshot(train, train_y, reads, test_y, shots=(2,)) == expected
    assert reads.most == 100


def test_nothing_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    train_x, train_y, test_x, test_y = digits()
    lowshot(train_x, train_y * 3, test_x, test_y * 3, shots=(5, 20))
    arrays = digits(2)
    lowshot(*arrays, shots=(1, 50))
    assert capfd.readouterr() == ("", "")


def test_refuses_what_cannot_be_evaluated() -> None:
    train_x, train_y, test_x, test_y = digits()
    few = np.concatenate([np.flatnonzero(train_y != 6), np.flatnonzero(train_y == 6)[:3]])
    with pytest.raises(DataError, match=r"class 6 has only 3 training images.*5 shots"):
        lowshot(train_x[few], train_y[few], test_x, test_y, shots=(1, 5))
    with pytest.raises(DataError, match="class 99 has no training image"):
        lowshot(train_x, train_y, test_x, np.where(test_y == 1, 99, test_y))
    with pytest.raises(DataError, match="all images are of class 0"):
        lowshot(train_x, train_y * 0, test_x, test_y * 0)
    with pytest.raises(DataError, match="64 wide, test features 63"):
        lowshot(train_x, train_y, test_x[:, :63], test_y)
    with pytest.raises(ConfigError, match="splits = 0"):
        lowshot(train_x, train_y, test_x, test_y, splits=0)
    with pytest.raises(ConfigError, match="shots = "):
        lowshot(train_x, train_y, test_x, test_y, shots=(0,))
    with pytest.raises(DataError, match=r"split 0: index 898 is outside"):
        lowshot(train_x[:898], train_y[:898], test_x, test_y, splits=[[*range(20), 898]])
    with pytest.raises(DataError, match="split 1: a training image is listed twice"):
        lowshot(train_x, train_y, test_x, test_y, splits=[list(range(80)), [*range(80), 3]])
    with pytest.raises(DataError, match="split 0: class 7 has no image"):
        lowshot(train_x, train_y, test_x, test_y, splits=[np.flatnonzero(train_y != 7).tolist()])
    broken = train_x.copy()
    broken[0, 0] = np.inf
    with pytest.raises(DataError, match="train: features of image 0 "):
        lowshot(broken, train_y, test_x, test_y)


def test_openmp_of_the_calling_thread_is_left_as_it_was() -> None:
    # With OpenMP's dynamic teams on, as cyanure leaves them, torch's multi-threaded products are wrong, even NaN.
    train_x, _, _, _ = digits()
    rows = normalised(train_x[:10])
    fit_logistic(rows, np.arange(10), 10)  # cyanure's runtime is loaded now
    runtimes = [ctypes.CDLL(pool["filepath"]) for pool in threadpool_info() if pool["user_api"] == "openmp"]
    with threadpool_limits(limits=3, user_api="openmp"):
        fit_logistic(rows, np.arange(10), 10)
        state = [(runtime.omp_get_dynamic(), runtime.omp_get_max_threads()) for runtime in runtimes]
    assert runtimes
    assert state == [(0, 3)] * len(runtimes)


def test_without_cyanure_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cyanure.estimators", None)
    with pytest.raises(ConfigError, match=r"^[^\n]*cyanure[^\n]*libopenblas-dev[^\n]*pip install [^\n]*$"):
        fit_logistic(np.eye(2), np.arange(2), 2)
