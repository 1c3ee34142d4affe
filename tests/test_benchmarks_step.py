"""What the benchmarks of a step count and divide; no test checks speed."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mimref.benchmarks.flops import model_flops
from mimref.benchmarks.stage import ready_stage, resolve_encoder, synthetic_batch
from mimref.benchmarks.step import StepMeasurement, benchmark_step, measure_step, step_facts
from mimref.config.load import load_config
from mimref.errors import ConfigError
from mimref.refinement.config import RefineConfig
from mimref.refinement.stages import EncoderStage
from tests.tiny import REFINE

WIDTH, DEPTH, PATCH, IMAGE = 32, 4, 8, 16
TINY: dict[str, Any] = REFINE | {
    "precision": "auto",
    "encoder.arch": "custom",
    "encoder.image_size": IMAGE,
    "encoder.width": WIDTH,
    "encoder.depth": DEPTH,
    "encoder.num_heads": 2,
    "encoder.patch_size": PATCH,
}


def tiny(**changes: Any) -> RefineConfig:
    """Return settings of a tiny step without weights and images; changes are named like `heads__blocks`."""
    return load_config(RefineConfig, None, TINY | {key.replace("__", "."): value for key, value in changes.items()})


# --- FLOPs


def tokens(config: RefineConfig) -> list[int]:
    """Return the number of tokens of each view, with CLS."""
    local = (config.views.local_size // PATCH) ** 2 + 1
    return [(IMAGE // PATCH) ** 2 + 1] * 2 + [local] * config.views.local_views


def encoder_forward(config: RefineConfig, blocks: int = DEPTH) -> int:
    """Return the FLOPs per image of `blocks` blocks for two global views and the local ones: 2 per multiply-add."""
    # Queries, keys, values (3), projection (1) and the two layers of the MLP (4 each) are 12 matrices of width ** 2.
    linear = sum(2 * 12 * WIDTH**2 * count for count in tokens(config))
    # Scores and weighted sum; attention heads share the width.
    attention = sum(2 * 2 * count**2 * WIDTH for count in tokens(config))
    return blocks * (linear + attention)


def embedding(config: RefineConfig) -> int:
    patches = 2 * (IMAGE // PATCH) ** 2 + config.views.local_views * (config.views.local_size // PATCH) ** 2
    return patches * 2 * 3 * PATCH**2 * WIDTH


def heads_forward(config: RefineConfig) -> tuple[int, int]:
    """Return the FLOPs per image of both heads, and of their first layers alone."""
    hidden, output, wide = config.heads.projector_hidden, config.heads.output, config.heads.predictor_hidden
    rows = 2 * (2 + config.views.local_views)
    first = 2 * rows * WIDTH * hidden
    return first + 2 * rows * (hidden * hidden + hidden * output + 2 * output * wide), first


def test_flops_of_a_step_equal_a_count_by_hand() -> None:
    config = tiny()
    architecture, blocks = resolve_encoder(config)
    heads, first = heads_forward(config)
    # In the backward pass, every product has two gradients, but that of the pixels is not computed.
    expected = 3 * encoder_forward(config) + 2 * embedding(config) + 3 * heads
    assert model_flops(config, architecture, blocks, "encoder") == expected
    # Stage 1: the encoder has no backward pass, and the heads' inputs no gradient.
    expected = encoder_forward(config) + embedding(config) + 3 * heads - first
    assert model_flops(config, architecture, blocks, "heads") == expected
    # Frozen blocks have no backward pass either; the first trained one still needs its input's gradient, for its norm.
    frozen = tiny(encoder_stage__freeze_blocks=2)
    expected = 3 * encoder_forward(config, 2) + encoder_forward(config, 2) + embedding(config) + 3 * heads
    assert model_flops(frozen, architecture, blocks, "encoder") == expected
    # Blocks after the last head are not run.
    early = tiny(heads__blocks="2,3")
    expected = 3 * encoder_forward(config, 3) + 2 * embedding(config) + 3 * heads
    assert model_flops(early, architecture, [2, 3], "encoder") == expected


@pytest.mark.parametrize(("kernel", "recomputed"), [(SDPBackend.MATH, 0), (SDPBackend.FLASH_ATTENTION, 1)])
def test_flops_counted_on_a_real_step_equal_a_count_by_hand(kernel: SDPBackend, recomputed: int) -> None:
    config = tiny(views__blur=False)
    with sdpa_kernel(kernel):
        whole, parts = measure_step(config, "encoder", (None, 5), steps=1)
    batch, heads, output = config.batch_size, 2, config.heads.output
    queue = 2 * heads * 2 * batch * config.heads.queue_size * output
    # Two products of all other views' predictions with the batch's projections, which have no gradient.
    loss = 2 * (2 * heads * 2 * (1 + config.views.local_views) * batch * batch * output)
    # Fused attention computes its scores again in the backward pass.
    scores = recomputed * batch * DEPTH * sum(2 * count**2 * WIDTH for count in tokens(config))
    assert whole.flops_run == whole.flops + queue + loss + scores
    # With micro-batches, the encoder runs forward twice, which does not count as FLOPs of the model.
    assert parts.flops == whole.flops
    assert parts.flops_run == whole.flops_run + batch * (encoder_forward(config) + embedding(config))


# --- measuring


def measurement(**changes: Any) -> StepMeasurement:
    values: dict[str, Any] = {
        "stage": "encoder",
        "setting": {"model": "tiny", "device": "cpu"},
        "batch": 8,
        "micro_batch": 8,
        "step_s": 0.5,
        "memory_bytes": 3 << 20,
        "flops": 4_000_000_000,
        "flops_run": 5_000_000_000,
        "matmul_flops": 32e9,
    }
    return StepMeasurement(**values | changes)


def test_utilisation_is_flops_by_time_by_rate() -> None:
    row = measurement().row()
    # 4 GFLOP in half a second are a quarter of 32 GFLOP/s.
    assert row["utilisation"] == 25
    assert (row["value"], row["images_per_second"], row["memory_mib"]) == (500, 16, 3)
    assert (row["gflop"], row["gflop_run"], row["matmul_gflops"]) == (4, 5, 32)
    unknown = measurement(memory_bytes=None, flops_run=None).row()
    assert "memory_mib" not in unknown and "gflop_run" not in unknown


def test_rows_are_of_both_stages_and_of_micro_batches_with_their_ratio() -> None:
    calls: list[tuple[int, int]] = []
    config = tiny(heads_stage__epochs=0)
    rows = benchmark_step(config, steps=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]
    steps = [row for row in rows if row["metric"] == "benchmark_step_ms"]
    # Micro-batches are a quarter of the batch unless set.
    ways = [(row["stage"], row["batch"], row["micro_batch"]) for row in steps]
    assert ways == [("encoder", 12, 12), ("encoder", 12, 3), ("heads", 12, 12)]
    (ratio,) = [row for row in rows if row["metric"] == "benchmark_micro_batch_time"]
    assert ratio["value"] == float(ratio["micro_batches_s"]) / float(ratio["one_pass_s"])
    assert (steps[0]["model"], steps[0]["heads"], steps[0]["views"]) == ("custom 4x32/8", 2, 3)
    assert (steps[0]["device"], steps[0]["precision"], steps[0]["threads"]) == ("cpu", "fp32", torch.get_num_threads())
    facts = step_facts(rows)
    assert f"{float(steps[1]['value']):,.0f} ms" in dict(facts)["step of stage 2, 12 images in micro-batches of 3"]
    assert ("12 images in micro-batches of 3", f"{ratio['value']:.2f} x the time of one pass") in facts


def test_the_step_is_that_of_training() -> None:
    with ready_stage(tiny(), "encoder") as (job, _):
        assert isinstance(job, EncoderStage)
        weight, average = (
            module.state_dict()["vit.blocks.0.attn.qkv.weight"] for module in (job.method.encoder, job.average.module)
        )
        before = weight.clone()
        job.update(synthetic_batch(job))
        assert not torch.equal(weight, before) and not torch.equal(average, before)
        assert job.method.queue.updates == 1


def test_the_encoder_is_known_without_images_and_published_weights() -> None:
    with pytest.raises(ConfigError, match=r"heads\.blocks = 'auto'"):
        resolve_encoder(tiny(heads__blocks="auto"))
    architecture, blocks = resolve_encoder(load_config(RefineConfig, "refine/mae_l16", {"encoder.weights": "mae_l16"}))
    assert (architecture.width, blocks) == (1024, list(range(17, 25)))


def test_a_benchmark_of_whole_batches_does_not_try_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[object] = []
    monkeypatch.setattr("mimref.refinement.run.choose_micro_batch", lambda method, plan, _: chosen.append(plan))
    with ready_stage(tiny(), "encoder") as (job, _):
        assert job.method.micro_batch is None and not chosen
    with ready_stage(tiny(micro_batch=2), "encoder"):
        assert len(chosen) == 1
