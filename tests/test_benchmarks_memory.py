"""The memory plan: arithmetic by hand for given steps, and the line on which real steps lie."""

from typing import Any

import pytest

from mimref.benchmarks import memory
from mimref.benchmarks.memory import gathered_bytes, memory_facts, memory_page, plan_memory, predict_peak
from mimref.benchmarks.peak import StepPeak, step_peak
from mimref.benchmarks.stage import resolve_encoder
from mimref.errors import ConfigError
from mimref.refinement.sizes import exchanged_bytes, state_bytes
from tests.test_benchmarks_cost import BLOCK, ENCODER, HEADS, POSITIONS, QUEUE
from tests.test_benchmarks_step import tiny

GIB = 2**30


@pytest.fixture
def given_steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Steps of 1 GiB per image in a pass, a quarter of it if recomputed, and 3 GiB for heads with micro-batches."""
    asked: list[dict[str, Any]] = []

    def step(*_: object, **options: Any) -> StepPeak:
        asked.append(options)
        each = GIB // 4 if options["checkpointing"] else GIB
        if options["micro_batch"] is None:
            return StepPeak(each * options["images"])
        return StepPeak(3 * GIB, each * options["micro_batch"])

    monkeypatch.setattr(memory, "step_peak", step)
    return asked


def test_the_largest_micro_batch_that_fits_is_found(given_steps: list[dict[str, Any]]) -> None:
    rows = plan_memory(tiny(batch_size=48), [1, 4], [8, 16, 80])
    found = {(row["gpus"], row["card_gib"], row["recompute"], row["shard"]): row for row in rows}
    assert len(found) == 3 * 2 + 3 * 4
    # One GPU: 48 images take 48 GiB in one pass. Halved until they fit into 90% of 8 and 16 GiB, they are 6 and 12.
    assert [found[1, card, False, False]["micro_batch"] for card in (8, 16, 80)] == [6, 12, 48]
    assert [found[1, card, True, False]["micro_batch"] for card in (8, 16, 80)] == [24, 48, 48]
    # Each of four GPUs has 12 images. With micro-batches, the heads need 3 GiB, whatever the micro-batch size.
    assert [found[4, card, False, False]["micro_batch"] for card in (8, 16, 80)] == [6, 12, 12]
    assert found[4, 8, True, True]["micro_batch"] == 12
    assert found[4, 8, True, True]["value"] == pytest.approx(3, abs=0.01)
    assert all(row["fits"] for row in rows)
    # On several GPUs, gradients are buckets of DDP or shards, so they exist all the time.
    assert {options["gradients_held"] for options in given_steps} == {False, True}
    (row,) = [each for each in plan_memory(tiny(batch_size=48), [1], [2]) if not each["recompute"]]
    assert (row["fits"], row["micro_batch"]) == (False, 1) and row["value"] == pytest.approx(3, abs=0.01)


def test_ways_that_the_encoder_does_not_support_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: object, **options: Any) -> StepPeak:
        if options["micro_batch"] is not None:
            raise ConfigError("micro_batch: the encoder has BatchNorm layers")
        if options["checkpointing"]:
            raise ConfigError("activation_checkpointing: timm has none")
        return StepPeak(GIB * options["images"])

    monkeypatch.setattr(memory, "step_peak", step)
    notes: list[str] = []
    rows = plan_memory(tiny(batch_size=48), [1, 4], [8, 80], note=notes.append)
    assert set(notes) == {"micro_batch: the encoder has BatchNorm layers", "activation_checkpointing: timm has none"}
    assert not any(row["recompute"] for row in rows)
    # In one pass or not at all.
    assert {(row["gpus"], row["card_gib"]): (row["micro_batch"], row["fits"]) for row in rows} == {
        (1, 8): (48, False), (1, 80): (48, True), (4, 8): (12, False), (4, 80): (12, True)
    }  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [("micro_batch", 4), ("activation_checkpointing", True), ("shard", True)])
def test_settings_that_choose_one_of_the_ways_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} has no effect"):
        plan_memory(tiny(**{name: value}), [1], [40])


def test_the_plan_is_written_as_lines_and_as_a_table(given_steps: list[dict[str, Any]]) -> None:
    rows = plan_memory(tiny(batch_size=48), [1, 4], [2, 8])
    facts = dict(memory_facts(rows))
    assert facts["1 x 8 GB, whole weights"].startswith("fits: 6.0 GiB") and "micro-batches of 6" in str(facts)
    assert facts["1 x 2 GB, whole weights"].startswith("does not fit: 3.0 GiB")
    table = memory_page(rows).splitlines()
    assert table[2] == "| | 1 x 2 GB | 1 x 8 GB | 4 x 2 GB | 4 x 8 GB |"
    assert table[4] == "| whole weights | no: 3.0 GiB | 6.0 GiB, 6 | no: 3.0 GiB | 6.0 GiB, 6 |"
    assert table[6].startswith("| shards |  |  | no:") and len(table) == 8


def test_a_shard_is_a_part_of_everything_but_the_queue() -> None:
    config = tiny(loss__dense="gram")
    architecture, blocks = resolve_encoder(config)
    whole, part = (state_bytes(config, architecture, blocks, "encoder", shards=shards) for shards in (1, 8))
    encoder, trained = -(-ENCODER // 8), -(-(ENCODER - POSITIONS) // 8)
    # A process has one of the two heads.
    assert part.gradients == 4 * (trained + HEADS // 2) and part.moments == 2 * part.gradients
    assert part.average == part.base == 4 * encoder and part.queue == whole.queue == 4 * QUEUE
    assert whole.average == 4 * ENCODER
    # The weights of two blocks, and their gradients.
    assert gathered_bytes(config, architecture, blocks) == 4 * 4 * BLOCK


def test_other_ranks_images_are_counted() -> None:
    # Each of 3 processes has 4 of 12 images; 2 heads, 3 views, projections of width 8.
    others, pairs = 8, 2
    projections, logits = 2 * 2 * 2 * others * 8, 2 * 2 * 2 * pairs * 4 * others
    assert exchanged_bytes(tiny(), 2, 3) == 4 * (projections + logits)
    assert exchanged_bytes(tiny(), 2, 1) == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_steps_of_other_micro_batches_lie_on_the_line(recompute: bool) -> None:
    config = tiny(encoder__width=64, encoder__image_size=32, views__local_size=16, batch_size=32)
    architecture, blocks = resolve_encoder(config)
    line = memory._steps(config, architecture, blocks, 1, recompute)
    for micro in (4, 8):
        step = step_peak(config, architecture, blocks, "encoder", images=32, micro_batch=micro, checkpointing=recompute)
        assert line.bytes(micro) == pytest.approx(step.bytes, rel=0.01)


def test_the_peak_is_that_of_the_step_or_of_the_update() -> None:
    small = tiny(batch_size=2, encoder__width=64)
    architecture, blocks = resolve_encoder(small)
    state = state_bytes(small, architecture, blocks, "encoder")
    peak = predict_peak(small, "encoder")
    assert peak.update == state.total and peak.total == max(peak.update, peak.state + peak.step)
    assert peak.state == state.total - state.gradients
    large = predict_peak(tiny(batch_size=64, encoder__width=64), "encoder")
    assert large.total == large.state + large.step > peak.total


def test_more_gpus_than_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="--gpus 13: batches of 12"):
        plan_memory(tiny(), [1, 13], [40])


@pytest.mark.gpu
def test_a_whole_update_takes_what_is_predicted() -> None:
    """The prediction includes weights, moments, average and queue."""
    from mimref.benchmarks.step import measure_step
    from mimref.config.load import load_config
    from mimref.refinement.config import RefineConfig

    config = load_config(RefineConfig, "refine/mae_b16", {"batch_size": 64, "device": "cuda"})
    (found,) = measure_step(config, "encoder", (16,), steps=1)
    predicted = predict_peak(config.model_copy(update={"micro_batch": 16}), "encoder")
    assert found.memory_bytes == pytest.approx(predicted.total, rel=0.1)
