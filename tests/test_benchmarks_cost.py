"""Extrapolations against arithmetic by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mimref.benchmarks import cost as cost_module
from mimref.benchmarks.cost import benchmark_cost, cost_facts, estimate_cost, largest_batch_row, markdown, stage_flops
from mimref.benchmarks.stage import resolve_encoder
from mimref.config.load import load_config
from mimref.errors import ConfigError
from mimref.refinement.config import RefineConfig
from mimref.refinement.schedule import StageName
from mimref.refinement.sizes import state_bytes
from tests.test_benchmarks_step import DEPTH, IMAGE, PATCH, WIDTH, measurement, tiny
from tests.tiny import ARCHITECTURE, refine_config, write_weights

# By hand: a block has 12 * width ** 2 weights, biases of 3 + 1 + 4 + 1 widths and two norms; the final norm is extra.
BLOCK = 12 * WIDTH**2 + 9 * WIDTH + 4 * WIDTH
POSITIONS = ((IMAGE // PATCH) ** 2 + 1) * WIDTH  # fixed, never trained
EMBEDDINGS = 3 * PATCH**2 * WIDTH + WIDTH + WIDTH  # patches with a bias, CLS
ENCODER = DEPTH * BLOCK + 2 * WIDTH + EMBEDDINGS + POSITIONS
# Two heads of 16/16/8, 16/8: five matrices, and weights and biases of five norms.
FEATURES = 16 + 16 + 8 + 16 + 8
HEADS = 2 * (WIDTH * 16 + 16 * 16 + 16 * 8 + 8 * 16 + 16 * 8 + 2 * FEATURES)
# Running mean and variance, and one count per layer.
BUFFERS = 2 * 2 * FEATURES + 5
QUEUE = 2 * 24 * 8


def test_state_memory_equals_a_count_by_hand() -> None:
    config = tiny()
    architecture, blocks = resolve_encoder(config)
    state = state_bytes(config, architecture, blocks, "encoder")
    trained = ENCODER - POSITIONS + HEADS
    assert state.weights == 4 * (ENCODER + HEADS + BUFFERS)
    assert (state.gradients, state.moments) == (4 * trained, 8 * trained)
    assert (state.average, state.queue) == (4 * ENCODER, 4 * QUEUE)
    assert state.total == 4 * (2 * ENCODER + HEADS + BUFFERS + 3 * trained + QUEUE)
    # Stage 1: gradients and moments of the heads alone, and no average.
    state = state_bytes(config, architecture, blocks, "heads")
    assert (state.gradients, state.moments, state.average) == (4 * HEADS, 8 * HEADS, 0)
    # Frozen: embeddings and the first blocks.
    config = tiny(encoder_stage__freeze_blocks=2)
    state = state_bytes(config, architecture, blocks, "encoder")
    assert state.gradients == 4 * (2 * BLOCK + 2 * WIDTH + HEADS)
    # Blocks after the last head, and the norm after them, are not trained.
    config = tiny(heads__blocks="1,2")
    assert state_bytes(config, architecture, [1, 2], "encoder").gradients == 4 * (2 * BLOCK + EMBEDDINGS + HEADS)


def test_hours_are_the_images_of_all_epochs_by_the_measured_rate() -> None:
    # 125 images in batches of 12 are 10 steps per epoch; the last 5 images are dropped: 2 and 3 epochs of 120 images.
    measured = [
        measurement(stage="heads", batch=12, step_s=0.5, memory_bytes=1 << 30),
        measurement(stage="encoder", batch=6, micro_batch=3, step_s=2.0, memory_bytes=None),
    ]
    rows = estimate_cost(tiny(), {"heads": 1000, "encoder": 3000}, measured, images=125)
    hours = {row["stage"]: row for row in rows if row["metric"] == "cost_hours"}
    assert hours["heads"]["value"] == pytest.approx(2 * 120 / 24 / 3600)
    # At 3 images/s, whatever batches were measured.
    assert hours["encoder"]["value"] == pytest.approx(3 * 120 / 3 / 3600)
    assert hours["both"]["value"] == pytest.approx((10 + 120) / 3600)
    assert (hours["encoder"]["steps"], hours["encoder"]["measured_batch"]) == (30, 6)
    assert [(row["stage"], row["value"]) for row in rows if row["metric"] == "cost_peak_gib"] == [("heads", 1.0)]
    work = {row["stage"]: row["value"] for row in rows if row["metric"] == "cost_exaflop"}
    assert work == {"heads": pytest.approx(240 * 1000 / 1e18), "encoder": pytest.approx(360 * 3000 / 1e18)}
    # Hours of both stages need a measurement of both.
    rows = estimate_cost(tiny(), {"heads": 1, "encoder": 1}, measured[:1], images=125)
    assert [row["stage"] for row in rows if row["metric"] == "cost_hours"] == ["heads"]


def test_a_stage_that_is_not_trained_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_module, "model_flops", lambda *_: 1)
    assert list(stage_flops(tiny())) == ["heads", "encoder"]
    assert list(stage_flops(tiny(stage="heads"))) == list(stage_flops(tiny(encoder_stage__epochs=0))) == ["heads"]
    assert list(stage_flops(tiny(stage="encoder", heads_from="x"))) == ["encoder"]


def test_largest_batch_lies_on_the_line_through_two() -> None:
    # 2 MiB in any case, and 1 MiB per image.
    small, large = measurement(batch=8, memory_bytes=10 << 20), measurement(batch=16, memory_bytes=18 << 20)
    for capacity, images in ((66 << 20, 64), ((67 << 20) - 1, 64), (1 << 20, 0)):
        row = largest_batch_row(small, large, capacity=capacity)
        assert (row["value"], row["per_image_mib"]) == (images, 1)


def test_a_small_model_is_measured_on_a_cpu_and_a_large_one_is_not() -> None:
    calls: list[tuple[int, int]] = []
    cost = benchmark_cost(tiny(), steps=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)] and cost.notes == []
    assert {row["stage"] for row in cost.rows if row["metric"] == "cost_hours"} == {"heads", "encoder", "both"}
    table = markdown(cost_facts(cost), "mimref benchmark cost")
    assert "device-hours on cpu" in table and table.startswith("`mimref benchmark cost`")
    cost = benchmark_cost(load_config(RefineConfig, "refine/mae_2b14", {"device": "cpu"}))
    assert {row["metric"] for row in cost.rows} == {"cost_exaflop", "cost_state_gib", "cost_predicted_gib"}
    assert "vit_2b14" in cost.notes[0] and "no CUDA device" in cost.notes[0]
    # Images that are not named count as ImageNet; the preset states 99 and 248 EFLOP for the encoder alone.
    work = {row["stage"]: row for row in cost.rows if row["metric"] == "cost_exaflop"}
    assert work["encoder"]["images"] == 1_281_167 and work["encoder"]["steps"] == 50_040
    assert [float(work[stage]["value"]) for stage in ("heads", "encoder")] == pytest.approx([99, 248], rel=0.01)


def test_a_cpu_measures_the_batch_it_can_afford(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    # Enough in 20 seconds, at 30 percent of the rate, for five steps of a little more than 16 images.
    monkeypatch.setattr(cost_module, "_matmul_flops", lambda device: 5 * 1000 * 17 / 20 / 0.3)
    flops: dict[StageName, int] = {"heads": 400, "encoder": 600}
    assert cost_module._affordable_batch(tiny(batch_size=64), flops, 2, torch.device("cpu"), notes) == 16
    assert "64" in notes[0] and "16" in notes[0]


def test_a_step_that_does_not_fit_is_reported_and_images_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise ConfigError("out of memory with a single image per encoder pass")

    monkeypatch.setattr(cost_module, "measure_step", full)
    monkeypatch.setattr(cost_module, "model_flops", lambda *_: 1000)
    cost = benchmark_cost(tiny(data__spec="digits"))
    assert cost.notes == ["time and peak memory: out of memory with a single image per encoder pass"]
    assert {row["metric"] for row in cost.rows} == {"cost_exaflop", "cost_state_gib", "cost_predicted_gib"}
    assert {row["images"] for row in cost.rows if "images" in row} == {1437}


def test_a_presets_bfloat16_is_measured_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prediction is for GPUs, whatever the CPU can do."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    measured: list[str] = []
    predicted: list[str] = []
    monkeypatch.setattr(cost_module, "measure_step", lambda config, *_, **__: measured.append(config.precision) or [])
    monkeypatch.setattr(
        cost_module, "predicted_row", lambda config, stage: predicted.append(config.precision) or {"metric": stage}
    )
    monkeypatch.setattr(cost_module, "model_flops", lambda *_: 1000)
    config = tiny(precision="bf16").model_copy(update={"preset": "mine", "strict": False})
    config._given = frozenset()
    cost = benchmark_cost(config)
    assert set(measured) == {"fp32"} and set(predicted) == {"bf16"}
    assert len(cost.notes) == 1 and "bf16" in cost.notes[0] and "fp32 is measured instead" in cost.notes[0]


def test_a_batch_of_more_images_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_module, "model_flops", lambda *_: 1000)
    with pytest.raises(ConfigError, match="batch_size 2000 is larger than the 1437 training images"):
        benchmark_cost(tiny(data__spec="digits", batch_size=2000))


def test_encoders_of_other_channels_cost_as_those_of_colour(tmp_path: Path) -> None:
    """Without `data.channels`, images are in colour, so the weights may be for any number of channels."""
    found = []
    for channels in (3, 13):
        weights = write_weights(
            tmp_path / f"{channels}.safetensors", architecture=replace(ARCHITECTURE, channels=channels)
        )
        config = refine_config(weights, tmp_path)
        found.append((resolve_encoder(config), stage_flops(config)))
    assert found[0] == found[1]
