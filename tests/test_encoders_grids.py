"""Images of one channel, and positions of grids that are not square."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from mimref.api import load
from mimref.config.base import DataConfig, ReadingConfig
from mimref.data.transforms import EvalTransform
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint, save_encoder
from mimref.encoders.export import export_release, export_timm, read_encoder
from mimref.encoders.formats import recognise
from mimref.encoders.parts import Unrecognised
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.features.header import eval_transform
from mimref.refinement.run import refine
from tests.checkpoints import DEPTH, IMAGE, PATCH, WIDTH, data2vec, data2vec_tokens, timm_vit, tokens
from tests.tiny import refine_config, write_labelled


def encoder_of(path: Path, **options: Any) -> Encoder:
    checkpoint = read_checkpoint(path, ReadingConfig(**options))
    encoder = encoder_from(checkpoint, choose_architecture(checkpoint))
    assert isinstance(encoder, Encoder)
    return encoder.eval()


# --- one channel


def gray_weights(path: Path) -> Any:
    vit = timm_vit(in_chans=1)
    torch.save({"model": vit.state_dict()}, path)
    return vit


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*heads are assumed")
def test_gray_pictures_give_the_features_of_their_one_channel(tmp_path: Path) -> None:
    vit = gray_weights(tmp_path / "xray.pth")
    loaded = load(tmp_path / "xray.pth")
    assert isinstance(loaded.model, Encoder) and loaded.model.architecture.channels == 1
    mean, std = (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3
    np.testing.assert_allclose(loaded.transform.mean + loaded.transform.std, [mean] * 3 + [std] * 3, rtol=1e-12)
    pixels = torch.randint(0, 256, (2, 1, IMAGE, IMAGE), dtype=torch.uint8)
    expected = tokens(vit, (pixels / 255 - mean) / std)
    images = loaded.transform.normalize(pixels.expand(-1, 3, -1, -1))
    for ours, theirs in zip(loaded.model.blocks(images, [1, 2, 3]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for ours, theirs in zip(loaded.model.blocks(images[:, :1], [1, 2, 3]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*heads are assumed")
def test_colours_become_luma_before_they_are_normalised(tmp_path: Path) -> None:
    vit = gray_weights(tmp_path / "xray.pth")
    loaded = load(tmp_path / "xray.pth")
    pixels = torch.randint(0, 256, (2, 3, IMAGE, IMAGE), dtype=torch.uint8)
    luma = (0.299 * pixels[:, 0] + 0.587 * pixels[:, 1] + 0.114 * pixels[:, 2])[:, None]
    expected = tokens(vit, (luma / 255 - loaded.transform.mean[0]) / loaded.transform.std[0])[-1]
    ours = loaded.model.blocks(loaded.transform.normalize(pixels), [DEPTH])[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_normalisation_of_gray_encoders() -> None:
    gray = Architecture("custom", 16, 32, 2, 2, 8, channels=1)
    header = {"transform": EvalTransform(16, mean=(0.25, 0.25, 0.25), std=(0.1, 0.2, 0.3)).to_dict()}
    found = eval_transform(gray, DataConfig(), header)
    assert found.mean == (0.25, 0.25, 0.25)
    np.testing.assert_allclose(found.std, [0.2] * 3)


def test_headers_of_colour_encoders_do_not_change() -> None:
    assert "channels" not in Architecture("custom", 16, 32, 2, 2, 8).to_dict()
    gray = Architecture("custom", 16, 32, 2, 2, 8, channels=1)
    assert Architecture.from_dict(gray.to_dict()) == gray


@pytest.mark.parametrize("post_norm", [False, True])
@torch.no_grad()
def test_gray_files_are_written_and_read_back(post_norm: bool, tmp_path: Path) -> None:
    architecture = Architecture("custom", 16, 32, 2, 2, 8, post_norm=post_norm, channels=1)
    encoder = build_encoder(architecture).eval()
    save_encoder(tmp_path / "a.safetensors", encoder, {})
    again = encoder_of(tmp_path / "a.safetensors")
    images = torch.randn(2, 1, 16, 16)
    assert again.architecture == architecture
    assert torch.equal(encoder.blocks(images, [2])[0], again.blocks(images, [2])[0])


@torch.no_grad()
def test_gray_data2vec(tmp_path: Path) -> None:
    state = data2vec(channels=1)
    torch.save({"model": state}, tmp_path / "a.pt")
    images = torch.randn(2, 1, IMAGE, IMAGE)
    for ours, theirs in zip(
        encoder_of(tmp_path / "a.pt").blocks(images, [1, 2, 3]), data2vec_tokens(state, images, heads=2), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_gray_exports(tmp_path: Path) -> None:
    gray_weights(tmp_path / "xray.pth")
    encoder, facts, _ = read_encoder(tmp_path / "xray.pth")
    assert "in_chans=1" in export_timm(encoder, tmp_path / "timm.safetensors", facts).read_with
    export_release(encoder, tmp_path / "release.th", facts)
    assert torch.load(tmp_path / "release.th")["ctor_kwargs"]["input_shape"] == (1, IMAGE, IMAGE)
    assert encoder_of(tmp_path / "release.th").architecture.channels == 1


@torch.no_grad()
def test_gray_models_of_timm_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("test_vit", num_classes=0, in_chans=1).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    architecture = choose_architecture(checkpoint, "test_vit")
    encoder = encoder_from(checkpoint, architecture)
    assert isinstance(encoder, Encoder) and encoder.architecture.channels == 1
    images = torch.randn(1, 1, architecture.image_size, architecture.image_size)
    expected = model.forward_features(images)
    torch.testing.assert_close(encoder.eval().blocks(images, [6], final_norm=True)[0], expected, rtol=0, atol=1e-5)


def test_gray_encoders_are_refined(tmp_path: Path) -> None:
    weights = tmp_path / "gray.safetensors"
    torch.manual_seed(0)
    save_encoder(weights, build_encoder(Architecture("custom", 16, 32, 4, 2, 8, channels=1)), {"source": "mae"})
    config = refine_config(weights, write_labelled(tmp_path / "data"), evaluate__enabled=True, evaluate__cluster_runs=2)
    refine(config, tmp_path / "run")
    before, after = encoder_of(weights), encoder_of(tmp_path / "run")
    assert after.architecture == before.architecture
    assert not torch.equal(before.vit.patch_embed.proj.weight, after.vit.patch_embed.proj.weight)


# --- grids


def interpolated(patches_1ND: Tensor, rows: int, columns: int) -> Tensor:
    side = max(rows, columns)
    image = patches_1ND.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    # As in timm, the only code for this layout that has such grids.
    resized = F.interpolate(image, size=(side, side), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize(
    ("patches", "asked", "grid"),
    [
        (32, None, (4, 8)),
        (32, (8, 4), (8, 4)),
        (32, (2, 16), (2, 16)),
        (12, None, (3, 4)),
        (8 * 64, (8, 64), (8, 64)),
        (16, (2, 8), (2, 8)),
    ],
)
def test_grids_that_are_no_square(patches: int, asked: tuple[int, int] | None, grid: tuple[int, int]) -> None:
    state = dict(timm_vit().state_dict()) | {"pos_embed": torch.randn(1, 1 + patches, WIDTH)}
    found = recognise(state, ReadingConfig(grid=asked))
    side = max(grid)
    assert found.grid == grid and found.architecture.image_size == side * PATCH
    expected = torch.cat([state["pos_embed"][:, :1], interpolated(state["pos_embed"][:, 1:], *grid)], dim=1)
    torch.testing.assert_close(found.tensors["pos_embed"], expected, rtol=0, atol=1e-6)
    assert any("encoder.grid" in notice for notice in found.notices) is (asked is None)
    assert any(f"{grid[0]} x {grid[1]} patches were interpolated to {side} x {side}" in each for each in found.notices)


def test_grids_without_cls_token_or_with_registers() -> None:
    vit = timm_vit(class_token=False, global_pool="avg", fc_norm=False)
    positions = torch.randn(1, 32, WIDTH)
    found = recognise(dict(vit.state_dict()) | {"pos_embed": positions})
    torch.testing.assert_close(found.tensors["pos_embed"], interpolated(positions, 4, 8), rtol=0, atol=1e-6)
    vit = timm_vit(reg_tokens=4, no_embed_class=True)
    positions = torch.randn(1, 1 + 32, WIDTH)
    found = recognise(dict(vit.state_dict()) | {"pos_embed": positions})
    torch.testing.assert_close(found.tensors["pos_embed"], interpolated(positions[:, 1:], 4, 8), rtol=0, atol=1e-6)


def test_wrong_grids_are_refused() -> None:
    state = dict(timm_vit().state_dict())
    with pytest.raises(Unrecognised, match="not 3 x 5 patches"):
        recognise(state, ReadingConfig(grid=(3, 5)))
    with pytest.raises(Unrecognised, match=r"2 x 4 patches, not \(4, 2\)"):
        recognise(state | {"pos_embed": torch.randn(1, 2, 4, WIDTH)}, ReadingConfig(grid=(4, 2)))


def test_features_of_two_grids_have_two_keys(tmp_path: Path) -> None:
    state = dict(timm_vit().state_dict()) | {"pos_embed": torch.randn(1, 1 + 32, WIDTH)}
    torch.save(state, tmp_path / "wide.pth")
    wide, tall = (read_checkpoint(tmp_path / "wide.pth", ReadingConfig(grid=grid)) for grid in ((4, 8), (8, 4)))
    assert wide.fingerprint != tall.fingerprint
    assert wide.fingerprint == read_checkpoint(tmp_path / "wide.pth").fingerprint
