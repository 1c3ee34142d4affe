"""Predicted memory against torch's tracker, real allocations, a closed form and, on a GPU, the GPU's own count."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile
from torch.torch_version import TorchVersion

from mimref.benchmarks import peak
from mimref.benchmarks.measure import PeakMemory
from mimref.benchmarks.peak import StepPeak, step_peak
from mimref.benchmarks.stage import ready_stage, resolve_encoder, synthetic_batch
from mimref.config.load import load_config
from mimref.data.loader import device_batches
from mimref.data.views import multi_crop
from mimref.refinement.config import RefineConfig
from mimref.refinement.schedule import StageName
from mimref.refinement.sizes import state_bytes
from tests.test_benchmarks_step import tiny

SMALL = {"encoder__width": 64, "encoder__image_size": 32, "views__local_size": 16, "heads__queue_size": 64}


def predicted(config: RefineConfig, stage: StageName = "encoder", **options: Any) -> StepPeak:
    architecture, blocks = resolve_encoder(config)
    return step_peak(config, architecture, blocks, stage, **options)


# --- torch's tracker


class Tracked(MemTracker):
    """torch's tracker in place of ours; it counts weights, gradients and buffers as well."""

    def leave_out(self, tensor: Tensor) -> None:
        self.track_external(tensor)

    @property
    def peak(self) -> int:
        return int(self.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        # Hooks only tell gradients from other tensors; weights that get no gradient cannot have hooks.
        found: tuple[int, int] = super()._track_module_params_and_buffers(module, install_grad_hooks=False)
        return found


def tracked_bytes(
    monkeypatch: pytest.MonkeyPatch, config: RefineConfig, stage: StageName, **options: Any
) -> tuple[int, int]:
    """Return the peak of a step, with weights and queue, by our count and by torch's tracker."""
    architecture, blocks = resolve_encoder(config)
    state = state_bytes(config, architecture, blocks, stage)
    ours = predicted(config, stage, **options).bytes + state.weights + state.queue + state.base
    with monkeypatch.context() as patch:
        patch.setattr(peak, "_Counted", Tracked)
        return ours, predicted(config, stage, **options).bytes


@pytest.mark.parametrize("stage", ["heads", "encoder"])
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({}, {"checkpointing": True}),
        ({"precision": "fp32"}, {}),
        ({"loss.dense": "gram"}, {}),
        ({"loss.dense": "cka", "precision": "fp32"}, {"checkpointing": True}),
        ({"heads.norm": "running"}, {}),
        ({"heads.norm": "layer"}, {}),
        ({"encoder_stage.freeze_blocks": 2}, {}),
    ],
)
def test_a_step_takes_what_the_tracker_of_torch_finds(
    monkeypatch: pytest.MonkeyPatch, stage: StageName, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    config = tiny(**SMALL, **{name.replace(".", "__"): value for name, value in changes.items()})
    ours, torchs = tracked_bytes(monkeypatch, config, stage, images=6, **options)
    assert ours == pytest.approx(torchs, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("preset", ["mae_l16", "mae_h14", "mae_2b14"])
def test_large_encoders_take_what_the_tracker_of_torch_finds(
    monkeypatch: pytest.MonkeyPatch, preset: str, checkpointing: bool
) -> None:
    config = load_config(RefineConfig, f"refine/{preset}", {})
    ours, torchs = tracked_bytes(monkeypatch, config, "encoder", images=64, checkpointing=checkpointing)
    assert ours == pytest.approx(torchs, rel=0.01)


# --- real allocations


def allocated_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that `work` has allocated on the CPU at any time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    held = most = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda each: each.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dense", ["none", "gram"])
def test_a_step_takes_what_a_real_one_allocates(micro_batch: int | None, checkpointing: bool, dense: str) -> None:
    size = SMALL | {"batch_size": 8, "heads__queue_size": 512, "views__color": False, "views__blur": False}
    config = tiny(**size, precision="fp32", activation_checkpointing=checkpointing, loss__dense=dense)
    with ready_stage(config, "encoder") as (job, _):
        job.method.micro_batch = micro_batch
        batch, weight_H = synthetic_batch(job), torch.ones(2)
        real = allocated_bytes(lambda: job.method.forward_backward(batch, weight_H, top_k=4, train_encoder=True))
    crops = sum(8 * group.count * 3 * group.size**2 for group in multi_crop(config.views, 32))
    ours = predicted(config, images=8, micro_batch=micro_batch, checkpointing=checkpointing).bytes - 2 * crops
    assert ours == pytest.approx(real, rel=0.1)


# --- a closed form


@pytest.mark.parametrize("images", [9, 30])
def test_a_block_keeps_36_bytes_of_each_token_and_channel(images: int) -> None:
    """In bf16 with fused attention: 8 bytes for two residual sums and 28 for bf16 tensors of all widths together."""
    depths = []
    for depth in (6, 7):
        config = tiny(encoder__depth=depth, heads__blocks=f"{depth}", **SMALL)
        depths.append(predicted(config, images=images, gradients_held=True).bytes)
    width, attention_heads, tokens = 64, 2, images * (2 * 17 + 5)
    # fp32: inputs of both norms. bf16: qkv input, q, k, v, attention output, input and both inner tensors of the MLP.
    kept = (4 + 4) * width + 2 * width * (1 + 3 + 1 + 1 + 4 + 4)
    # Mean and deviation of both norms, and the sum of every query's exponentials for each attention head.
    statistics = 4 * (2 + 2 + attention_heads)
    # Autocast keeps bf16 copies of matrices and biases.
    copies = 2 * (12 * width**2 + (3 + 1 + 4 + 1) * width)
    assert depths[1] - depths[0] == pytest.approx(tokens * (kept + statistics) + copies, rel=0.01)
    assert kept == 36 * width


# --- micro-batches


def test_two_micro_batches_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The predicted step stops after two micro-batches; a full step has the same peak."""
    config = tiny(**SMALL)
    short = predicted(config, images=12, micro_batch=2)
    with monkeypatch.context() as patch:
        patch.setattr(peak, "islice", lambda parts, _: parts)
        patch.delattr(peak._Brief, "_encode_in_parts")
        full = predicted(config, images=12, micro_batch=2)
    assert short.parts == pytest.approx(full.parts, rel=0.001)
    # While the encoder runs, the short step holds the features of one earlier part instead of all.
    assert short.whole == pytest.approx(full.whole, rel=0.02)


def test_held_gradients_are_left_out() -> None:
    config = tiny(**SMALL)
    architecture, blocks = resolve_encoder(config)
    gradients = state_bytes(config, architecture, blocks, "encoder").gradients
    # From the second part on, gradients exist in both cases.
    made, held = (predicted(config, images=8, micro_batch=2, gradients_held=flag).parts for flag in (False, True))
    assert made - held == pytest.approx(gradients, rel=0.05)


# --- CUDA's types


def saved_bytes(device: str, arch: str, size: int) -> int:
    """Return the bytes that an encoder pass in bf16 saves for the backward pass, with fake tensors of a device."""
    from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone

    with torch.device("meta"):
        encoder = TimmBackbone(BackboneArchitecture(arch, size)).train()
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True), peak._cuda_arithmetic():
        encoder._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        images = torch.empty(2, 3, size, size, device=device)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast(device, dtype=torch.bfloat16):
            encoder.blocks(images, [encoder.depth])
    return sum(storage.nbytes() for storage in storages.values())


# torch 2.6 aborts the process: it looks for a driver as soon as a fake CUDA tensor is differentiated.
@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.14", reason="known to work from torch 2.14 on")
@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("swin_tiny_patch4_window7_224", 224),
        ("swinv2_tiny_window8_256", 256),
        ("eva02_tiny_patch14_224", 224),
        ("convnextv2_atto", 224),
        ("hiera_tiny_224", 224),
    ],
)
def test_types_are_those_of_cuda(monkeypatch: pytest.MonkeyPatch, arch: str, size: int) -> None:
    """A forward pass of fake CUDA tensors needs no GPU; torch's autocast only has to assume that there is one."""
    ours = saved_bytes("cpu", arch, size)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert ours == pytest.approx(saved_bytes("cuda", arch, size), rel=0.05)


# --- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["heads", "encoder"])
@pytest.mark.parametrize("micro_batch", [None, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_allocates_what_is_predicted(stage: StageName, micro_batch: int | None, checkpointing: bool) -> None:
    size = {"encoder.arch": "vit_b16", "batch_size": 32, "device": "cuda", "activation_checkpointing": checkpointing}
    config = load_config(RefineConfig, "refine/mae_b16", size)
    with ready_stage(config, stage) as (job, _):
        job.method.micro_batch = micro_batch
        batches = device_batches(iter([synthetic_batch(job)] * 4), job.device)
        for _ in range(2):
            job.update(next(batches))
        torch.cuda.synchronize()
        memory = PeakMemory(job.device)
        job.update(next(batches))
        torch.cuda.synchronize()
        real = memory.growth()
    assert real is not None
    # The crops exist before the count begins.
    crops = 2 * sum(32 * group.count * 3 * group.size**2 for group in job.crops)
    ours = predicted(config, stage, images=32, micro_batch=micro_batch, checkpointing=checkpointing).bytes - crops
    assert ours == pytest.approx(real, rel=0.1)
