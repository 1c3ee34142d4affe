"""What the benchmarks of a step count and divide; how fast anything is, no test says."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mimref.benchmarks import heads as heads_benchmark
from mimref.benchmarks import measure as measuring
from mimref.benchmarks.flops import model_flops
from mimref.benchmarks.heads import HeadSizes, heads_facts, separate_heads
from mimref.benchmarks.measure import MatrixProducts, PeakMemory, seconds_of
from mimref.benchmarks.step import (
    StepMeasurement,
    benchmark_step,
    measure_step,
    ready_stage,
    resolve_encoder,
    step_facts,
    synthetic_batch,
)
from mimref.config.load import load_config
from mimref.errors import ConfigError
from mimref.refinement.config import HeadsConfig, RefineConfig
from mimref.refinement.heads import Heads
from mimref.refinement.stages import EncoderStage
from tests.tiny import REFINE

WIDTH, DEPTH, PATCH, IMAGE = 32, 4, 8, 16
TINY: dict[str, Any] = REFINE | {
    "encoder.arch": "custom",
    "encoder.image_size": IMAGE,
    "encoder.width": WIDTH,
    "encoder.depth": DEPTH,
    "encoder.num_heads": 2,
    "encoder.patch_size": PATCH,
}


def tiny(**changes: Any) -> RefineConfig:
    """Settings of a tiny step without weights and images; changes are named like `heads__blocks`."""
    return load_config(RefineConfig, None, TINY | {key.replace("__", "."): value for key, value in changes.items()})


# --- FLOPs


def tokens(config: RefineConfig) -> list[int]:
    """Of each view, with CLS."""
    local = (config.views.local_size // PATCH) ** 2 + 1
    return [(IMAGE // PATCH) ** 2 + 1] * 2 + [local] * config.views.local_views


def encoder_forward(config: RefineConfig, blocks: int = DEPTH) -> int:
    """FLOPs per image of `blocks` blocks for two global views and the local ones: 2 per multiply-add."""
    # Queries, keys, values (3), projection (1) and the two layers of the MLP (4 each) are 12 matrices of width ** 2.
    linear = sum(2 * 12 * WIDTH**2 * count for count in tokens(config))
    # Scores and weighted sum; the heads of attention share the width.
    attention = sum(2 * 2 * count**2 * WIDTH for count in tokens(config))
    return blocks * (linear + attention)


def embedding(config: RefineConfig) -> int:
    patches = 2 * (IMAGE // PATCH) ** 2 + config.views.local_views * (config.views.local_size // PATCH) ** 2
    return patches * 2 * 3 * PATCH**2 * WIDTH


def heads_forward(config: RefineConfig) -> tuple[int, int]:
    """FLOPs per image of both heads, and of their first layers alone."""
    hidden, output, wide = config.heads.projector_hidden, config.heads.output, config.heads.predictor_hidden
    rows = 2 * (2 + config.views.local_views)
    first = 2 * rows * WIDTH * hidden
    return first + 2 * rows * (hidden * hidden + hidden * output + 2 * output * wide), first


def test_flops_of_a_step_equal_a_count_by_hand() -> None:
    config = tiny()
    architecture, blocks = resolve_encoder(config)
    heads, first = heads_forward(config)
    # Backward, every product has two gradients, but nobody asks for that of the pixels.
    expected = 3 * encoder_forward(config) + 2 * embedding(config) + 3 * heads
    assert model_flops(config, architecture, blocks, "encoder") == expected
    # Stage 1: the encoder has no backward pass, and the heads' inputs no gradient.
    expected = encoder_forward(config) + embedding(config) + 3 * heads - first
    assert model_flops(config, architecture, blocks, "heads") == expected
    # Frozen blocks have none either; the first one that learns still asks for its input's gradient, for its norm.
    frozen = tiny(encoder_stage__freeze_blocks=2)
    expected = 3 * encoder_forward(config, 2) + encoder_forward(config, 2) + embedding(config) + 3 * heads
    assert model_flops(frozen, architecture, blocks, "encoder") == expected
    # Blocks behind the last head are not run.
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
    # In micro-batches the encoder runs forward twice, which does not count as the model's.
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
    # 4 GFLOP in half a second, of 32 GFLOP/s.
    assert row["utilisation"] == 25
    assert (row["value"], row["images_per_second"], row["memory_mib"]) == (500, 16, 3)
    assert (row["gflop"], row["gflop_run"], row["matmul_gflops"]) == (4, 5, 32)
    unknown = measurement(memory_bytes=None, flops_run=None).row()
    assert "memory_mib" not in unknown and "gflop_run" not in unknown


def test_rate_of_matrix_products_is_that_of_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([[1.0, 2.0], [9.0, 4.0, 2.0]])
    monkeypatch.setattr(measuring, "seconds_of", lambda work, repeats, device: next(times))
    products = MatrixProducts(torch.device("cpu"), torch.float32, size=10)
    products.measure()
    products.measure()
    assert products.flops_per_second == 2 * 10**3 / 2.0


def test_seconds_are_those_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    instants = iter([10.0, 11.0, 14.0])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(instants))
    assert seconds_of(lambda: None, 2, torch.device("cpu")) == [1.0, 3.0]


def test_peak_memory_is_what_was_taken_and_given_back() -> None:
    memory = PeakMemory(torch.device("cpu"))
    if memory.growth() is None:
        pytest.skip("this system does not tell a process's peak")
    block = torch.ones(16 << 20)  # 64 MiB, written to
    del block
    grown = memory.growth()
    assert grown is not None and 60 << 20 < grown < 90 << 20
    memory.restart()
    after = memory.growth()
    assert after is not None and after < 30 << 20


def test_rows_tell_stages_micro_batches_and_their_ratio() -> None:
    calls: list[tuple[int, int]] = []
    config = tiny(micro_batch=5)
    rows = benchmark_step(config, steps=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]
    steps = [row for row in rows if row["metric"] == "benchmark_step_ms"]
    ways = [(row["stage"], row["batch"], row["micro_batch"]) for row in steps]
    assert ways == [("encoder", 12, 12), ("encoder", 12, 5), ("heads", 12, 12)]
    (ratio,) = [row for row in rows if row["metric"] == "benchmark_micro_batch_time"]
    assert ratio["value"] == float(ratio["micro_batches_s"]) / float(ratio["one_pass_s"])
    assert (steps[0]["model"], steps[0]["heads"], steps[0]["views"]) == ("custom 4x32/8", 2, 3)
    assert (steps[0]["device"], steps[0]["precision"], steps[0]["threads"]) == ("cpu", "fp32", torch.get_num_threads())
    told = dict(step_facts(rows))
    assert "GFLOP/s of a large matrix product" in told["step of stage 2, 12 images in micro-batches of 5"]
    assert f"{ratio['value']:.2f} x the time" in " ".join(much for _, much in step_facts(rows))
    # A number of micro-batches that is not set is a quarter of the batch.
    rows = benchmark_step(tiny(heads_stage__epochs=0), steps=1)
    assert [row["micro_batch"] for row in rows[:3]] == [12, 3, 12]


def test_the_step_is_that_of_training() -> None:
    with ready_stage(tiny(), "encoder") as (job, _):
        before = {name: value.clone() for name, value in job.method.encoder.state_dict().items()}
        job.update(synthetic_batch(job))
        changed = [
            name for name, value in job.method.encoder.state_dict().items() if not torch.equal(value, before[name])
        ]
        assert "vit.blocks.0.attn.qkv.weight" in changed
        assert isinstance(job, EncoderStage)
        average = job.average.module.state_dict()
        assert not torch.equal(average["vit.blocks.0.attn.qkv.weight"], before["vit.blocks.0.attn.qkv.weight"])
        assert job.method.queue.updates == 1


def test_settings_that_fit_no_encoder_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"views\.local_size 12 is not divisible by the patch size 8"):
        resolve_encoder(tiny(views__local_size=12))
    with pytest.raises(ConfigError, match="name the blocks"):
        resolve_encoder(tiny(heads__blocks="auto"))
    with pytest.raises(ConfigError, match="3 values for 2 heads"):
        resolve_encoder(tiny(heads__temperature=[0.1, 0.2, 0.3]))
    # Published weights are not fetched: what they are is known.
    architecture, blocks = resolve_encoder(load_config(RefineConfig, "refine/mae_l16", {"encoder.weights": "mae_l16"}))
    assert (architecture.width, blocks) == (1024, list(range(17, 25)))


# --- heads


def test_separate_heads_compute_what_the_ensemble_does() -> None:
    """Outputs, gradients of inputs and weights, and running statistics, in float64."""
    torch.manual_seed(0)
    config = HeadsConfig(projector_hidden=7, predictor_hidden=9, output=5)
    heads = Heads(config, 3, 6).double()
    with torch.no_grad():
        for weight in heads.parameters():
            weight.normal_()
    separate = separate_heads(heads, config, 6)
    features = [torch.randn(11, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    same = [tensor.detach().clone().requires_grad_() for tensor in features]
    wanted = torch.randn(3, 11, 5, dtype=torch.float64)

    projection, prediction = heads(torch.stack(features))
    (prediction * wanted).sum().backward()
    found = [head(own) for head, own in zip(separate, same, strict=True)]
    torch.stack([(own[1] * weight).sum() for own, weight in zip(found, wanted, strict=True)]).sum().backward()

    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(torch.stack([own[0] for own in found]), projection, **close)
    torch.testing.assert_close(torch.stack([own[1] for own in found]), prediction, **close)
    for ours, plain in zip(features, same, strict=True):
        torch.testing.assert_close(plain.grad, ours.grad, **close)
    for number, head in enumerate(separate):
        for own, stacked in zip(head.parameters(), heads.parameters(), strict=True):
            assert own.grad is not None and stacked.grad is not None
            expected = stacked.grad.unflatten(0, (3, -1))[number].view_as(own.grad)
            # A shift before BatchNorm has no gradient but noise, hence relative to the largest.
            torch.testing.assert_close(own.grad, expected, **close)
        buffers = [(name, value) for name, value in head.named_buffers() if "running" in name]
        stacked_buffers = [value for name, value in heads.named_buffers() if "running" in name]
        for (name, value), ours in zip(buffers, stacked_buffers, strict=True):
            torch.testing.assert_close(value, ours.unflatten(0, (3, -1))[number], msg=name, **close)


def test_heads_rows_tell_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    # The ways take turns; the first two times of each do not count.
    times = iter([50.0, 50.0, 50.0, 50.0, 1.0, 3.0, 2.0, 8.0, 4.0, 5.0])
    monkeypatch.setattr(heads_benchmark, "seconds_of", lambda work, repeats, device: (work(), [next(times)])[1])
    small = HeadsConfig(projector_hidden=4, predictor_hidden=4, output=4)
    sizes = HeadSizes(heads=2, views=3, embed_dim=4, config=small, images=(5,), repeats=3)
    (row,) = heads_benchmark.benchmark_heads(sizes, device="cpu")
    assert (row["together_s"], row["separate_s"], row["value"]) == (2, 5, 2.5)
    assert (row["heads"], row["images"], row["rows"]) == (2, 5, 15)
    assert heads_facts([row])[0][1].endswith("2.50 x as fast")


def test_cpus_measure_small_heads() -> None:
    small, paper = HeadSizes.for_device(torch.device("cpu")), HeadSizes.for_device(torch.device("cuda"))
    assert small.config.projector_hidden < paper.config.projector_hidden == 2048
    assert paper.images == (16, 32, 64, 1024) and small.heads == paper.heads == 12
