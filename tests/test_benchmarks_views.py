"""The benchmark's pipelines and rows at tiny sizes; how fast anything is, no test says."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import transforms
from torchvision.transforms import v2

from mimref.benchmarks import views as module
from mimref.benchmarks.views import ViewSizes, benchmark_views
from mimref.config.run import ViewsConfig
from mimref.data.views import multi_crop

TINY = ViewSizes(width=40, height=30, global_size=16, local_views=3, local_size=8, images=3, device_images=4, repeats=2)
CPU_PIPELINES = [module.PIL, module.PIL_BLUR, module.TENSORS, module.WORKER, module.WHOLE]


def test_rows_tell_what_was_measured() -> None:
    calls: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        state = torch.get_rng_state()
        rows = benchmark_views(sizes=TINY, progress=lambda done, total: calls.append((done, total)))
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)
    assert calls == [(i, 15) for i in range(1, 16)]
    assert [row["pipeline"] for row in rows] == CPU_PIPELINES
    for row in rows:
        assert row["metric"] == "benchmark_views"
        assert row["value"] == pytest.approx(1000 / float(row["ms"]))
        assert row["ratio"] == float(row["value"]) / float(rows[0]["value"])
        assert row["ratio_pillow_blur"] == float(row["value"]) / float(rows[1]["value"])
        assert (row["device"], row["views"], row["images"], row["repeats"]) == ("cpu", 5, 3, 2)
        assert (row["width"], row["height"]) == (40, 30)


@pytest.mark.gpu
def test_a_device_has_its_own_row() -> None:
    rows = benchmark_views(sizes=TINY, device="cuda")
    assert [row["pipeline"] for row in rows] == [*CPU_PIPELINES, module.DEVICE]
    assert (rows[-1]["device"], rows[-1]["images"]) == ("cuda", 4)


def views_per_size(views: list[torch.Tensor]) -> Counter[int]:
    counted: Counter[int] = Counter()
    for tensor in views:
        assert tensor.shape[-3] == 3
        assert tensor.shape[-1] == tensor.shape[-2]
        counted[tensor.shape[-1]] += tensor[..., 0, 0, 0].numel()
    return counted


def test_all_pipelines_make_the_same_number_of_views_of_every_size(tmp_path: Path) -> None:
    config = ViewsConfig(local_views=TINY.local_views, local_size=TINY.local_size)
    groups = multi_crop(config, TINY.global_size)
    source = module._photographs(str(tmp_path), TINY)
    ways = module._pipelines(source, groups, config)
    assert list(ways) == CPU_PIPELINES
    for name, way in ways.items():
        assert views_per_size(way(0)) == {16: 6, 8: 9}, name
        dtypes = {tensor.dtype for tensor in way(1)}
        assert dtypes == ({torch.uint8} if name == module.WORKER else {torch.float32})
    assert not torch.equal(ways[module.WORKER](0)[0], ways[module.WORKER](1)[0])  # every measurement cuts other crops
    photometric = module._on_device(module._crops(source, groups, 0), config, torch.device("cpu"), TINY.device_images)
    assert views_per_size(photometric(0)) == {16: 8, 8: 12}


@pytest.mark.parametrize("library", [transforms, v2], ids=["v1", "v2"])
def test_torchvisions_augmentations_have_our_settings(library: Any) -> None:
    views = module._augmentations(multi_crop(ViewsConfig(), 224), ViewsConfig(), library, transforms.ToTensor())
    assert len(views) == 12
    for number, view in enumerate(views):
        crop, flip, jitter, blur, gray, solarize, _, normalize = view.transforms
        local = number >= 2
        assert tuple(crop.size) == ((96, 96) if local else (224, 224))
        assert tuple(crop.scale) == ((0.05, 0.25) if local else (0.25, 1.0))
        assert tuple(crop.ratio) == (3 / 4, 4 / 3)
        assert crop.interpolation == transforms.InterpolationMode.BICUBIC
        assert (flip.p, jitter.p, gray.p) == (0.5, 0.8, 0.2)
        assert blur.p == (0.5 if local else (1.0, 0.1)[number])
        assert (solarize.threshold, solarize.p) == (128, 0.2 if number == 1 else 0.0)
        (colours,), (gaussian,) = jitter.transforms, blur.transforms
        assert tuple(colours.brightness) == tuple(colours.contrast) == (0.6, 1.4)
        assert tuple(colours.saturation) == (0.8, 1.2)
        assert tuple(colours.hue) == (-0.1, 0.1)
        assert tuple(gaussian.kernel_size) == (23, 23)
        assert tuple(gaussian.sigma) == (0.1, 2.0)
        assert list(normalize.mean) == [0.485, 0.456, 0.406]


def test_measurements_take_turns_and_the_first_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    now = [0.0]
    costs = {"a": [100.0, 1.0, 5.0, 3.0], "b": [100.0, 2.0, 2.0, 90.0]}

    def way(name: str, repeat: int) -> list[torch.Tensor]:
        order.append((name, repeat))
        now[0] += costs[name][repeat]
        return []

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    ways = {name: lambda repeat, name=name: way(name, repeat) for name in ("a", "b")}
    assert module._medians(ways, 3, None) == {"a": 3.0, "b": 2.0}
    assert order == [(name, repeat) for repeat in range(4) for name in ("a", "b")]


def test_threads_are_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        assert torch.get_num_threads() == 1
        raise RuntimeError("no photographs")

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(module, "_photographs", fail)
    try:
        with pytest.raises(RuntimeError, match="no photographs"):
            benchmark_views(sizes=TINY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
