"""Shared by tests of evaluations on the command line: short command lines, and a count of encoder passes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mimref.encoders import checkpoints
from mimref.encoders.vit import Encoder

CHEAP = ["--device", "cpu", "--workers", "0"]


def line(command: str, folder: Path, *more: str) -> list[str]:
    return [command, str(folder / "base.safetensors"), *CHEAP, *more]


class Passes:
    """Counts the images that encoders have seen and the encoders that were built."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = self.built = 0
        blocks, build = Encoder.blocks, checkpoints.build_encoder

        def counting(encoder: Encoder, images: torch.Tensor, *args: Any, **options: Any) -> list[torch.Tensor]:
            self.images += len(images)
            return blocks(encoder, images, *args, **options)

        def building(architecture: Any) -> Encoder:
            self.built += 1
            return build(architecture)

        monkeypatch.setattr(Encoder, "blocks", counting)
        monkeypatch.setattr(checkpoints, "build_encoder", building)
