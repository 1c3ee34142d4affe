"""k-means clustering against scikit-learn used directly; results do not depend on the number of processes."""

import math
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.backend.context import set_start_method
from numpy.typing import NDArray
from sklearn import metrics as reference
from sklearn.cluster import MiniBatchKMeans

from mimref.errors import ConfigError, DataError
from mimref.evaluation.cluster import protocol as module
from mimref.evaluation.cluster.protocol import SEPARATION, cluster, cluster_accuracy, kmeans_run
from mimref.evaluation.metrics import unit_rows
from mimref.features.matrix import SideBySide
from tests.ranks import fork_server

ALL = ("acc", "nmi", "ami", "ari", "sil", "dbs")


def blobs(n: int = 200, classes: int = 5, width: int = 8) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    y = np.arange(n) % classes
    return (rng.normal(size=(classes, width))[y] + 0.8 * rng.normal(size=(n, width))).astype(np.float32), y


def unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    wide = x.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True), dtype=np.float32)


def test_scores_are_those_of_the_run_with_least_inertia() -> None:
    x, y = blobs()
    points = unit(x)
    rows = {row["metric"]: row for row in cluster(x, y * 10 + 1, metrics=ALL, runs=8, seed=5, workers=1)}
    assert list(rows) == list(module.NAMES.values())
    inertias, accs, nmis, amis, aris = [], [], [], [], []
    for number in range(8):
        state = int(np.random.SeedSequence([5, number]).generate_state(1)[0])
        model = MiniBatchKMeans(n_clusters=5, n_init=1, random_state=state).fit(points)
        centres = model.cluster_centers_.astype(np.float64)
        inertias.append(sum(float(((p - centres[c]) ** 2).sum()) for p, c in zip(points, model.labels_, strict=True)))
        accs.append(cluster_accuracy(y, model.labels_))
        nmis.append(100 * reference.normalized_mutual_info_score(y, model.labels_))
        amis.append(100 * reference.adjusted_mutual_info_score(y, model.labels_))
        aris.append(100 * reference.adjusted_rand_score(y, model.labels_))
    best = int(np.argmin(inertias))
    for name, scores in (("cluster_acc", accs), ("cluster_nmi", nmis), ("cluster_ami", amis), ("cluster_ari", aris)):
        assert rows[name]["value"] == pytest.approx(scores[best])
        assert rows[name]["mean"] == pytest.approx(np.mean(scores))
        assert rows[name]["std"] == pytest.approx(np.std(scores, ddof=1))
        assert rows[name]["runs"] == 8
    assert rows["silhouette"]["value"] == pytest.approx(100 * reference.silhouette_score(points, y), abs=1e-3)
    assert rows["davies_bouldin"]["value"] == pytest.approx(reference.davies_bouldin_score(points, y))


def test_other_numbers_of_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of the clusters equal those of scikit-learn for the labels of the best run."""
    x, y = blobs()
    points = unit(x)
    models = []
    for number in range(4):
        state = int(np.random.SeedSequence([5, number]).generate_state(1)[0])
        models.append(MiniBatchKMeans(n_clusters=7, n_init=1, random_state=state).fit(points))
    best = min(models, key=lambda model: model.inertia_).labels_
    rows = cluster(x, y, clusters=7, metrics=("acc", "sil", "dbs"), runs=4, seed=5, workers=1)
    names = ["cluster_acc", "silhouette", "davies_bouldin", "cluster_silhouette", "cluster_davies_bouldin"]
    assert [row["metric"] for row in rows] == names
    found = {str(row["metric"]): row["value"] for row in rows}
    assert found["cluster_acc"] == pytest.approx(cluster_accuracy(y, best))
    assert found["silhouette"] == pytest.approx(100 * reference.silhouette_score(points, y), abs=1e-3)
    assert found["cluster_silhouette"] == pytest.approx(100 * reference.silhouette_score(points, best), abs=1e-3)
    assert found["cluster_davies_bouldin"] == pytest.approx(reference.davies_bouldin_score(points, best))
    alone = cluster(x, None, clusters=7, metrics=("acc", "sil", "dbs"), runs=4, seed=5, workers=1)
    assert alone == rows[3:]
    with pytest.raises(ConfigError, match="number of clusters"):
        cluster(x, None)
    with pytest.raises(ConfigError, match="clusters 200 need more than the 200"):
        cluster(x, None, clusters=200)


def test_clusters_of_collapsed_features_are_not_scored() -> None:
    rows = cluster(np.ones((60, 8), np.float32), None, clusters=3, metrics=("sil", "dbs"), runs=2)
    assert [math.isnan(float(row["value"])) for row in rows] == [True, True]


@pytest.fixture
def forked_processes() -> Iterator[None]:
    """Fork joblib's processes from one that has already imported the package; the import takes seconds."""
    fork_server()
    set_start_method("forkserver", force=True)
    yield
    get_reusable_executor().shutdown(wait=True)
    set_start_method("loky", force=True)


@pytest.mark.usefixtures("forked_processes")
def test_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs()
    serial = cluster(x, y, metrics=ALL, runs=6)
    monkeypatch.setattr(module, "SERIAL_WORK", 0)
    calls: list[tuple[int, int]] = []
    assert cluster(x, y, metrics=ALL, runs=6, workers=2, progress=lambda d, t: calls.append((d, t))) == serial
    assert calls == [(i, 6) for i in range(1, 7)]


