"""The time of a planned refinement: measured on its own steps, and added up correctly."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mimref.benchmarks import duration
from mimref.benchmarks.duration import Duration, describe_duration, image_seconds, measure_duration, step_seconds
from mimref.data.sources import FileSource
from mimref.data.transforms import EvalTransform
from mimref.features.encode import PassSettings
from mimref.refinement.plan import make_plan
from tests.tiny import refine_config, write_labelled, write_unlabelled, write_weights


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("duration")
    return write_weights(folder / "weights.safetensors"), write_labelled(folder / "images")


def test_parts_are_seconds_times_counts(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration, "step_seconds", lambda job: {"heads": 0.5, "encoder": 2.0}[job.name])
    plan = make_plan(refine_config(*paths, evaluate__enabled=True, monitor__knn_every_epochs=2))
    clock = iter([0.0, 1.0, 10.0, 12.0])
    monkeypatch.setattr(duration, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    # Checks at the start and after epochs 2 and 3 encode 48 + 16 images and two views of 48; the table encodes 48 + 16
    # twice. A pass of 48 images takes 2 seconds.
    found = measure_duration(plan)
    assert found == Duration(0.5, 2.0, 8 * 0.5, 12 * 2.0, pytest.approx((3 * 160 + 2 * 64) * 2 / 48))


class _Job:
    """Updates of one second, and batches that each of the loader processes reads in 20 seconds."""

    total, step = 100, 0

    def __init__(self, device: str, workers: int) -> None:
        self.device, self.clock = torch.device(device), 0.0
        config = SimpleNamespace(workers=workers, data=SimpleNamespace(decode="auto"))
        self.run, self.source = SimpleNamespace(config=config), SimpleNamespace(in_memory=False)

    def batches(self) -> Iterator[None]:
        while True:
            self.clock += 20.0
            yield None

    def update(self, batch: None) -> None:
        self.clock += 1.0

    def check(self) -> None:
        pass


@pytest.mark.parametrize(
    ("device", "workers", "expected"), [("cpu", 0, 21), ("cpu", 4, 6), ("cuda", 4, 5), ("cuda", 40, 1)]
)
def test_a_step_takes_as_long_as_reading_allows(
    device: str, workers: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, processes that read share its cores with the update."""
    job: Any = _Job(device, workers)
    monkeypatch.setattr(duration, "time", SimpleNamespace(perf_counter=lambda: job.clock))
    assert step_seconds(job) == pytest.approx(expected)
    assert job.clock <= 60


@pytest.mark.parametrize("workers", [2, 16])
def test_all_loader_processes_take_part_in_the_passes_that_are_timed(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[float] = []

    def extract(encoder: object, source: FileSource, settings: PassSettings, columns: object) -> None:
        batches.append(len(source) / settings.batch_size)

    monkeypatch.setattr(duration, "extract", extract)
    encoder: Any = None
    images = FileSource("images", "", [f"{number}.png" for number in range(500)], None, None)
    image_seconds(encoder, images, PassSettings(EvalTransform(16), torch.device("cpu"), workers=workers), 1)
    assert batches == [workers, 3 * workers]


@pytest.mark.parametrize(("stage", "parts"), [("both", ("heads_s", "encoder_s")), ("heads", ("heads_s",))])
def test_only_the_stages_of_the_plan_are_measured(
    stage: str, parts: tuple[str, ...], paths: tuple[Path, Path], tmp_path: Path
) -> None:
    found = measure_duration(make_plan(refine_config(*paths, stage=stage)))
    assert tuple(name for name in ("heads_s", "encoder_s") if getattr(found, name) > 0) == parts
    assert found.total_s == found.heads_s + found.encoder_s + found.passes_s


def test_without_labels_and_checks_there_are_no_passes(paths: tuple[Path, Path], tmp_path: Path) -> None:
    plan = make_plan(refine_config(paths[0], write_unlabelled(tmp_path), monitor__knn_every_epochs=0))
    assert measure_duration(plan).passes_s == 0


def test_times_are_in_readable_units() -> None:
    text = describe_duration(Duration(0.25, 12.5, 89, 3_600, 90_000))
    assert text == (
        "about 26.0 h on this machine: stage 1 89 s (250 ms per step), stage 2 60 min (12,500 ms per step), "
        "checks and features of the table 25.0 h"
    )
    assert "stage 1" not in describe_duration(Duration(0, 1, 0, 200_000, 0))
    assert describe_duration(Duration(0, 1, 0, 200_000, 0)).startswith("about 2.3 days")
