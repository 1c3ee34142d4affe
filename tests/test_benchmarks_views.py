"""The benchmark's pipelines and rows at tiny sizes; no test checks speed."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import transforms
from torchvision.transforms import v2

from mimref.benchmarks import libraries
from mimref.benchmarks import views as module
from mimref.benchmarks.views import ViewSizes, benchmark_views
from mimref.config.run import ViewsConfig
from mimref.data.views import multi_crop

TINY = ViewSizes(width=40, height=30, global_size=16, local_views=3, local_size=8, images=3, device_images=4, repeats=1)
CPU_PIPELINES = [module.PIL, module.PIL_BLUR, module.TENSORS, module.WORKER, module.WHOLE, module.READER]


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "library_ways", lambda *_: ({}, []))


def test_rows_are_rates_and_ratios_and_the_settings_of_torch_are_restored(
    no_libraries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        rows = benchmark_views(sizes=TINY, progress=lambda done, total: calls.append((done, total)))
        monkeypatch.delattr(module, "photographs")
        with pytest.raises(NameError):
            benchmark_views(sizes=TINY)
        assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)
    assert calls == [(done, 12) for done in range(1, 13)]
    assert [row["pipeline"] for row in rows] == CPU_PIPELINES
    for row in rows:
        assert row["metric"] == "benchmark_views" and row["value"] == pytest.approx(1000 / float(row["ms"]))
        assert row["ratio"] == float(row["value"]) / float(rows[0]["value"])
        assert row["ratio_pillow_blur"] == float(row["value"]) / float(rows[1]["value"])
        assert (row["device"], row["views"], row["images"], row["repeats"]) == ("cpu", 5, 3, 1)
        assert (row["width"], row["height"]) == (40, 30)


@pytest.mark.gpu
def test_a_device_has_rows_of_its_own(no_libraries: None) -> None:
    rows = benchmark_views(sizes=TINY, device="cuda")
    assert [row["pipeline"] for row in rows] == [*CPU_PIPELINES, module.DEVICE, module.DECODED]
    assert [(row["device"], row["images"]) for row in rows[-2:]] == [("cuda", 4), ("cuda", 3)]
    assert float(rows[-1]["difference"]) < 2


def test_decoding_on_the_device_is_measured_and_compared(no_libraries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users decode on CUDA; here the CPU stands in for it."""
    monkeypatch.setattr(module, "resolve_device", lambda _: StandIn("cpu"))
    monkeypatch.setattr(module, "decoding_device", lambda *_: None)
    for name in ("_decoded", "_crops"):
        given = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, given=given: given(*map(StandIn.real, args)))
    monkeypatch.setattr(module, "_on_device", lambda *args: lambda epoch: [])
    *_, decoded = benchmark_views(sizes=TINY)
    assert decoded["pipeline"] == module.DECODED
    assert 0 <= float(decoded["difference"]) < 0.05 and float(decoded["largest_difference"]) <= 2


class StandIn:
    """A device that claims to be CUDA."""

    type = "cuda"

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def real(given: Any) -> Any:
        return torch.device(given.name) if isinstance(given, StandIn) else given


def test_libraries_that_are_missing_or_fail_have_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("no driver\nsecond line")

    monkeypatch.setattr(libraries, "_installed", lambda name: name != "kornia")
    monkeypatch.setattr(libraries, "_dali", fails)
    ways, missing = libraries.library_ways([], [], ViewsConfig(), torch.device("cpu"))
    assert ways == {} and missing == [
        f"not compared with {libraries.KORNIA}: pip install kornia",
        f"not compared with {libraries.DALI}: no driver",
    ]


@pytest.mark.parametrize(("name", "package"), [(libraries.KORNIA, "kornia"), (libraries.DALI, "nvidia.dali")])
def test_libraries_make_all_views(name: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    source = module.photographs(str(tmp_path), TINY)
    config = ViewsConfig(local_views=TINY.local_views, local_size=TINY.local_size)
    paths = [source.path(index) for index in range(len(source))]
    ways, _ = libraries.library_ways(paths, multi_crop(config, TINY.global_size), config, torch.device("cpu"))
    views = ways[name](1)
    assert views_per_size(views) == {16: 6, 8: 9} and {view.dtype for view in views} == {torch.float32}
    assert all(view.isfinite().all() and -3 < view.mean() < 3 and view.std() > 0.2 for view in views)


def views_per_size(views: list[torch.Tensor]) -> Counter[int]:
    counted: Counter[int] = Counter()
    for tensor in views:
        assert tensor.shape[-3] == 3 and tensor.shape[-1] == tensor.shape[-2]
        counted[tensor.shape[-1]] += tensor[..., 0, 0, 0].numel()
    return counted


def test_all_pipelines_make_the_same_number_of_views_of_every_size(tmp_path: Path) -> None:
    config = ViewsConfig(local_views=TINY.local_views, local_size=TINY.local_size)
    groups = multi_crop(config, TINY.global_size)
    source = module.photographs(str(tmp_path), TINY)
    ways = module._pipelines(source, groups, config)
    (content,) = ways.pop(module.READER)(0)
    assert content.dtype == torch.uint8 and len(content) == sum(path.stat().st_size for path in tmp_path.iterdir())
    for name, way in ways.items():
        views = way(0)
        assert views_per_size(views) == {16: 6, 8: 9}, name
        assert {view.dtype for view in views} == {torch.uint8 if name == module.WORKER else torch.float32}
    assert not torch.equal(ways[module.WORKER](0)[0], ways[module.WORKER](1)[0])  # each measurement has its own crops
    on_device = module._on_device(module._crops(source, groups, 0), config, torch.device("cpu"), TINY.device_images)
    assert views_per_size(on_device(0)) == {16: 8, 8: 12}


@pytest.mark.parametrize("library", [transforms, v2], ids=["v1", "v2"])
def test_torchvisions_augmentations_have_our_settings(library: Any) -> None:
    views = module._augmentations(multi_crop(ViewsConfig(), 224), ViewsConfig(), library, transforms.ToTensor())
    assert len(views) == 12
    for number, view in enumerate(views):
        crop, flip, jitter, blur, gray, solarize, _, normalize = view.transforms
        local = number >= 2
        assert tuple(crop.size) == ((96, 96) if local else (224, 224))
        assert (tuple(crop.scale), tuple(crop.ratio)) == ((0.05, 0.25) if local else (0.25, 1.0), (3 / 4, 4 / 3))
        assert crop.interpolation == transforms.InterpolationMode.BICUBIC
        assert (flip.p, jitter.p, gray.p) == (0.5, 0.8, 0.2)
        assert blur.p == (0.5 if local else (1.0, 0.1)[number])
        assert (solarize.threshold, solarize.p) == (128, 0.2 if number == 1 else 0.0)
        (colours,), (gaussian,) = jitter.transforms, blur.transforms
        assert tuple(colours.brightness) == tuple(colours.contrast) == (0.6, 1.4)
        assert (tuple(colours.saturation), tuple(colours.hue)) == ((0.8, 1.2), (-0.1, 0.1))
        assert (tuple(gaussian.kernel_size), tuple(gaussian.sigma)) == ((23, 23), (0.1, 2.0))
        assert list(normalize.mean) == [0.485, 0.456, 0.406]
