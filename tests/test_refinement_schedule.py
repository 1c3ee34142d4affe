"""Loss-weight schedules at their corners (Table 1c, Fig. 7), taken from the description, not from the formula."""

import math

import pytest

from mimref.refinement.schedule import head_weights, turning_point

SCHEDULES = ("constant", "uniform_decay", "staggered_decay", "staggered_step", "one_hot")
# Shares of stage 2 at which the intermediate heads turn, by number of heads.
TURNS = {1: [], 2: [0.2], 3: [0.2, 0.8], 4: [0.2, 0.5, 0.8], 8: [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]}
EPS = 1e-9


@pytest.mark.parametrize("heads", TURNS)
def test_turning_points_are_spread_evenly(heads: int) -> None:
    assert [turning_point(head, heads - 1) for head in range(heads - 1)] == pytest.approx(TURNS[heads], abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("heads", TURNS)
@pytest.mark.parametrize("progress", [0.0, 0.1999, 0.2, 0.5, 0.77, 0.9, 1.0])
def test_one_weight_per_head_and_the_last_always_counts(schedule: str, heads: int, progress: float) -> None:
    weights = head_weights(schedule, progress, heads)
    assert len(weights) == heads
    assert weights[-1] == 1.0
    assert all(0 <= weight <= 1 for weight in weights)


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.5, 1.0])
def test_constant(progress: float) -> None:
    assert head_weights("constant", progress, 8) == [1.0] * 8


@pytest.mark.parametrize("heads", [2, 4, 8])
def test_uniform_decay_turns_all_intermediate_heads_at_once(heads: int) -> None:
    for progress, expected in [
        (0.0, 1.0),
        (0.2 - EPS, 1.0),
        (0.2, 1.0),
        (0.4, 0.5 * (1 + math.cos(math.pi / 4))),
        (0.6, 0.5),  # half way between 0.2 and 1
        (0.8, 0.5 * (1 - math.cos(math.pi / 4))),
        (1.0, 0.0),
    ]:
        assert head_weights("uniform_decay", progress, heads)[:-1] == pytest.approx([expected] * (heads - 1), abs=1e-12)


@pytest.mark.parametrize("heads", [2, 4, 8])
def test_staggered_decay_turns_each_head_at_its_time(heads: int) -> None:
    assert head_weights("staggered_decay", 0.0, heads) == [1.0] * heads
    assert head_weights("staggered_decay", 1.0, heads)[:-1] == pytest.approx([0.0] * (heads - 1), abs=1e-12)
    for head, turn in enumerate(TURNS[heads]):
        assert head_weights("staggered_decay", turn - EPS, heads)[head] == 1.0
        assert head_weights("staggered_decay", turn, heads)[head] == pytest.approx(1.0, abs=1e-12)
        assert head_weights("staggered_decay", turn + 1e-3, heads)[head] < 1.0
        assert head_weights("staggered_decay", (turn + 1) / 2, heads)[head] == pytest.approx(0.5)
    for progress in (0.3, 0.55, 0.9):
        weights = head_weights("staggered_decay", progress, heads)
        assert weights == sorted(weights)  # earlier heads fade first


@pytest.mark.parametrize("heads", [2, 4, 8])
def test_staggered_step_drops_each_head_at_its_time(heads: int) -> None:
    assert head_weights("staggered_step", 0.0, heads) == [1.0] * heads
    assert head_weights("staggered_step", 1.0, heads) == [0.0] * (heads - 1) + [1.0]
    for head, turn in enumerate(TURNS[heads]):
        before, after = (head_weights("staggered_step", turn + side, heads) for side in (-EPS, EPS))
        assert before == [0.0] * head + [1.0] * (heads - head)
        assert after == [0.0] * (head + 1) + [1.0] * (heads - head - 1)


@pytest.mark.parametrize("heads", [2, 4, 8])
def test_one_hot_hands_the_weight_on(heads: int) -> None:
    turns = TURNS[heads]
    assert head_weights("one_hot", 0.0, heads) == [1.0] + [0.1] * (heads - 2) + [1.0]
    assert head_weights("one_hot", 1.0, heads) == [0.0] * (heads - 1) + [1.0]
    for head, turn in enumerate(turns):
        later = heads - 2 - head
        assert head_weights("one_hot", turn - EPS, heads) == [0.0] * head + [1.0] + [0.1] * later + [1.0]
        after = head_weights("one_hot", turn + EPS, heads)
        assert after == [0.0] * (head + 1) + ([1.0] + [0.1] * (later - 1) if later else []) + [1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_single_head_is_the_last_head(schedule: str) -> None:
    assert [head_weights(schedule, progress, 1) for progress in (0.0, 0.2, 1.0)] == [[1.0]] * 3
