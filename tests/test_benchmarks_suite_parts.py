"""What the suite measures: a fault in what is measured makes its line miss the threshold, at tiny sizes on the CPU."""

import inspect
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mimref.benchmarks.measure import PeakMemory
from mimref.benchmarks.step import StepMeasurement
from mimref.benchmarks.suite import checkout, judging, parts, reading, training
from mimref.benchmarks.suite.lines import Finding, Found, Line, Task, Threshold
from mimref.benchmarks.suite.parts import gpu_lines, parts_for
from mimref.benchmarks.views import DEVICE, WORKER
from mimref.config.load import load_config
from mimref.errors import ConfigError
from mimref.evaluation.knn import protocol
from mimref.evaluation.probe.ensemble import ProbeEnsemble
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import Heads
from mimref.refinement.method import Method
from tests.tiny import REFINE

EVERY = [(device, part.name, task) for device in ("cuda", "cpu") for part in parts_for(device) for task in part.tasks]


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every preset is a tiny encoder."""
    encoder: dict[str, Any] = {
        "encoder.arch": "custom", "encoder.image_size": 16, "encoder.width": 16, "encoder.depth": 4,
        "encoder.num_heads": 2, "encoder.patch_size": 8,
    }  # fmt: skip

    def refinement(preset: str, device: str, batch: int, **changes: object) -> RefineConfig:
        named = {key.replace("__", "."): value for key, value in changes.items()} | {"heads.queue_size": 24}
        return load_config(RefineConfig, None, REFINE | encoder | {"device": device, "batch_size": batch} | named)

    for module in (training, reading):
        monkeypatch.setattr(module, "refinement", refinement)


def judged(found: Iterator[Found], threshold: Threshold | None) -> str:
    """Return the verdict of the first line."""
    first = next(found)
    return Finding("part", Line(first.line, "", threshold), first).verdict


def slower(function: Callable[..., Any], seconds: float = 0.02) -> Callable[..., Any]:
    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **options)

    return slow


# --- the lists of parts


@pytest.mark.parametrize(
    "task", [pytest.param(task, id=f"{device}: {task.lines[0].name}") for device, _, task in EVERY]
)
def test_every_bar_can_be_missed(task: Task) -> None:
    for line in task.lines:
        if line.threshold is not None:
            worse = (
                line.threshold.limit * 1.01 + 1e-12 if line.threshold.kind == "at most" else line.threshold.limit * 0.99
            )
            verdicts = [
                Finding("part", line, Found(line.name, value)).verdict
                for value in (line.threshold.limit, worse, float("nan"))
            ]
            assert verdicts == ["met", "missed", "missed"] and line.threshold.reason
        assert Finding("part", line, fault="crashed").misses


def test_functions_take_what_is_bound() -> None:
    """Functions for GPUs do not run without one: at least their arguments are right."""
    for _, _, task in EVERY:
        assert isinstance(task.measure, partial)
        inspect.signature(task.measure.func).bind("cuda", **task.measure.keywords)
        named = [value for value in task.measure.keywords.values() if isinstance(value, str)]
        assert all(line.name in named or line.name.startswith("step of") for line in task.lines)
        assert 0 < task.limit_s <= parts.TOTAL_S["cuda"]


def test_presets_exist_and_hold_their_batches() -> None:
    for _, _, task in EVERY:
        assert isinstance(task.measure, partial)
        if (preset := task.measure.keywords.get("preset")) is not None:
            batch = task.measure.keywords.get("batch", 2)
            assert load_config(RefineConfig, f"refine/{preset}", {"batch_size": batch}).batch_size == batch


def test_names_are_unique_and_gpus_have_what_cpus_have_not() -> None:
    for device in ("cuda", "cpu"):
        names = [line.name for part in parts_for(device) for task in part.tasks for line in task.lines]
        assert len(names) == len(set(names))
    lacking = [line.name for _, line in gpu_lines("cpu")]
    for words in ("peak memory of ViT-L/16, batch 1024", "k-NN on the GPU against the CPU", "ViT-H/14", "compiled"):
        assert any(words in name for name in lacking)
    assert gpu_lines("cuda") == []


# --- refinement


@pytest.mark.parametrize(("precision", "threshold"), [("fp64", parts.EXACT), ("fp32", parts.SINGLE)])
def test_a_wrong_gradient_misses_its_bar(precision: str, threshold: Threshold, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = partial(training.gradients, "cpu", line="g", preset="x", batch=6, micro=2, precision=precision)
    (right,) = measure()
    assert right.value is not None and 0 <= right.value <= threshold.limit and judged(iter([right]), threshold) == "met"
    # float64 is really used: float32 would differ by more.
    assert precision == "fp32" or right.value < 1e-12
    whole = Method.forward_backward

    def wrong(self: Method, *args: Any, **options: Any) -> Any:
        values = whole(self, *args, **options)
        if self.micro_batch:
            (weight,) = [p for name, p in self.encoder.named_parameters() if name.endswith("blocks.1.mlp.fc1.weight")]
            assert weight.grad is not None
            weight.grad.mul_(1.01)
        return values

    monkeypatch.setattr(Method, "forward_backward", wrong)
    assert judged(measure(), threshold) == "missed"


def test_the_gradient_is_that_of_the_same_batch_and_queue() -> None:
    """Computed twice in the same way, it does not differ at all."""
    (same,) = training.gradients("cpu", line="g", preset="x", batch=6, micro=6, precision="fp32")
    assert same.value == 0


def test_memory_above_the_bar_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = partial(training.peak_memory, "cpu", line="m", preset="x", batch=8, micro=2)
    assert judged(measure(), parts.LARGE_BATCH) == "met"
    monkeypatch.setattr(PeakMemory, "growth", lambda self: int(24.5e9))
    assert judged(measure(), parts.LARGE_BATCH) == "missed"
    monkeypatch.setattr(PeakMemory, "growth", lambda self: None)
    assert judged(measure(), parts.LARGE_BATCH) == "not measured"


def measurement(config: RefineConfig, micro: int | None, step_s: float = 0.5, memory: int = 100) -> StepMeasurement:
    batch = config.batch_size
    return StepMeasurement("encoder", {"device": "cpu"}, batch, micro or batch, step_s, memory, 10, None, 100.0)


@pytest.mark.parametrize(("used", "verdict"), [(30, "met"), (60, "missed")])
def test_micro_batches_that_save_nothing_are_missed(used: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(config: RefineConfig, _: str, ways: Any, *, steps: int) -> list[StepMeasurement]:
        return [measurement(config, micro, memory=used if micro else 100) for micro in ways]

    monkeypatch.setattr(training, "measure_step", measure)
    assert judged(training.memory_ratio("cpu", line="m", preset="x", batch=8, micro=2), parts.SAVED) == verdict


def test_slow_heads_miss_their_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = partial(training.heads, "cpu", line="h", images=1, repeats=1)
    monkeypatch.setattr(Heads, "forward", slower(Heads.forward, 0.2))
    assert judged(measure(), parts.HEADS) == "missed"


@pytest.mark.parametrize(("compiled_s", "verdict"), [(0.4, "met"), (0.6, "missed")])
def test_slow_compiled_steps_miss_their_bar(compiled_s: float, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(config: RefineConfig, _: str, ways: Any, *, steps: int) -> list[StepMeasurement]:
        return [measurement(config, None, compiled_s if config.compile else 0.5)]

    monkeypatch.setattr(training, "measure_step", measure)
    monkeypatch.setattr(torch, "compile", lambda function, *args, **options: function)
    assert judged(training.compiled("cpu", line="c", preset="x", batch=4), parts.COMPILED) == verdict


def test_a_compiler_that_does_not_work_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match=r"torch\.compile does not work"):
        list(training.compiled("cpu", line="c", preset="x", batch=4))


def test_steps_give_time_memory_and_share_of_the_peak() -> None:
    found = list(training.steps("cpu", encoder="E", preset="x", batch=4, micro=1))
    assert [each.line for each in found] == training.step_lines("E", 4)
    for each in found:
        assert each.value == pytest.approx(1e3 * 4 / float(each.setting["images_per_second"]), rel=1e-12)
        assert "images/s" in each.note and "% of the" in each.note
    assert [each.setting["micro_batch"] for each in found] == [4, 1, 4]


@pytest.mark.parametrize(
    ("fails", "measured"),
    [({None}, [None, 0.5, None]), ({1}, [None, None, 0.5]), ({None, 1}, [None, None, None]), (set(), [0.5, 0.5, 0.5])],
)
def test_what_does_not_fit_is_no_fault_of_the_others(
    fails: set[int | None], measured: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(config: RefineConfig, _: str, ways: Any, *, steps: int) -> list[StepMeasurement]:
        if fails & set(ways):
            raise ConfigError("out of memory with 4 images per encoder pass; 2 fit: continue with less")
        return [measurement(config, micro) for micro in ways]

    monkeypatch.setattr(training, "measure_step", measure)
    found = list(training.steps("cpu", encoder="E", preset="x", batch=4, micro=1))
    # If both ways cannot be measured together, one pass counts as too large.
    assert [each.value and each.value / 1e3 for each in found] == measured
    assert all("does not fit" in each.note for each in found if each.value is None)


def test_other_mistakes_of_a_step_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*args: object, **options: object) -> Any:
        raise ConfigError("heads 99 does not fit")

    monkeypatch.setattr(training, "measure_step", measure)
    with pytest.raises(ConfigError, match="heads 99"):
        list(training.steps("cpu", encoder="E", preset="x", batch=4, micro=1))


# --- evaluations


def test_wrong_neighbours_miss_their_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = partial(judging.knn_exact, "cpu", line="k", train=600, test=200, width=32)
    assert judged(measure(), parts.SAME_KNN) == "met"
    find = protocol.find_neighbours

    def wrong(train_x: Any, test_x: Any, **options: Any) -> Any:
        return find(train_x, np.roll(test_x, 1, axis=0), **options)

    monkeypatch.setattr(protocol, "find_neighbours", wrong)
    assert judged(measure(), parts.SAME_KNN) == "missed"


@pytest.mark.parametrize(("slow", "verdict"), [("cpu", "met"), ("meta", "missed")])
def test_a_slow_search_on_the_device_misses_its_bar(slow: str, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "find_neighbours", lambda *_, device, **__: time.sleep(0.03 * (device == slow)))
    monkeypatch.setattr(judging, "resolve_device", torch.device)
    measured = judging.knn_speedup("meta", line="k", train=20, test=4, width=8)
    assert judged(measured, parts.SEARCH) == verdict


def test_without_faiss_nothing_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "find_spec", lambda name: None)
    (found,) = judging.knn_faiss("cpu", line="k", train=20, test=4, width=8)
    assert found.value is None and "pip install faiss" in found.note


class FakeIndex:
    """Stands in for faiss's exact index."""

    def __init__(self, width: int) -> None:
        self.width = width

    def add(self, keys: Any) -> None:
        assert keys.shape[1] == self.width

    def search(self, queries: Any, k: int) -> None:
        time.sleep(0.05)


