"""Every family, from its publisher's file: refined on digits, resumed in both stages, exported and read back."""

import signal
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mimref.cli import run
from mimref.encoders.backbones import BackboneArchitecture, EncoderArchitecture, TimmBackbone, TokenEncoder, reached
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.settings import architecture_to_train
from mimref.errors import Interrupted
from mimref.progress import Listener
from mimref.refinement.config import RefineConfig
from mimref.refinement.run import refine
from tests.checkpoints import data2vec, mae_vit, mae_with_decoder
from tests.families import timms_own
from tests.family_files import PUBLISHED, content, timm_features
from tests.test_encoders_families_publishers import reading_of
from tests.tiny import assert_same_run, header, refine_config, tensors

PLAIN = {"mae": lambda: mae_with_decoder(mae_vit().state_dict()), "d2v2": data2vec}
# Files that do not reveal an image size would otherwise be read as those of 224 pixels.
SIZES = {"dinov3": 32, "dinov3_swiglu": 32} | dict.fromkeys(
    ("convnextv2", "convnextv2_sparse", "convnextv2_small", "dinov3_convnext"), 64
)
# 256 digits in batches of 32: two epochs of each stage have 16 steps.
STEPS: dict[str, Any] = {
    "data__train_limit": 256,
    "batch_size": 32,
    "heads__queue_size": 64,
    "heads_stage__epochs": 2,
    "encoder_stage__epochs": 2,
    "encoder_stage__lr": 1e-3,
    "views__blur": False,
    "monitor__knn_every_epochs": 0,
}


class StopAt(Listener):
    """Asks the run to save its state and to stop in a step of a stage."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step

    def progress(self, label: str, done: int, total: int) -> None:
        if label.startswith(self.stage) and done == self.step:
            signal.raise_signal(signal.SIGTERM)


def write_file(name: str, path: Path) -> Path:
    """Write what the publisher would save; return `path`."""
    if name in PLAIN:
        torch.save(PLAIN[name](), path)
    else:
        torch.save(content(PUBLISHED[name], PUBLISHED[name].model())[0], path)
    return path


def config_of(name: str, file: Path) -> tuple[RefineConfig, EncoderArchitecture]:
    """Return settings and architecture: head on the last block but one, first of 3+ blocks frozen, small local view."""
    reading = {"encoder__num_heads": reading_of(name).num_heads, "encoder__image_size": SIZES.get(name)}
    changes = STEPS | {key: value for key, value in reading.items() if value is not None}
    first = refine_config(file, Path("digits"), **changes)
    architecture = architecture_to_train(first.encoder, read_checkpoint(file, first.encoder))
    read = architecture.depth - 1
    changes |= {
        "heads__blocks": str(read),
        "encoder_stage__freeze_blocks": int(read > 1),
        "views__local_size": architecture.sizes.nearest(architecture.image_size // 2),
    }
    return refine_config(file, Path("digits"), **changes), architecture


def trained(config: RefineConfig, architecture: EncoderArchitecture, names: Iterable[str]) -> set[str]:
    """Return the names of the tensors between the frozen blocks and the head."""
    frozen, read = config.encoder_stage.freeze_blocks, architecture.depth - 1
    if isinstance(architecture, BackboneArchitecture):
        return set(reached(architecture, read)) - set(reached(architecture, frozen) if frozen else ())
    assert (frozen, read) == (1, 2)
    return {key for key in names if key.startswith("blocks.1.")}


def every_block(encoder: TokenEncoder) -> list[torch.Tensor]:
    with torch.no_grad():
        return encoder.eval().blocks(some_images(encoder.architecture.image_size), range(1, encoder.depth + 1))


def some_images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PLAIN, *PUBLISHED])
def test_refined_resumed_and_exported(name: str, tmp_path: Path) -> None:
    file = write_file(name, tmp_path / "published.pth")
    config, architecture = config_of(name, file)
    refine(config, tmp_path / "run")

    base = encoder_from(read_checkpoint(file, config.encoder), architecture).model.state_dict()
    refined = tensors(tmp_path / "run")
    assert base.keys() == refined.keys()
    moved = {key for key in base if not torch.equal(base[key], refined[key])}
    assert moved == trained(config, architecture, base) and len(moved) > 8
    source = read_checkpoint(file, config.encoder).source
    assert header(tmp_path / "run")["source"] == (f"{source} refined" if source else "refined")

    for resume, stage in ((False, "stage 1"), (True, "stage 2")):
        with pytest.raises(Interrupted):
            refine(config, tmp_path / "parts", resume=resume, listener=StopAt(stage, 5))
    refine(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "run")

    checkpoint = read_checkpoint(tmp_path / "run")
    wanted = every_block(encoder_from(checkpoint, choose_architecture(checkpoint)))
    for layout in layouts_of(name):
        out = tmp_path / f"{layout}.pth"
        assert run(["export", str(tmp_path / "run"), "--to", layout, "--out", str(out)]) == 0
        for one, other in zip(read_back(out, layout, architecture, name), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@torch.no_grad()
def read_back(out: Path, layout: str, architecture: EncoderArchitecture, name: str) -> list[torch.Tensor]:
    """Return every block's tokens: by timm alone for a backbone in timm's layout, else from the file's content."""
    if layout == "timm" and isinstance(architecture, BackboneArchitecture):
        model = timms_own(TimmBackbone(architecture), checkpoint_path=str(out))
        return timm_features(model, some_images(architecture.image_size))
    checkpoint = read_checkpoint(out, reading_of(name))
    found = replace(choose_architecture(checkpoint), image_size=architecture.image_size)
    return every_block(encoder_from(checkpoint, found))


def layouts_of(name: str) -> list[str]:
    """Return the family's `export` formats: timm has no post-norm blocks; the release has only MAE and data2vec 2.0."""
    return {"mae": ["timm", "release"], "d2v2": ["release"]}.get(name, ["publisher", "timm"])
