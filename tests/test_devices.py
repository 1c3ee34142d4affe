"""Devices and precisions: refusals, and bfloat16 on the CPU close to float32."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import joblib
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from mimref.cli import run
from mimref.devices import autocast, own_cores, resolve_device, resolve_precision
from mimref.errors import ConfigError

CPU = torch.device("cpu")


def test_auto_is_float32_on_the_cpu() -> None:
    assert resolve_precision("auto", CPU) is torch.float32
    assert resolve_precision("bf16", CPU) is torch.bfloat16
    assert resolve_precision("fp32", CPU) is torch.float32


@pytest.mark.parametrize(("native", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_emulated_bfloat16_is_not_chosen(native: bool, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert resolve_precision("auto", torch.device("cuda")) is chosen
    if not native:
        with pytest.raises(ConfigError, match="precision 'bf16' is not supported by this GPU"):
            resolve_precision("bf16", torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_refused() -> None:
    assert resolve_device("cpu") == CPU
    with pytest.raises(ConfigError, match="'cuda' is not available"):
        resolve_device("cuda")


def test_an_unknown_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="'tpu' is unknown; use auto, cpu, cuda or mps"):
        resolve_device("tpu")
    for command in ("views", "eval", "all"):
        assert run(["benchmark", command, "--device", "tpu"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_float32_changes_nothing() -> None:
    x = torch.randn(3, 3)
    with autocast(CPU, torch.float32):
        assert (x @ x).dtype is torch.float32


def test_bfloat16_attention_and_its_gradient_are_close_to_float32() -> None:
    query = torch.randn(2, 3, 17, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for precision in (torch.float32, torch.bfloat16):
        q = query.clone().requires_grad_()
        with autocast(CPU, precision):
            out = F.scaled_dot_product_attention(q.to(precision), q.to(precision), q.to(precision))
            assert out.dtype is precision
            out.float().square().sum().backward()
        assert q.grad is not None
        found.append((out.detach().float(), q.grad))
    for full, half in zip(*found, strict=True):
        assert (half - full).norm() < 0.02 * full.norm()


def test_bfloat16_on_the_cpu_uses_plain_attention() -> None:
    with autocast(CPU, torch.bfloat16):
        assert torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@contextmanager
def group() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system with affinities")
def test_own_cores_are_those_of_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    assert 1 <= own_cores() <= len(before)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert own_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert own_cores() == 12  # once the others have ended
    with group():
        assert own_cores() == 1
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        assert own_cores() == 4
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
        assert own_cores() == 1