def test_faiss_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "find_spec", lambda name: object())
    module = type("faiss", (), {"IndexFlatIP": FakeIndex})
    monkeypatch.setitem(sys.modules, "faiss", module)
    (found,) = judging.knn_faiss("cpu", line="k", train=200, test=4, width=8)
    assert found.value is not None and found.value > 1 and "faiss 0.05 s on the CPU" in found.note


def test_slow_probes_miss_their_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = partial(judging.probes, "cpu", line="p", width=2, classes=3, steps=1)
    assert judged(measure(), parts.PROBES_CPU) == "met"
    monkeypatch.setattr(ProbeEnsemble, "step", slower(ProbeEnsemble.step, 0.2))
    for threshold in (parts.PROBES, parts.PROBES_CPU):
        assert judged(measure(), threshold) == "missed"


@pytest.mark.parametrize(("ratio", "verdict"), [(8.0, "met"), (3.0, "missed")])
def test_slow_views_miss_their_bar(ratio: float, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(**_: object) -> list[dict[str, Any]]:
        worker = {"pipeline": WORKER, "value": 500.0, "ratio_pillow_blur": ratio}
        return [worker, {"pipeline": DEVICE, "value": 9000.0, "views": 12, "device": "cuda"}]

    monkeypatch.setattr(reading, "benchmark_views", rows)
    found = list(reading.views("cuda", worker="w", photometric="p", images=2, device_images=2))
    assert judged(iter(found), parts.VIEWS) == verdict
    assert (found[1].line, found[1].value) == ("p", 9000.0)


def test_extraction_reads_files_and_memory() -> None:
    files, memory = reading.extraction("cpu", files="f", memory="m", preset="x", images=6)
    assert (files.line, memory.line) == ("f", "m")
    assert files.value is not None and memory.value is not None and min(files.value, memory.value) > 0
    assert files.setting["images"] == 6 and "workers" in files.setting


# --- tests of the checkout

CASES = (
    '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure/></testcase>'
    '<testcase name="c"><error/></testcase><testcase name="d"><skipped/></testcase></testsuite></testsuites>'
)


@pytest.fixture
def checked_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_x(): ...\n")
    (tmp_path / "tests" / "test_b.py").write_text("def test_y(): 'gpus'\n")
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    return tmp_path


def pytest_gives(report: str | None, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace pytest by a given report; return the command lines that would have run it."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> Any:
        commands.append(command)
        if report is not None:
            (file,) = [word.partition("=")[2] for word in command if word.startswith("--junitxml")]
            Path(file).write_text(report)
        return subprocess.CompletedProcess(command, 4, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_tests_that_fail_miss_their_bar(checked_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = pytest_gives(CASES, monkeypatch)
    (found,) = checkout.tests("cuda", line="t", mark="gpu")
    assert judged(iter([found]), parts.PASSES) == "missed"
    assert (found.value, found.note) == (2, "1 passed, 2 failed, 1 skipped: b, c")
    # Only files with the mark are passed to pytest.
    assert commands[0][-1] == "tests/test_a.py" and "gpu" in commands[0]
    pytest_gives('<testsuite><testcase name="a"/></testsuite>', monkeypatch)
    assert judged(checkout.tests("cuda", line="t", mark="gpu"), parts.PASSES) == "met"


@pytest.mark.parametrize(
    ("report", "words"),
    [(None, "exit code 4"), ('<testsuite><testcase name="a"><skipped/></testcase></testsuite>', "1 were skipped")],
)
def test_tests_that_do_not_run_are_a_fault(
    report: str | None, words: str, checked_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest_gives(report, monkeypatch)
    with pytest.raises(RuntimeError, match=words):
        list(checkout.tests("cuda", line="t", mark="gpu"))


def test_without_a_checkout_nothing_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    assert judged(checkout.tests("cuda", line="t", mark="gpu"), parts.PASSES) == "not measured"


def test_files_marked_gpu_are_those_of_this_checkout() -> None:
    found = checkout.marked_files(checkout.ROOT / "tests", "gpu")
    assert "tests/test_refinement_syncs.py" in found and "tests/test_draws.py" not in found


def test_the_tests_of_a_checkout_are_run(checked_out: Path) -> None:
    """A real pytest runs: one test passes, one fails, and the mark selects both."""
    (checked_out / "tests" / "test_a.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_x(): ...\n"
        "@pytest.mark.gpu\ndef test_y(): assert False\n"
        "def test_z(): assert False\n"
    )
    (found,) = checkout.tests("cuda", line="t", mark="gpu")
    assert (found.value, found.note) == (1, "1 passed, 1 failed, 0 skipped: test_y")


@pytest.mark.slow
def test_a_real_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = training.compiled("cpu", line="c", preset="x", batch=4)
    assert found.value is not None and found.value > 0 and "compiled" in found.note


def test_float64_of_mps_is_not_asked_for() -> None:
    (found,) = training.gradients("mps", line="g", preset="x", batch=6, micro=2, precision="fp64")
    assert found.value is None


def test_a_double_view_has_the_values_of_a_single_one() -> None:
    config = load_config(RefineConfig, "refine/quickstart")
    views, cpu = config.views, torch.device("cpu")
    crops = torch.randint(256, (2, 2, 3, 16, 16), dtype=torch.uint8)
    arguments: tuple[Tensor, int, Tensor, range] = (crops, 0, torch.arange(2), range(2))
    double = training._DoubleViews(views, 3, cpu)(*arguments)
    single = training.Photometric(views, 3, cpu)(*arguments)
    assert double.dtype == torch.float64 and torch.equal(double, single.double())
