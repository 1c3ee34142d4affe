"""Folders of encoders other than plain vision transformers, and of other channels: timm and mimref load them."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from mimref.api import load
from mimref.config.base import ReadingConfig
from mimref.data.transforms import EvalTransform
from mimref.encoders.backbones import EncoderArchitecture
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.timm_models import features_of_blocks
from mimref.encoders.vit import Architecture, Encoder
from mimref.errors import ConfigError
from mimref.progress import Silent
from mimref.sharing.export import FolderExport, export_folder, folder_layout
from mimref.sharing.layout import Subject
from tests.families import BATCH_NORM, FAMILIES, backbone
from tests.family_files import PUBLISHED
from tests.subjects import NO_CLS_REGISTERS, TINY, TRANSFORM, make, subject_of

has_local_dir = pytest.mark.skipif(not hasattr(timm.models._hub, "load_model_config_from_path"), reason="timm 1.0.16")
OF_FIVE_CHANNELS = [
    replace(TINY, channels=5),
    Architecture("vit_tiny_patch16_224", 32, 192, 12, 3, 16, channels=5, fixed_positions=False),
    replace(FAMILIES["gray"], channels=5),
    replace(FAMILIES["convnextv2"], channels=5),
]


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def write(subject: Subject, out: Path) -> FolderExport:
    return export_folder(subject, folder_layout(subject, "timm"), "card", out)


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@has_local_dir
@pytest.mark.parametrize("family", [*FAMILIES, "batch norm"])
@torch.no_grad()
def test_timm_loads_other_families(family: str, tmp_path: Path) -> None:
    encoder = backbone(FAMILIES.get(family, BATCH_NORM))
    transform, every = replace(TRANSFORM, image_size=32), range(1, encoder.depth + 1)
    done = write(Subject(encoder, transform, {"source": "mae"}), tmp_path / "m")
    assert done.read_by == ["mimref", "timm"] and done.difference < 1e-5
    model = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    found, checkpoint, pixels = load(tmp_path / "m"), read_checkpoint(tmp_path / "m"), images(32)
    assert found.transform == transform and found.header["source"] == "mae"
    by_timm = features_of_blocks(model, pixels).values()
    by_mimref = encoder_from(checkpoint, choose_architecture(checkpoint)).eval().blocks(pixels, every)
    for theirs, read, ours in zip(by_timm, by_mimref, encoder.blocks(pixels, every), strict=True):
        close(theirs, ours)
        close(read, ours)


@has_local_dir
@torch.no_grad()
def test_timm_loads_aimv2(tmp_path: Path) -> None:
    # timm builds it as its plain ViT, and its files are read as other backbones are.
    case = PUBLISHED["aimv2"]
    torch.save(case.file(case.model()), tmp_path / "file.pth")
    checkpoint = read_checkpoint(tmp_path / "file.pth", ReadingConfig(num_heads=4))
    encoder = encoder_from(checkpoint, choose_architecture(checkpoint)).eval()
    assert not isinstance(encoder, Encoder)
    size = encoder.architecture.image_size
    done = write(Subject(encoder, replace(TRANSFORM, image_size=size)), tmp_path / "m")
    assert done.read_by == ["mimref", "timm"] and done.difference < 1e-5


@has_local_dir
@pytest.mark.parametrize("architecture", OF_FIVE_CHANNELS)
@torch.no_grad()
def test_timm_loads_encoders_of_other_channels(architecture: EncoderArchitecture, tmp_path: Path) -> None:
    plain = isinstance(architecture, Architecture)
    encoder: Any = make(architecture) if plain else backbone(architecture)
    size = architecture.image_size
    write(Subject(encoder, EvalTransform(size, mean=(0.5,) * 5, std=(0.2,) * 5)), tmp_path / "m")
    model = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    pixels = torch.randn(2, 5, size, size, generator=torch.Generator().manual_seed(1))
    found = list(features_of_blocks(model, pixels).values())
    for theirs, ours in zip(found, encoder.blocks(pixels, range(1, encoder.depth + 1)), strict=True):
        close(theirs, ours)


def test_without_a_choice_transformers_comes_first() -> None:
    notes = Notes()
    assert folder_layout(subject_of(make(TINY)), None, notes).library == "transformers" and not notes.lines
    for encoder in (make(NO_CLS_REGISTERS), backbone(FAMILIES["eva"])):
        subject = Subject(encoder, TRANSFORM)
        assert folder_layout(subject, None, notes).library == "timm"
        assert "--layout transformers" in notes.lines.pop()
        with pytest.raises(ConfigError, match="--layout timm"):
            folder_layout(subject, "transformers")


@torch.no_grad()
def test_transformers_loads_other_families(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if "model_args" not in inspect.signature(transformers.TimmWrapperConfig).parameters:
        pytest.skip("transformers reads no model_args")
    encoder = backbone(FAMILIES["dinov3"])
    write(Subject(encoder, replace(TRANSFORM, image_size=32)), tmp_path / "m")
    output = transformers.AutoModel.from_pretrained(tmp_path / "m").eval()(images(32))
    close(output.last_hidden_state, encoder.blocks(images(32), [encoder.depth], final_norm=True)[0])
