"""How time and memory are measured; no test checks speed."""

import pytest
import torch

from mimref.benchmarks import measure
from mimref.benchmarks.measure import PeakMemory, Ticks, median_seconds

CPU = torch.device("cpu")


def test_ways_take_turns_and_the_first_turns_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ticks: list[tuple[int, int]] = []
    now = [0.0]
    costs = {"a": iter([100.0, 100.0, 1.0, 5.0, 3.0, 4.0]), "b": iter([100.0, 100.0, 2.0, 2.0, 90.0, 1.0])}

    def way(name: str) -> None:
        order.append(name)
        now[0] += next(costs[name])

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    tick = Ticks(lambda done, total: ticks.append((done, total)), 6)
    medians = median_seconds([lambda: way("a"), lambda: way("b")], CPU, turns=2, warm_up=1, calls=2, tick=tick)
    assert medians == [3.5, 2.0]
    assert order == ["a", "a", "b", "b"] * 3
    assert ticks == [(done, 6) for done in range(1, 7)]


def test_peak_memory_is_what_was_taken_and_given_back() -> None:
    memory = PeakMemory(CPU)
    if memory.growth() is None:
        pytest.skip("this system does not report a process's peak")
    block = torch.ones(16 << 20)  # 64 MiB, written to
    del block
    grown = memory.growth()
    assert grown is not None and 60 << 20 < grown < 90 << 20
    memory.restart()
    after = memory.growth()
    assert after is not None and after < 30 << 20
