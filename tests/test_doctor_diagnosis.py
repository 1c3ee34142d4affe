"""Every check of the machine reports what is wrong with it: the probe is replaced, never the verdict."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mimref.doctor import accelerator, machine, rates, software
from mimref.doctor.accelerator import Build, Gpu
from mimref.doctor.checks import Check, attempt
from mimref.doctor.diagnosis import GROUPS, diagnose
from mimref.errors import OutputError
from mimref.files import cache_folder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
BUILD = Build("2.9.0", "12.8", ("sm_80", "sm_90", "compute_90"), 91002, "2.27.3")
GPU = Gpu("NVIDIA A100", (8, 0), 39 * GIB, 40 * GIB)
Probes = Mapping[str, Any]


def constant(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def raising(error: Exception) -> Callable[..., Any]:
    def probe(*_: object) -> Any:
        raise error

    return probe


# A healthy machine with two GPUs.
HEALTHY: Probes = {
    "software.python_version": constant((3, 12)),
    "software.compiler": constant("/usr/bin/g++"),
    "software.build_error": constant(""),
    "software.on_cuda": constant(True),
    "software.has_triton": constant(True),
    "accelerator.gpus": constant([GPU, GPU]),
    "accelerator.driver_version": constant("570.86"),
    "accelerator.torch_build": constant(BUILD),
    "machine.own_cores": constant(16),
    "machine.all_cores": constant(32),
    "machine.threads": constant(16),
    "machine.load": constant(0.5),
    "machine.gpus": constant(2),
    "machine.shared_memory": constant((8 * GIB, 8 * GIB)),
    "machine.open_files": constant(4096),
    "machine.disk_free": constant(100 * GIB),
    "rates.best_device": constant(CUDA),
    "rates.product_rate": lambda _, precision: 5e14 if precision is torch.bfloat16 else 5e13,
    "rates.product_error": constant(1e-3),
    "rates.bf16_supported": constant(True),
    "rates.decode_rate": constant(400.0),
}
MODULES = {"software": software, "accelerator": accelerator, "machine": machine, "rates": rates}


def version_of(**others: str | None) -> Callable[[str], str | None]:
    """Return a probe of the versions installed here, with some of them replaced."""
    real = software.installed
    return lambda package: others[package] if package in others else real(package)


def disk(name: str, free: int) -> Callable[[Path], int]:
    """Return a probe that finds so many bytes free in one of the folders."""
    wanted = {"cache": cache_folder, "temporary": lambda: Path(tempfile.gettempdir()), "cwd": Path.cwd}
    return lambda folder: free if folder == wanted[name]() else 100 * GIB


# Name of the check, its probes, the expected verdict, and a part of the advice.
FAULTS: list[tuple[str, Probes, str, str]] = [
    ("Python", {"software.python_version": constant((3, 10))}, "problem", "3.11"),
    ("Python", {"software.python_version": constant((3, 14))}, "advice", "3.13"),
    *((name, {"software.installed": version_of(**{name: None})}, "problem", f"'{name}>=") for name in software.SHOWN),
    *((name, {"software.installed": version_of(**{name: "0.1"})}, "problem", f"'{name}>=") for name in software.SHOWN),
    ("other packages", {"software.installed": version_of(rich=None)}, "problem", "'rich>="),
    ("extra hf", {"software.installed": version_of(datasets="1.0")}, "advice", "mimref[hf]"),
    ("extra wandb", {"software.installed": version_of(wandb="0.1")}, "advice", "mimref[wandb]"),
    ("torch.compile", {"software.compiler": constant(None)}, "advice", "g++"),
    ("torch.compile", {"software.build_error": constant("Python.h: No such file")}, "advice", "python3-dev"),
    ("torch.compile", {"software.has_triton": constant(False)}, "advice", "triton"),
    ("device", {"accelerator.gpus": constant([])}, "problem", "update the driver"),
    (
        "device",
        {"accelerator.gpus": constant([]), "accelerator.torch_build": constant(BUILD._replace(cuda=None))},
        "problem",
        "built for CPUs",
    ),
    ("cuDNN", {"accelerator.torch_build": constant(BUILD._replace(cudnn=None))}, "problem", "install torch"),
    ("NCCL", {"accelerator.torch_build": constant(BUILD._replace(nccl=None))}, "problem", "torchrun"),
    (
        "NCCL",
        {"accelerator.gpus": constant([GPU]), "accelerator.torch_build": constant(BUILD._replace(nccl=None))},
        "advice",
        "torchrun",
    ),
    ("GPU 1 capability", {"accelerator.gpus": constant([GPU, GPU._replace(capability=(7, 0))])}, "problem", "sm_80"),
    ("GPU 1 memory", {"accelerator.gpus": constant([GPU, GPU._replace(free_bytes=GIB)])}, "problem", "ViT-B/16"),
    ("GPU 0 memory", {"accelerator.gpus": constant([GPU._replace(free_bytes=30 * GIB)])}, "advice", "nvidia-smi"),
    ("cores", {"machine.threads": constant(64)}, "problem", "OMP_NUM_THREADS=16"),
    ("cores", {"machine.threads": constant(17)}, "advice", "OMP_NUM_THREADS=16"),
    ("cores", {"machine.threads": constant(1), "machine.gpus": constant(0)}, "advice", "OMP_NUM_THREADS=16"),
    ("cores", {"machine.load": constant(20.0)}, "advice", "other processes"),
    ("shared memory", {"machine.shared_memory": constant((40 * 2**20, 64 * 2**20))}, "problem", "--shm-size"),
    ("shared memory", {"machine.shared_memory": constant((GIB // 2, GIB // 2))}, "advice", "--shm-size"),
    ("open files", {"machine.open_files": constant(200)}, "problem", "ulimit -n"),
    ("open files", {"machine.open_files": constant(512)}, "advice", "ulimit -n"),
    *(
        (check, {"machine.disk_free": disk(name, free)}, verdict, setting)
        for check, name, setting in (
            ("disk of the cache", "cache", "MIMREF_CACHE"),
            ("disk of temporary files", "temporary", "TMPDIR"),
            ("disk of this folder", "cwd", "--out"),
        )
        for free, verdict in ((GIB // 2, "problem"), (5 * GIB, "advice"))
    ),
    ("disk of this folder", {"machine.disk_free": raising(OutputError("read-only"))}, "problem", "--out"),
    ("matrix product", {"rates.product_error": constant(0.3)}, "problem", "wrong results"),
    ("matrix product", {"rates.product_error": constant(float("nan"))}, "problem", "wrong results"),
    ("matrix product", {"rates.product_rate": constant(5e11)}, "advice", "power"),
    ("matrix product", {"rates.best_device": constant(CPU), "rates.product_rate": constant(1e8)}, "advice", "slower"),
    ("bfloat16", {"rates.product_error": constant(0.3)}, "problem", "--precision fp32"),
    ("bfloat16", {"rates.product_rate": lambda _, p: 1e13 if p is torch.bfloat16 else 2e13}, "advice", "fp32"),
    ("bfloat16", {"rates.bf16_supported": constant(False)}, "advice", "fp32"),
    ("JPEG decoding", {"rates.decode_rate": constant(20.0)}, "advice", "slow"),
]
# These only inform; `device` reports what is wrong with them.
FACTS = {"mimref", "driver", "CUDA of torch"}


def checks(monkeypatch: pytest.MonkeyPatch, probes: Probes = {}) -> dict[str, Check]:  # noqa: B006
    for name, probe in {**HEALTHY, **probes}.items():
        module, _, function = name.partition(".")
        monkeypatch.setattr(MODULES[module], function, probe)
    return {check.name: check for check in diagnose()}


@pytest.mark.parametrize(("name", "probes", "verdict", "todo"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_reported(
    name: str, probes: Probes, verdict: str, todo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = checks(monkeypatch, probes)[name]
    assert (check.verdict, todo in check.todo) == (verdict, True), check


def test_nothing_is_reported_of_a_healthy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = checks(monkeypatch)
    assert [check for check in found.values() if check.verdict != "ok"] == []
    # Every check has a fault above; all GPUs count as one kind, and so do all extras.
    kinds = lambda name: name.replace("GPU 1", "GPU 0").partition(" ")[0 if name.startswith("extra") else slice(None)]  # noqa: E731
    faulty = {kinds(name) for name, *_ in FAULTS}
    assert {kinds(name) for name in found.keys() - FACTS} == faulty


def test_hidden_gpus_are_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check = checks(monkeypatch, {"accelerator.gpus": constant([])})["device"]
    assert check.verdict == "advice" and "CUDA_VISIBLE_DEVICES" in check.todo


@pytest.mark.parametrize("probe", [name for name in HEALTHY if name != "software.has_triton"])
def test_a_probe_that_raises_ends_nothing(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks(monkeypatch)
    groups = [{check.name for check in attempt(group, check)} for group, check in GROUPS.items()]
    found = checks(monkeypatch, {probe: raising(RuntimeError("driver\nlost"))})
    unknown = [check for check in found.values() if "RuntimeError: driver)" in check.value]
    assert len(unknown) == {"machine.disk_free": 3, "machine.own_cores": 2}.get(probe, 1)
    assert {check.verdict for check in unknown} == {"advice"}
    # All checks of the other groups are still present.
    assert sum(not names <= found.keys() for names in groups) <= len(unknown)


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    found = {check.name: check for check in diagnose(lambda done, total: calls.append((done, total)))}
    assert calls == [(done, len(GROUPS)) for done in range(1, len(GROUPS) + 1)]
    assert all(check.value for check in found.values())
    assert not [check for check in found.values() if "could not be checked" in check.value]
    assert found["torch"].value == software.installed("torch")
    assert found["open files"].value in (f"{machine.open_files():,}", "no limit")
    assert f"of {os.cpu_count()}," in found["cores"].value


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("compute_80", (9, 0), True),
        ("compute_90", (8, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_100", (10, 3), True),
        ("gfx90a", (9, 0), False),
    ],
)
def test_which_code_runs_on_which_gpu(architecture: str, capability: tuple[int, int], runs: bool) -> None:
    assert accelerator._runs(architecture, capability) == runs


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: fatal error: Python.h: No such file or directory' >&2\nexit 1\n")
    compiler.chmod(0o755)
    assert "Python.h" in software.build_error(str(compiler))
    assert software.build_error(str(tmp_path / "missing")) != ""
    compiler.write_text("#!/bin/sh\nexit 0\n")
    assert software.build_error(str(compiler)) == ""


def test_the_driver_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n")
    monkeypatch.setattr(accelerator, "_DRIVER_FILE", version)
    assert accelerator.driver_version() == "550.54.15"
    monkeypatch.setattr(accelerator, "_DRIVER_FILE", tmp_path / "none")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '| NVIDIA-SMI 535.104.05  Driver Version: 535.104.05  CUDA Version: 12.2 |'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert accelerator.driver_version() == "535.104.05"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_product_is_right_to_its_precision(precision: torch.dtype) -> None:
    assert 0 < rates.product_error(CPU, precision) < rates.ERRORS[precision] / 4
