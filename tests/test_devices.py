"""Devices and precisions: refusals, and bfloat16 on the CPU close to float32."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import joblib
import pytest
import torch
import torch.distributed as dist
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn import functional as F

from mimref.cli import run
from mimref.devices import autocast, choose_attention, own_cores, resolve_device, resolve_precision
from mimref.errors import ConfigError
from tests.families import FAMILIES, backbone

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


def test_attention_trained_in_bfloat16_on_the_cpu_is_plain_and_close_to_float32() -> None:
    x, found = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0)), []
    torch.manual_seed(0)
    first = Attention(64, num_heads=2)
    for precision, fused in ((torch.float32, True), (torch.bfloat16, False)):
        attention, tokens = copy.deepcopy(first), x.clone().requires_grad_()
        choose_attention(nn.Sequential(attention), CPU, precision)
        assert attention.fused_attn is fused
        with autocast(CPU, precision):
            out = attention(tokens)
        out.float().square().sum().backward()
        assert tokens.grad is not None
        found.append((out.detach().float(), tokens.grad))
    for full, half in zip(*found, strict=True):
        assert (half - full).norm() < 0.02 * full.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_timm_names_its_fused_attention(name: str) -> None:
    encoder = backbone(FAMILIES[name])
    choose_attention(encoder, CPU, torch.bfloat16)
    calls: list[object] = []
    with patch.object(F, "scaled_dot_product_attention", lambda *given, **_: calls.append(given)), torch.no_grad():
        encoder.blocks(torch.randn(1, encoder.architecture.channels, 32, 32), [encoder.depth])
    assert calls == []


@contextmanager
def group() -> Iterator[None]:
    """A process group with only this process."""
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
    assert own_cores() == 12  # without a process group, the others have ended
    with group():
        assert own_cores() == 1
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        assert own_cores() == 4
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
        assert own_cores() == 1
