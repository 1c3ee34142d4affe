"""An encoder, images and settings so small that a whole run takes a second."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mimref.config import PretrainConfig, RefineConfig
from mimref.encoders.checkpoints import save_encoder
from mimref.encoders.vit import Architecture, build_encoder
from mimref.recipes import load_config

ARCHITECTURE = Architecture("custom", 16, width=32, depth=4, num_heads=2, patch_size=8)


def write_images(
    folder: Path, *, per_class: int, classes: Sequence[str] = ("a", "b"), split: str | None = None
) -> Path:
    """PNGs of 16 x 16 noise, one mean colour per class, below `folder`/`split`/class; returns `folder`."""
    rng = np.random.default_rng(len(split or "") + per_class)
    for number, name in enumerate(classes):
        place = folder / (split or "") / name
        place.mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            pixels = np.clip(rng.normal(60 + 120 * number, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{index:03}.png")
    return folder


def write_labelled(folder: Path) -> Path:
    """48 training and 16 validation images of two classes."""
    write_images(folder, per_class=24, split="train")
    return write_images(folder, per_class=8, split="val")


def write_unlabelled(folder: Path) -> Path:
    """48 images without classes."""
    return write_images(folder, per_class=48, classes=("",))


def write_weights(path: Path, *, seed: int = 0, architecture: Architecture = ARCHITECTURE) -> Path:
    """A random encoder with a header, as `pretrain` writes it; returns `path`."""
    torch.manual_seed(seed)
    save_encoder(path, build_encoder(architecture), {"source": "mae"})
    return path


# 48 images in batches of 12 are 4 steps per epoch: 8 of stage 1, 12 of stage 2.
REFINE: dict[str, Any] = {
    "batch_size": 12,
    "workers": 0,
    "device": "cpu",
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
PRETRAIN: dict[str, Any] = {
    "batch_size": 12,
    "workers": 0,
    "device": "cpu",
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


def refine_config(weights: Path, data: Path, **changes: Any) -> RefineConfig:
    """Settings of a tiny refinement; `changes` are named like `heads__blocks`."""
    return load_config(
        RefineConfig, None, REFINE | {"encoder.weights": str(weights), "data.spec": str(data)} | _dotted(changes)
    )


def pretrain_config(data: Path, **changes: Any) -> PretrainConfig:
    """Settings of a tiny pre-training; `changes` are named like `mae__epochs`."""
    return load_config(PretrainConfig, None, PRETRAIN | {"data.spec": str(data)} | _dotted(changes))


def arguments(command: str, out: Path, settings: dict[str, Any]) -> list[str]:
    """The command line for dotted settings."""
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={_toml(value)}")]
    return [command, *sets, "--out", str(out)]


def _dotted(changes: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in changes.items()}


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
