"""The benchmark's rows at tiny sizes; how fast anything is, no test says."""

import pytest

from mimref.benchmarks import evaluations as benchmark
from mimref.benchmarks.evaluations import Sizes, benchmark_evaluations

TINY = Sizes(
    knn_train=300,
    knn_test=20,
    knn_width=4,
    knn_classes=3,
    kmeans_images=60,
    kmeans_width=4,
    kmeans_classes=3,
    kmeans_runs=2,
    probe_batch=8,
    probe_width=2,
    probe_classes=3,
    probe_steps=2,
    repeats=2,
)


def test_rows_tell_what_was_measured() -> None:
    calls: list[tuple[int, int]] = []
    rows = benchmark_evaluations(sizes=TINY, workers=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 18) for i in range(1, 19)]
    sweep, kmeans, probe = rows
    assert [row["metric"] for row in rows] == [
        "benchmark_knn_sweep_ratio",
        "benchmark_kmeans_speedup",
        "benchmark_probe_speedup",
    ]
    assert sweep["value"] == float(sweep["ten_s"]) / float(sweep["one_s"])
    assert (sweep["train"], sweep["test"], sweep["width"], sweep["classes"]) == (300, 20, 4, 3)
    assert kmeans["value"] == float(kmeans["one_s"]) / float(kmeans["all_s"])
    assert (kmeans["workers"], kmeans["runs"], kmeans["images"]) == (1, 2, 60)
    assert probe["value"] == float(probe["separate_s"]) / float(probe["together_s"])
    assert (probe["classifiers"], probe["batch"]) == (52, 8)


def test_medians_are_of_alternating_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now = [0.0]
    costs = {"a": iter([100.0, 1.0, 5.0, 3.0]), "b": iter([100.0, 2.0, 2.0, 90.0])}

    def way(name: str) -> None:
        order.append(name)
        now[0] += next(costs[name])

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    assert benchmark._medians((lambda: way("a"), lambda: way("b")), Sizes(repeats=3), None) == [3.0, 2.0]
    assert order == ["a", "b"] * 4
