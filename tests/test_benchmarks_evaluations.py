"""The benchmark's rows at tiny sizes; no test checks speed."""

from mimref.benchmarks.evaluations import Sizes, benchmark_evaluations

KNN = {"knn_train": 300, "knn_test": 20, "knn_width": 4, "knn_classes": 3}
KMEANS = {"kmeans_images": 60, "kmeans_width": 4, "kmeans_classes": 3, "kmeans_runs": 2}
PROBE = {"probe_batch": 8, "probe_width": 2, "probe_classes": 3, "probe_steps": 2}


def test_rows_are_ratios_of_times_with_the_sizes_measured() -> None:
    calls: list[tuple[int, int]] = []
    sweep, kmeans, probe = benchmark_evaluations(
        sizes=Sizes(**KNN, **KMEANS, **PROBE, repeats=1), progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(done, 12) for done in range(1, 13)]
    assert sweep["metric"] == "benchmark_knn_sweep_ratio"
    assert sweep["value"] == float(sweep["ten_s"]) / float(sweep["one_s"])
    assert (sweep["train"], sweep["test"], sweep["width"], sweep["classes"]) == (300, 20, 4, 3)
    assert kmeans["metric"] == "benchmark_kmeans_speedup"
    assert kmeans["value"] == float(kmeans["one_s"]) / float(kmeans["all_s"])
    assert (kmeans["runs"], kmeans["images"]) == (2, 60)
    assert probe["metric"] == "benchmark_probe_speedup"
    assert probe["value"] == float(probe["separate_s"]) / float(probe["together_s"])
    assert (probe["classifiers"], probe["batch"]) == (52, 8)
