"""k-NN against plain loops in float64 and against scikit-learn."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from mimref.errors import ConfigError, DataError
from mimref.evaluation.knn import protocol
from mimref.evaluation.knn.protocol import Neighbours, find_neighbours, knn, knn_accuracy, label_ranks
from mimref.evaluation.metrics import mean_and_std, vary
from mimref.features.matrix import SideBySide
from mimref.results import main_rows

Arrays = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]


def blobs(train: int = 120, test: int = 50, classes: int = 7, width: int = 6, seed: int = 0) -> Arrays:
    """Overlapping classes with features of very different scales; every class is in train."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    scale = np.logspace(-2, 2, width)

    def draw(n: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        y = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
        return ((centres[y] + rng.normal(size=(n, width)) + 3) * scale).astype(np.float32), y

    return *draw(train), *draw(test)


def loop_votes(arrays: Arrays, k: int, tau: float, standardize: bool = True) -> list[dict[int, float]]:
    """Votes per class for every test image, one image and one neighbour at a time, in float64."""
    train_x, train_y, test_x, _ = arrays
    train, test = train_x.astype(np.float64), test_x.astype(np.float64)
    if standardize:
        mean, std = train.mean(0), train.std(0)
        train, test = (train - mean) / std, (test - mean) / std
    result = []
    for query in test:
        sims = [
            (float(np.dot(query, row) / math.sqrt(query @ query) / math.sqrt(row @ row)), i)
            for i, row in enumerate(train)
        ]
        votes: dict[int, float] = {}
        for similarity, i in sorted(sims, key=lambda pair: (-pair[0], pair[1]))[:k]:
            votes[int(train_y[i])] = votes.get(int(train_y[i]), 0.0) + math.exp(similarity / tau)
        result.append(votes)
    return result


@pytest.mark.parametrize("standardize", [True, False])
def test_knn_equals_float64_loops(standardize: bool) -> None:
    arrays = blobs()
    ks, taus = (20, 1, 5), (0.07, 1.0)
    rows = {
        (row["metric"], row["k"], row["tau"]): row["value"]
        for row in knn(*arrays, k=ks, tau=taus, standardize=standardize)
    }
    assert list(rows)[:2] == [("knn_top1", 20, 0.07), ("knn_top5", 20, 0.07)]
    assert len(rows) == 12
    for k in ks:
        for tau in taus:
            hits = {1: 0, 5: 0}
            for votes, label in zip(loop_votes(arrays, k, tau, standardize), arrays[3], strict=True):
                ranking = sorted(votes, key=lambda c: (-votes[c], c))
                for top in hits:
                    hits[top] += int(label) in ranking[:top]
            assert rows["knn_top1", k, tau] == pytest.approx(100 * hits[1] / 50)
            assert rows["knn_top5", k, tau] == pytest.approx(100 * hits[5] / 50)


def test_knn_equals_scikit_learn() -> None:
    train_x, train_y, test_x, test_y = blobs(train=300, test=200, seed=1)
    scaler = StandardScaler().fit(train_x.astype(np.float64))
    for k, tau in ((1, 0.07), (10, 0.07), (50, 0.2)):
        model = KNeighborsClassifier(
            k, metric="cosine", weights=lambda d, t=tau: np.exp((1 - d) / t), algorithm="brute"
        )
        model.fit(scaler.transform(train_x.astype(np.float64)), train_y)
        expected = 100 * model.score(scaler.transform(test_x.astype(np.float64)), test_y)
        assert knn_accuracy(train_x, train_y, test_x, test_y, k=k, tau=tau) == pytest.approx(expected)


def set_chunks(monkeypatch: pytest.MonkeyPatch, query: int, train: int) -> None:
    monkeypatch.setattr(protocol, "QUERY_CHUNK", query)
    monkeypatch.setattr(protocol, "TRAIN_CHUNK", train)


def test_chunks_and_order_of_settings_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train_x, _, test_x, _ = blobs()
    whole = find_neighbours(train_x, test_x, k=15)
    arrays = blobs()
    alone = [knn(*arrays, k=(k,))[0]["value"] for k in (3, 30)]
    set_chunks(monkeypatch, 7, 11)
    pieces = find_neighbours(train_x, test_x, k=15)
    assert torch.equal(whole.train_index, pieces.train_index)
    torch.testing.assert_close(whole.similarity, pieces.similarity, atol=1e-6, rtol=0)
    assert bool((whole.similarity[:, :-1] >= whole.similarity[:, 1:]).all())
    assert [row["value"] for row in knn(*arrays, k=(30, 3)) if row["metric"] == "knn_top1"] == alone[::-1]


def test_equal_similarities_come_in_order_of_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are unit axes: products of zeros and ones are exact, so every tie is a true one."""
    rng = np.random.default_rng(0)
    train = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 60)]
    test = np.eye(4, dtype=np.float32)
    for chunk in (7, 60):
        set_chunks(monkeypatch, protocol.QUERY_CHUNK, chunk)
        found = find_neighbours(train, test, k=25, standardize=False)
        for query in range(4):
            expected = sorted(range(60), key=lambda i, q=query: (-float(train[i, q]), i))[:25]
            assert found.train_index[query].tolist() == expected


def test_labels_with_gaps_and_equal_votes() -> None:
    train_x, train_y, test_x, test_y = blobs()
    plain = knn(train_x, train_y, test_x, test_y)
    assert knn(train_x, train_y * 10 - 5, test_x, test_y * 10 - 5) == plain
    found = find_neighbours(np.eye(3, dtype=np.float32), np.ones((3, 3), dtype=np.float32), k=2, standardize=False)
    ranks = label_ranks(found, np.array([2, 1, 0]), np.array([0, 1, 2]), 3, k=(2,), tau=(0.07,))
    # The neighbours are rows 0 and 1, of classes 2 and 1: the lower label wins, and class 0 has no votes.
    assert ranks[2, 0.07].tolist() == [3, 0, 1]


def test_small_temperature_does_not_overflow() -> None:
    arrays = blobs()
    assert knn(*arrays, k=(10,), tau=(1e-4,))[0]["value"] == knn(*arrays, k=(1,))[0]["value"]


def test_top5_needs_five_classes() -> None:
    assert [row["metric"] for row in knn(*blobs(classes=4))] == ["knn_top1"]
    assert [row["metric"] for row in knn(*blobs(classes=5))] == ["knn_top1", "knn_top5"]


def test_statistics_are_exact_and_constant_features_stay_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimref.evaluation.metrics.BLOCK_ELEMENTS", 10)
    x = np.random.default_rng(0).normal(1000, 1e-2, size=(500, 3)).astype(np.float32)
    x[:, 1] = 0.1
    mean, std = mean_and_std(x)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(std[[0, 2]], x.astype(np.float64).std(0)[[0, 2]], rtol=1e-10)
    assert std[1] == 1


def test_reads_memory_mapped_half_precision(tmp_path: Path) -> None:
    train_x, train_y, test_x, test_y = blobs(width=4)
    np.save(tmp_path / "train.npy", train_x.astype(np.float16))
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    expected = knn(train_x.astype(np.float16).astype(np.float32), train_y, test_x, test_y)
    assert knn(mapped, train_y, test_x, test_y) == expected


def test_progress_reaches_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    train_x, _, test_x, _ = blobs()
    calls: list[tuple[int, int]] = []
    set_chunks(monkeypatch, 20, 50)
    find_neighbours(train_x, test_x, k=3, progress=lambda d, t: calls.append((d, t)))
    assert calls == [(i, 9) for i in range(1, 10)]


def test_refuses_what_cannot_be_evaluated() -> None:
    train_x, train_y, test_x, test_y = blobs()
    with pytest.raises(ConfigError, match=r"k = \[10, 121\].* 1 to 120"):
        knn(train_x, train_y, test_x, test_y, k=(10, 121))
    with pytest.raises(ConfigError, match=r"k = \[0\]"):
        knn(train_x, train_y, test_x, test_y, k=(0,))
    with pytest.raises(ConfigError, match=r"tau = \[0.0\]"):
        knn(train_x, train_y, test_x, test_y, tau=(0.0,))
    with pytest.raises(DataError, match="6 wide, test features 5"):
        knn(train_x, train_y, test_x[:, :5], test_y)
    with pytest.raises(DataError, match="class 42 has no training image"):
        knn(train_x, train_y, test_x, np.where(test_y == 3, 42, test_y))
    with pytest.raises(DataError, match="all images are of class 2"):
        knn(train_x, np.full_like(train_y, 2), test_x, np.full_like(test_y, 2))
    broken = test_x.copy()
    broken[4, 0] = np.nan
    with pytest.raises(DataError, match="test: features of image 4 "):
        knn(train_x, train_y, broken, test_y)


def test_votes_of_many_classes_equal_float64_loops() -> None:
    """With more classes than neighbours, only the neighbours' classes get votes, and many true classes get none."""
    arrays = blobs(train=200, test=150, classes=60)
    ks, taus = (2, 12), (0.07, 1.0)
    rows = {(row["metric"], row["k"], row["tau"]): row["value"] for row in knn(*arrays, k=ks, tau=taus)}
    for k in ks:
        for tau in taus:
            hits = {1: 0, 5: 0}
            for votes, label in zip(loop_votes(arrays, k, tau), arrays[3], strict=True):
                ranking = sorted(votes, key=lambda c: (-votes[c], c))
                for top in hits:
                    hits[top] += int(label) in ranking[:top]
            assert rows["knn_top1", k, tau] == pytest.approx(100 * hits[1] / 150)
            assert rows["knn_top5", k, tau] == pytest.approx(100 * hits[5] / 150)


def test_ranks_of_many_classes_equal_those_of_all_votes() -> None:
    rng = np.random.default_rng(0)
    found = Neighbours(
        torch.from_numpy(rng.integers(0, 9, (300, 8)) / 8).float().sort(1, descending=True).values,
        torch.from_numpy(rng.integers(0, 100, (300, 8))),
    )
    similarity, neighbours = found.similarity.double().numpy(), found.train_index.numpy()
    train_y, test_y = rng.integers(0, 12, 100), rng.integers(0, 12, 300)
    ranks = label_ranks(found, train_y, test_y, 12, k=(8, 1, 5), tau=(0.5,))
    assert list(ranks) == [(8, 0.5), (1, 0.5), (5, 0.5)]
    for (k, tau), rank in ranks.items():
        votes = np.zeros((300, 12))
        for j in range(k):
            votes[np.arange(300), train_y[neighbours[:, j]]] += np.exp((similarity[:, j] - similarity[:, 0]) / tau)
        own = votes[np.arange(300), test_y]
        for i in range(300):
            before = sum(votes[i, c] > own[i] or (votes[i, c] == own[i] and c < test_y[i]) for c in range(12))
            assert rank[i] == (before if own[i] > 0 else 12)


def test_recall_of_every_class() -> None:
    train_x, train_y, test_x, test_y = blobs()
    kept = test_y != 3
    arrays = (train_x, train_y * 2, test_x[kept], test_y[kept] * 2)
    rows = knn(*arrays, k=(5, 1), tau=(0.07, 0.5), per_class=True)
    assert main_rows(rows) == knn(*arrays, k=(5, 1), tau=(0.07, 0.5))
    details = [row for row in rows if "class" in row]
    assert len(details) == 4 * 6
    assert {row["metric"] for row in details} == {"knn_top1"}
    for main in (row for row in main_rows(rows) if row["metric"] == "knn_top1"):
        own = {row["class"]: row for row in details if (row["k"], row["tau"]) == (main["k"], main["tau"])}
        assert list(own) == [0, 2, 4, 8, 10, 12]
        for label, row in own.items():
            of_class = arrays[3] == label
            assert row["images"] == of_class.sum()
            k, tau = int(main["k"]), float(main["tau"])
            # The images of the class alone, with the same training images.
            assert row["value"] == knn_accuracy(*arrays[:2], arrays[2][of_class], arrays[3][of_class], k=k, tau=tau)
        mean = sum(float(row["value"]) * int(row["images"]) for row in own.values()) / int(kept.sum())
        assert main["value"] == pytest.approx(mean)


def test_parts_side_by_side_are_one_matrix(tmp_path: Path) -> None:
    train_x, train_y, test_x, test_y = blobs()
    np.save(tmp_path / "part.npy", train_x[:, :2].astype(np.float16))
    mapped = np.load(tmp_path / "part.npy", mmap_mode="r")
    train = SideBySide([mapped, train_x[:, 2:]])
    test = SideBySide([test_x[:, :5], test_x[:, 5:]])
    joined = np.concatenate([mapped.astype(np.float32), train_x[:, 2:]], axis=1)
    assert knn(train, train_y, test, test_y, k=(1, 9)) == knn(joined, train_y, test_x, test_y, k=(1, 9))


# (test rows, query chunk): runs of 3 and 4 chunks, the last chunk shorter; one chunk for two ranks; one row.
RANK_CASES = ((50, 8), (10, 16), (1, 4))


def rank_results(process_group_of: int) -> list[Neighbours]:
    """Neighbours in every case, as found by one rank or by one process alone; see test_evaluation_ranks."""
    train_x, train_y, test_x, test_y = blobs(train=130, test=50)
    found = []
    for count, chunk in RANK_CASES:
        with pytest.MonkeyPatch.context() as patch:
            set_chunks(patch, chunk, 40)
            found.append(find_neighbours(train_x, test_x[:count], k=11))
    assert process_group_of == (dist.get_world_size() if dist.is_initialized() else 1)
    rows = knn(train_x, train_y, test_x, test_y, k=(1, 11), per_class=True)
    values = torch.tensor([float(row["value"]) for row in rows])
    return [*found, Neighbours(values, torch.empty(0))]


MEMORY_SCRIPT = """
import sys, threading, time
import numpy as np
from mimref.evaluation.knn.protocol import knn

def anonymous_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous_mb())
        done.wait(0.05)

train, test = (np.load(path, mmap_mode="r") for path in sys.argv[1:])
train_y, test_y = np.arange(len(train)) % 1000, np.arange(len(test)) % 1000
start, peak, done = anonymous_mb(), [0.0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
knn(train, train_y, test, test_y, k=(1, 10, 200))
done.set()
thread.join()
print(peak[0] - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_memory_does_not_grow_with_the_training_images(tmp_path: Path, dtype: type[np.floating]) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("RssAnon is told by Linux alone")
    rng = np.random.default_rng(0)
    block = rng.standard_normal((10_000, 768), dtype=np.float32)
    train = np.lib.format.open_memmap(tmp_path / "train.npy", mode="w+", dtype=dtype, shape=(300_000, 768))
    for number in range(30):  # columns are shifted differently in every block, so that no two rows are alike
        train[number * 10_000 : (number + 1) * 10_000] = np.roll(block, number, axis=1)
    train.flush()
    del train
    np.save(tmp_path / "test.npy", rng.standard_normal((2_000, 768)).astype(dtype))
    try:
        command = [sys.executable, "-c", MEMORY_SCRIPT, tmp_path / "train.npy", tmp_path / "test.npy"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    finally:
        (tmp_path / "train.npy").unlink()
    assert done.returncode == 0, done.stderr
    print(f"{dtype.__name__}: {float(done.stdout):.0f} MB of anonymous memory")
    assert float(done.stdout) < 1000


@pytest.mark.parametrize("standardize", [True, False])
def test_training_features_that_do_not_vary_have_no_neighbours(standardize: bool) -> None:
    _, y, test_x, test_y = blobs(classes=5)
    flat = np.full((len(y), test_x.shape[1]), 3.3, dtype=np.float16)
    rows = knn(flat, y, test_x, test_y, k=(1, 5), standardize=standardize, per_class=True)
    assert {row["metric"] for row in rows} == {"knn_top1", "knn_top5"}
    assert all(math.isnan(float(row["value"])) for row in rows)
    # One row that differs is enough; so is one feature that varies, however large the others are.
    flat[-1, 0] = 3.5
    assert all(math.isfinite(float(row["value"])) for row in knn(flat, y, test_x, test_y, standardize=standardize))
    assert not vary(np.ones((3, 2), dtype=np.float32)) and vary(np.array([[1e6, 0], [1e6, 3], [1e6, 1]], np.float32))
    assert not vary(np.zeros((3, 2), dtype=np.float32))