def test_runs_and_seeds_are_independent() -> None:
    x, y = blobs()
    points = unit(x)
    runs = [kmeans_run(points, y, ("acc",), 5, number, seed) for seed in (0, 1) for number in range(4)]
    assert len({run.inertia for run in runs}) > 4
    assert runs[2] == kmeans_run(points, y, ("acc",), 5, 2, 0)
    assert cluster(x, y, runs=4, seed=1) == cluster(x, y, runs=4, seed=1)


def test_separation_needs_no_clustering(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("k-means was run")

    monkeypatch.setattr(module, "kmeans_run", refuse)
    assert [row["metric"] for row in cluster(*blobs(), metrics=("dbs", "sil"))] == ["davies_bouldin", "silhouette"]


def test_half_precision_parts_are_one_matrix(tmp_path: Path) -> None:
    x, y = blobs()
    np.save(tmp_path / "x.npy", x.astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = cluster(x.astype(np.float16).astype(np.float32), y, metrics=ALL, runs=3)
    assert cluster(mapped, y, metrics=ALL, runs=3) == expected
    assert cluster(SideBySide([mapped[:, :3], mapped[:, 3:]]), y, metrics=ALL, runs=3) == expected


def test_collapsed_features_have_scores() -> None:
    _, y = blobs()
    rows = cluster(np.ones((200, 8), dtype=np.float32), y, runs=2)
    assert rows[0]["value"] == pytest.approx(20)
    assert rows[1]["value"] == pytest.approx(0)


def test_refuses_what_cannot_be_evaluated() -> None:
    x, y = blobs()
    with pytest.raises(ConfigError, match=r"unknown metric 'nmu'.*did you mean 'nmi'"):
        cluster(x, y, metrics=("acc", "nmu"))
    with pytest.raises(ConfigError, match="none given"):
        cluster(x, y, metrics=())
    with pytest.raises(ConfigError, match="runs = 0"):
        cluster(x, y, runs=0)
    with pytest.raises(ConfigError, match="workers = 0"):
        cluster(x, y, workers=0)
    with pytest.raises(DataError, match=r"200 clusters .* more than 200 images"):
        cluster(x, np.arange(200))
    with pytest.raises(DataError, match="all images are of class 3"):
        cluster(x, np.full_like(y, 3))
    x[7, 0] = np.nan
    with pytest.raises(DataError, match="features of image 7 "):
        cluster(x, y)


# --- undefined scores


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_collapsed_features_have_no_separation(noise: float) -> None:
    """scikit-learn scores them with Davies-Bouldin 0, the best possible value, and silhouette 0."""
    y = np.arange(60) % 6
    x = (np.full((60, 16), 0.7) * (1 + noise * np.random.default_rng(0).normal(size=(60, 16)))).astype(np.float32)
    rows = {row["metric"]: float(row["value"]) for row in cluster(x, y, metrics=ALL, runs=2)}
    assert math.isnan(rows["davies_bouldin"]) and math.isnan(rows["silhouette"])
    # k-means is at chance level, which is still a defined score.
    assert rows["cluster_acc"] < 50 and math.isfinite(rows["cluster_nmi"])


def test_classes_with_one_centre_have_no_davies_bouldin() -> None:
    """scikit-learn ignores their zero distance, so its score is lower (better) than without the class."""
    x, y = blobs(classes=3)
    doubled, also = np.concatenate([x, x[y == 0]]), np.concatenate([y, np.full((y == 0).sum(), 3)])
    rows = {row["metric"]: float(row["value"]) for row in cluster(doubled, also, metrics=("sil", "dbs"))}
    assert math.isnan(rows["davies_bouldin"])
    assert rows["silhouette"] == pytest.approx(100 * reference.silhouette_score(unit(doubled), also), abs=1e-3)


@pytest.mark.parametrize("classes", [1, 8])
def test_single_images_and_single_classes_have_no_separation(classes: int) -> None:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    points, y = unit_rows(x), np.arange(8) % classes
    assert all(math.isnan(score(points, y)) for score in SEPARATION.values())


def test_every_image_in_a_class_of_its_own() -> None:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    rows = cluster(x, np.arange(8), clusters=3, metrics=("acc", "sil", "dbs"), runs=2)
    values = {row["metric"]: row["value"] for row in rows}
    assert math.isnan(values["silhouette"]) and math.isnan(values["davies_bouldin"])
    assert values["cluster_acc"] == 37.5 and math.isfinite(values["cluster_silhouette"])


def test_classes_without_spread_are_the_best_there_is() -> None:
    x, y = np.eye(4, dtype=np.float32)[np.arange(20) % 4], np.arange(20) % 4
    rows = {row["metric"]: float(row["value"]) for row in cluster(x, y, metrics=("sil", "dbs"))}
    assert rows == {"davies_bouldin": 0.0, "silhouette": 100.0}


def test_runs_of_processes_that_die_are_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs()
    expected = cluster(x, y, runs=5, workers=1)
    monkeypatch.setattr(module, "SERIAL_WORK", 0.0)
    parallel = module.Parallel

    class Dying:
        def __init__(self, n_jobs: int, **options: Any) -> None:
            assert n_jobs == 2
            self.work = parallel(n_jobs=1, **options)

        def __call__(self, calls: Any) -> Any:
            for number, run in enumerate(self.work(calls)):
                if number == 3:
                    raise BrokenExecutor("a process was killed")
                yield run

    monkeypatch.setattr(module, "Parallel", Dying)
    assert cluster(x, y, runs=5, workers=2) == expected
