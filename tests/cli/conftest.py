"""Shared by tests of the command line: two tiny encoders and images."""

from pathlib import Path

import pytest
import torch

from mimref.encoders.checkpoints import save_encoder
from mimref.encoders.vit import build_encoder
from tests.tiny import ARCHITECTURE, write_labelled, write_unlabelled


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: `base.safetensors`, `refined.safetensors`, `data` with two classes, and `unlabelled` images."""
    made = tmp_path_factory.mktemp("suite")
    write_labelled(made / "data")
    write_unlabelled(made / "unlabelled")
    for seed, name in enumerate(("base", "refined")):
        torch.manual_seed(seed)
        encoder = build_encoder(ARCHITECTURE)
        for parameter in encoder.parameters():
            parameter.data.normal_(std=0.1)
        save_encoder(made / f"{name}.safetensors", encoder, {"data": {"spec": str(made / "data")}, "source": "mae"})
    return made
