"""An encoder, images and settings so small that a whole run takes a second, and comparisons of whole runs."""

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from mimref.config.load import load_config
from mimref.encoders.checkpoints import save_encoder
from mimref.encoders.vit import Architecture, build_encoder
from mimref.pretraining.config import PretrainConfig
from mimref.refinement.config import RefineConfig
from mimref.training.folder import RunFolder
from mimref.transfer.finetune.config import FinetuneConfig

ARCHITECTURE = Architecture("custom", 16, width=32, depth=4, num_heads=2, patch_size=8)


def write_images(
    folder: Path, *, per_class: int, classes: Sequence[str] = ("a", "b"), split: str | None = None
) -> Path:
    """Write PNGs of 16 x 16 noise, one mean colour per class, to `folder`/`split`/class; return `folder`."""
    rng = np.random.default_rng(len(split or "") + per_class)
    for number, name in enumerate(classes):
        place = folder / (split or "") / name
        place.mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            pixels = np.clip(rng.normal(60 + 120 * number, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{index:03}.png")
    return folder


def turn(path: Path) -> None:
    """Give an image an EXIF orientation."""
    with Image.open(path) as image:
        image.load()
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)


def write_labelled(folder: Path) -> Path:
    """Write 48 training and 16 validation images of two classes."""
    write_images(folder, per_class=24, split="train")
    return write_images(folder, per_class=8, split="val")


def write_unlabelled(folder: Path) -> Path:
    """Write 48 images without classes."""
    return write_images(folder, per_class=48, classes=("",))


def write_weights(path: Path, *, seed: int = 0, architecture: Architecture = ARCHITECTURE) -> Path:
    """Write a random encoder with a header, as `pretrain` writes it; return `path`."""
    torch.manual_seed(seed)
    save_encoder(path, build_encoder(architecture), {"source": "mae"})
    return path


# 48 images in batches of 12 are 4 steps per epoch: 8 of stage 1, 12 of stage 2.
REFINE: dict[str, Any] = {
    "batch_size": 12,
    "workers": 0,
    "device": "cpu",
    "precision": "fp32",
    "views.local_views": 1,
    "views.local_size": 8,
    "heads.blocks": "3-4",
    "heads.projector_hidden": 16,
    "heads.predictor_hidden": 16,
    "heads.output": 8,
    "heads.queue_size": 24,
    "heads_stage.epochs": 2,
    "heads_stage.lr": 1e-2,
    "encoder_stage.epochs": 3,
    "encoder_stage.lr": 1e-2,
    "encoder_stage.top_k": 4,
    "encoder_stage.ema": 0.5,
    "monitor.log_every": 3,
    "evaluate.enabled": False,
}
EVALUATED: dict[str, Any] = {"evaluate__enabled": True, "evaluate__cluster_runs": 2, "evaluate__splits": 1}
"""Changes for `refine_config` that add a before/after table to a run."""
PRETRAIN: dict[str, Any] = {
    "batch_size": 12,
    "workers": 0,
    "device": "cpu",
    "precision": "fp32",
    "encoder.arch": "custom",
    "encoder.image_size": 16,
    "encoder.width": 32,
    "encoder.depth": 2,
    "encoder.num_heads": 2,
    "encoder.patch_size": 4,
    "mae.epochs": 3,
    "mae.warmup_epochs": 1,
    "mae.decoder.width": 16,
    "mae.decoder.depth": 1,
    "mae.decoder.num_heads": 2,
    "monitor.log_every": 3,
}
SIMMIM: dict[str, Any] = {"objective": "simmim", "simmim.epochs": 3, "simmim.warmup_epochs": 1, "simmim.lr": 1e-3}
"""Replaces `mae.*` in PRETRAIN."""


# 48 images in batches of 12 are 4 steps per epoch; mixup, CutMix, RandAugment, erasing and stochastic depth are on.
FINETUNE: dict[str, Any] = {
    "batch_size": 12,
    "workers": 0,
    "device": "cpu",
    "precision": "fp32",
    "finetune.epochs": 3,
    "finetune.warmup_epochs": 1.0,
    "finetune.lr": 1e-2,
    "finetune.drop_path": 0.3,
    "finetune.ema": 0.5,
    "augment.crop_scale": [0.08, 1.0],
    "augment.rand_augment": "rand-m9-mstd0.5-inc1",
    "augment.erase": 0.25,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "monitor.log_every": 3,
}


def refine_config(weights: Path, data: Path, **changes: Any) -> RefineConfig:
    """Return settings of a tiny refinement; `changes` are named like `heads__blocks`."""
    return load_config(
        RefineConfig, None, REFINE | {"encoder.weights": str(weights), "data.spec": str(data)} | _dotted(changes)
    )


def pretrain_config(data: Path, **changes: Any) -> PretrainConfig:
    """Return settings of a tiny pre-training; `changes` are named like `mae__epochs`."""
    return load_config(PretrainConfig, None, PRETRAIN | {"data.spec": str(data)} | _dotted(changes))


def simmim_config(data: Path, **changes: Any) -> PretrainConfig:
    """Return the same with the objective `simmim`; `changes` are named like `simmim__epochs`."""
    settings = {key: value for key, value in PRETRAIN.items() if not key.startswith("mae.")} | SIMMIM
    return load_config(PretrainConfig, None, settings | {"data.spec": str(data)} | _dotted(changes))


def finetune_config(weights: Path, data: Path, **changes: Any) -> FinetuneConfig:
    """Return settings of a tiny fine-tuning; `changes` are named like `finetune__epochs`."""
    named = {"encoder.weights": str(weights), "data.spec": str(data)}
    return load_config(FinetuneConfig, None, FINETUNE | named | _dotted(changes))


def arguments(command: str, out: Path, settings: dict[str, Any]) -> list[str]:
    """Return the command line for dotted settings; a refinement takes all others from the preset `quickstart`."""
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={_toml(value)}")]
    preset = ["--preset", "quickstart"] if command == "refine" else []
    return [command, *preset, *sets, "--out", str(out)]


def _dotted(changes: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in changes.items()}


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class Killed(Exception):
    """Stands in for SIGKILL: nothing is saved, nothing is tidied up."""


class Watcher:
    """A listener that keeps notes and warnings, and calls `at` with every step that training or evaluation reaches."""

    def __init__(self, at: Callable[[str, int], None] = lambda label, step: None) -> None:
        self.at, self.step = at, 0
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def progress(self, label: str, done: int, total: int) -> None:
        if label.startswith(("stage", "pre-training")):
            self.step = done + (8 if label.startswith("stage 2") else 0)
            self.at("step", self.step)
        else:
            self.at(label, done)

    def note(self, message: str) -> None:
        self.notes.append(message)
        self.at(message.partition(":")[0], 0)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def signal_at(step: int, number: int = signal.SIGTERM, *, what: str = "step") -> Watcher:
    return Watcher(lambda label, done: signal.raise_signal(number) if (label, done) == (what, step) else None)


def kill_at(what: str, step: int) -> Watcher:
    def at(label: str, done: int) -> None:
        if (label, done) == (what, step):
            raise Killed

    return Watcher(at)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "encoder.safetensors")


def assert_same_run(out: Path, other: Path) -> None:
    """Check that weights and log are the same, bit for bit, and that the results are the same."""
    found, expected = tensors(out), tensors(other)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert (out / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    assert results(out)["metrics"] == results(other)["metrics"]


def saved_step(out: Path) -> int:
    """Return the step from which `--resume` would continue."""
    state = RunFolder(out).load_state()
    assert state is not None
    return int(state["step"])


def results(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "results.json").read_text())
    return loaded


def header(out: Path) -> dict[str, Any]:
    with safe_open(out / "encoder.safetensors", framework="pt") as opened:
        loaded: dict[str, Any] = json.loads(opened.metadata()["mimref"])
    return loaded
