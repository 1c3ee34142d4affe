"""Devices and precisions: refusals, and bfloat16 on the CPU close to float32."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import joblib
import numpy as np
import pytest
import torch
import torch.distributed as dist
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn import functional as F

from mimref.cli import run
from mimref.config.load import load_config
from mimref.config.recipe import Recipe
from mimref.config.run import TrainingConfig
from mimref.data.sample import Appearance
from mimref.data.sources import ArraySource
from mimref.devices import (
    Machine,
    adapt_precision,
    autocast,
    choose_attention,
    keep_freed_memory,
    own_cores,
    resolve_device,
    resolve_precision,
)
from mimref.encoders.vit import Architecture
from mimref.errors import Checks, ConfigError
from mimref.features.opening import check_device
from mimref.pretraining import recipe as pretraining
from mimref.pretraining.config import PretrainConfig
from mimref.refinement import recipe as refinement
from mimref.refinement.config import RefineConfig
from mimref.transfer.finetune import recipe as finetuning
from mimref.transfer.finetune.config import FinetuneConfig
from tests.families import FAMILIES, backbone

CPU = torch.device("cpu")
MACHINE = Machine(cuda=False)
SMALL = Architecture("custom", 28, width=96, depth=8, num_heads=3, patch_size=4)
GRAY = Appearance(64, 0, 28)
IMAGES = ArraySource("images", np.zeros((10_000, 1, 28, 28), np.uint8), None, None, "train", np.arange(10_000))


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


@pytest.mark.parametrize(
    ("has_instructions", "given", "expected"),
    [
        (True, {}, "bf16"),
        (False, {}, "fp32"),
        (False, {"precision": "bf16"}, "bf16"),
        (False, {"strict": True}, "bf16"),
    ],
)
@pytest.mark.parametrize("settings", [RefineConfig, PretrainConfig, FinetuneConfig])
def test_a_presets_bfloat16_is_replaced_where_the_cpu_would_emulate_it(
    settings: type[TrainingConfig],
    has_instructions: bool,
    given: dict[str, Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: has_instructions)
    preset = load_config(settings, "fashion_mnist", {"device": "cpu", **given})
    assert preset.precision == "bf16"
    if isinstance(preset, RefineConfig):
        found = refinement.fit(preset, SMALL, IMAGES)[0].precision
    elif isinstance(preset, PretrainConfig):
        found = pretraining.fit(preset, len(IMAGES), GRAY, MACHINE)[0].precision
    else:
        found = finetuning.fit(preset, finetuning.Labelled(10_000, 10, 10_000), GRAY, SMALL, MACHINE)[0].precision
    assert found == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_presets_bfloat16_is_replaced_where_a_gpu_would_emulate_it(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimref.devices.resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("mimref.features.opening.resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    preset = load_config(RefineConfig, "fashion_mnist", {"device": "cuda"})
    check_device(preset, checks := Checks())
    assert checks.passed  # it is adapted later
    recipe = Recipe(preset)
    adapt_precision(recipe)
    assert recipe.config.precision == expected
    check_device(load_config(RefineConfig, "fashion_mnist", {"precision": "bf16"}), checks)
    assert checks.passed == native


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


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("cuda:1", None),
        ("cuda:2", "'cuda:2' is not available"),
        ("mps:1", "'mps:1' is not available"),
        ("xpu", "'xpu' is unknown"),
        ("meta", "'meta' is unknown"),
    ],
)
def test_numbers_of_gpus_and_other_kinds_of_devices_are_checked(
    name: str, wrong: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if wrong is None:
        assert resolve_device(name) == torch.device(name)
    else:
        with pytest.raises(ConfigError, match=wrong):
            resolve_device(name)


@pytest.mark.parametrize("most", [1 << 30, 1 << 25])
def test_the_largest_threshold_that_the_c_library_accepts_is_set(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = {}

    def mallopt(option: int, value: int) -> int:
        if option == -3 and value > most:
            return 0
        accepted[option] = value
        return 1

    monkeypatch.setattr("mimref.devices.sys.platform", "linux")
    monkeypatch.setattr("mimref.devices.ctypes.CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    keep_freed_memory()
    assert accepted == {-1: (1 << 31) - 1, -3: most}


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
