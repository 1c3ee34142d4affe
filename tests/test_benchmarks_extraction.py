"""The pipelines that make evaluation crops, at tiny sizes; no test checks speed."""

from pathlib import Path

import pytest
import torch

from mimref.benchmarks import extraction as module
from mimref.benchmarks.extraction import benchmark_extraction
from mimref.benchmarks.views import ViewSizes, photographs
from mimref.data.transforms import EvalTransform

TINY = ViewSizes(width=60, height=45, global_size=28, images=2, repeats=1)


def test_rows_are_rates_and_ratios() -> None:
    calls: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    rows = benchmark_extraction(sizes=TINY, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 10) for done in range(1, 11)] and torch.get_num_threads() == threads
    pipelines = [module.TORCHVISION, module.TIMM, module.WORKER, module.WHOLE, module.READER]
    assert [row["pipeline"] for row in rows] == pipelines
    for row in rows:
        assert row["metric"] == "benchmark_extraction" and row["value"] == pytest.approx(1000 / float(row["ms"]))
        assert row["ratio"] == float(row["value"]) / float(rows[0]["value"])
        assert row["ratio_timm"] == float(row["value"]) / float(rows[1]["value"])
        assert (row["device"], row["images"], row["width"], row["height"]) == ("cpu", 2, 60, 45)


def test_all_pipelines_make_the_same_crops(tmp_path: Path) -> None:
    transform = EvalTransform(TINY.global_size)
    ways = module._pipelines(photographs(str(tmp_path), TINY), transform, torch.device("cpu"))
    expected, content = ways[module.WHOLE](), ways.pop(module.READER)()
    assert len(content) == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert expected.shape == (2, 3, 28, 28)
    for name, way in ways.items():
        crops = way()
        crops = transform.normalize(crops) if crops.dtype == torch.uint8 else crops
        # Pillow's and torch's resizing sometimes differ by one level, which is 0.02 once normalised.
        assert (crops - expected).abs().max() < 0.05, name


@pytest.mark.gpu
def test_a_gpu_decodes_too() -> None:
    rows = benchmark_extraction(sizes=TINY, device="cuda")
    assert (rows[-1]["pipeline"], rows[-1]["device"]) == (module.DECODED, "cuda")
