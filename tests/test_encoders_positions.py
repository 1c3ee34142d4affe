"""Positions on other grids, against plain loops over the published formulas and against the families' own models."""

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.models.vision_transformer import interpolate_embeddings

from mimref.config.base import Interpolation, ReadingConfig
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.export import export_timm, read_encoder
from mimref.encoders.export_onnx import export_onnx
from mimref.encoders.positions import RULES, resize_positions
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from tests.checkpoints import LAYOUTS, PATCH, SIDE, WIDTH, State, dino, load_encoder, timm_vit, tokens
from tests.test_encoders_formats import hugging_face

# Smaller, larger, and one where the scale factor alone would give one row too few: 61 / 14 * 14 < 61 in floats.
SIDES = [(4, 3), (4, 7), (14, 61)]
# Reference for `resize_positions`: offset, antialiasing, aligned corners.
FORMULAS: dict[Interpolation, tuple[float, bool, bool]] = {
    "mae": (0.0, False, False),
    "dino": (0.1, False, False),
    "dinov2": (0.1, False, False),
    "dinov2_reg": (0.0, True, False),
    "timm": (0.0, True, False),
    "torchvision": (0.0, False, True),
}


def cubic(distance: float, a: float) -> float:
    """Keys' cubic convolution kernel."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def weights_of_a_side(old: int, new: int, offset: float, antialias: bool, align_corners: bool) -> np.ndarray:
    """A (new, old) matrix: row i holds the weight of each old position in the new position i."""
    found = np.zeros((new, old))
    step = (old - 1) / (new - 1) if align_corners else old / (new + offset)
    # Antialiasing uses the Catmull-Rom kernel, wider when shrinking, and ignores what is outside; else borders repeat.
    width = max(step, 1.0) if antialias else 1.0
    for i in range(new):
        centre = i * step if align_corners else (i + 0.5) * step - 0.5
        for j in range(-3 * old - 8, 4 * old + 8):
            weight = cubic((j - centre) / width, -0.5 if antialias else -0.75)
            if antialias and not 0 <= j < old:
                continue
            found[i, min(max(j, 0), old - 1)] += weight
        if antialias:
            found[i] /= found[i].sum()
    return found


def reference(positions: Tensor, side: int, interpolation: Interpolation) -> Tensor:
    """(1, N, D) positions on a grid of `side` rows and columns, from plain loops in float64."""
    old = round(positions.shape[1] ** 0.5)
    matrix = weights_of_a_side(old, side, *FORMULAS[interpolation])
    image = positions.double().numpy().reshape(old, old, -1)
    return torch.from_numpy(np.einsum("ri,cj,ijd->rcd", matrix, matrix, image)).flatten(0, 1)[None].float()


@pytest.mark.parametrize(("old", "new"), SIDES)
@pytest.mark.parametrize("interpolation", FORMULAS)
def test_positions_equal_plain_loops(interpolation: Interpolation, old: int, new: int) -> None:
    positions = torch.randn(1, old**2, 8, generator=torch.Generator().manual_seed(0))
    resized = resize_positions(positions, (new, new), interpolation=interpolation)
    torch.testing.assert_close(resized, reference(positions, new, interpolation), rtol=0, atol=1e-5)
    assert resize_positions(positions, (old, old), interpolation=interpolation) is positions


def test_the_rules_differ() -> None:
    positions = torch.randn(1, 16, 8)
    for side in (3, 7):
        resized = [resize_positions(positions, (side, side), interpolation=name) for name in RULES]
        distinct = {tuple(each.flatten().tolist()) for each in resized}
        assert len(distinct) == len(set(RULES.values())) == 5
    assert tuple(RULES) == get_args(Interpolation) == (*FORMULAS, "mae_pytorch")
    assert [str(RULES[name]) for name in ("mae", "dino", "timm", "torchvision")] == [
        "bicubic, by size",
        "bicubic, by scale factor with an offset of 0.1",
        "bicubic, by size, antialiased",
        "bicubic, by size, corners aligned",
    ]


def test_recomputed_positions() -> None:
    positions = torch.randn(1, 16, 6, dtype=torch.bfloat16)
    resized = resize_positions(positions, (3, 2), interpolation="mae_pytorch")
    expected = [
        [(math.sin, math.cos)[channel % 2](patch / 10_000 ** ((channel - channel % 2) / 6)) for channel in range(6)]
        for patch in range(6)
    ]
    assert torch.equal(resized, torch.tensor([expected]).bfloat16())
    assert resize_positions(positions, (4, 4), interpolation="mae_pytorch") is positions


@pytest.mark.parametrize("grid", [(3, 7), (8, 2)])
def test_grids_that_are_not_square(grid: tuple[int, int]) -> None:
    positions = torch.randn(1, 16, 8)
    for name, formula in FORMULAS.items():
        down, across = (weights_of_a_side(4, side, *formula) for side in grid)
        expected = np.einsum("ri,cj,ijd->rcd", down, across, positions.double().numpy().reshape(4, 4, 8)).reshape(-1, 8)
        resized = resize_positions(positions, grid, interpolation=name)
        torch.testing.assert_close(resized[0], torch.from_numpy(expected).float(), rtol=0, atol=1e-5)


def test_half_precision_is_rounded_once() -> None:
    positions = torch.randn(1, 16, 8, dtype=torch.bfloat16)
    resized = resize_positions(positions, (7, 7), interpolation="dino")
    assert torch.equal(resized, resize_positions(positions.float(), (7, 7), interpolation="dino").bfloat16())


def test_torchvisions_own_function() -> None:
    positions = torch.randn(1, 1 + SIDE**2, WIDTH)
    for side in (3, 7):
        state = OrderedDict({"encoder.pos_embedding": positions})
        expected = interpolate_embeddings(side * PATCH, PATCH, state)["encoder.pos_embedding"][:, 1:]
        resized = resize_positions(positions[:, 1:], (side, side), interpolation="torchvision")
        torch.testing.assert_close(resized, expected, rtol=0, atol=1e-5)


# --- features of files


# The layouts that do not interpolate as MAE does.
FAMILIES: dict[str, Interpolation] = {
    "dino": "dino",
    "dino_full": "dino",
    "ibot": "dino",
    "mugs": "dino",
    "dinov2": "dinov2",
    "dinov2_in_chunks": "dinov2",
    "dinov2_registers": "dinov2_reg",
    "timm_training": "dino",  # without a classifier
    "gamma_names": "timm",
}


def at_another_size(
    vit: VisionTransformer, make: Callable[[], VisionTransformer], side: int, name: Interpolation
) -> Any:
    """timm's model for images of `side` patches, with positions from plain loops."""
    assert vit.pos_embed is not None
    prefix = vit.pos_embed.shape[1] - SIDE**2
    patches = reference(vit.pos_embed[:, prefix:].detach(), side, name)
    positions = torch.cat([vit.pos_embed[:, :prefix].detach(), patches], dim=1)
    other = make()
    other.set_input_size(img_size=(side * PATCH, side * PATCH))
    other.load_state_dict(vit.state_dict() | {"pos_embed": positions})
    return other.eval()


@pytest.mark.parametrize(("layout", "model"), [entry[:2] for entry in LAYOUTS], ids=[e[0].__name__ for e in LAYOUTS])
@torch.no_grad()
def test_features_at_other_resolutions(
    layout: Callable[[State], Any], model: Callable[[], VisionTransformer], tmp_path: Path
) -> None:
    vit = model()
    torch.save(layout(dict(vit.state_dict())), tmp_path / "a.pth")
    encoder, _ = load_encoder(tmp_path / "a.pth")
    assert isinstance(encoder, Encoder)
    name = FAMILIES.get(layout.__name__, "mae")
    assert encoder.architecture.interpolation == name
    for side in (3, 7):
        images = torch.randn(2, 3, side * PATCH, side * PATCH)
        expected = tokens(at_another_size(vit, model, side, name), images)
        for ours, theirs in zip(encoder.eval().blocks(images, [1, 2, 3]), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["ViT", "ViTMAE", "ViTMSN", "Dinov2", "Dinov2WithRegisters", "IJepa"])
@torch.no_grad()
def test_hugging_faces_models_at_other_resolutions(kind: str, tmp_path: Path) -> None:
    model = hugging_face(kind, with_head=False)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    encoder, _ = load_encoder(tmp_path / "model.pt")
    assert isinstance(encoder, Encoder)
    for side in (3, 7):
        images = torch.randn(2, 3, side * PATCH, side * PATCH)
        options: dict[str, Any] = {"output_hidden_states": True}
        if not kind.startswith("Dinov2"):  # these always interpolate
            options["interpolate_pos_encoding"] = True
        if kind == "ViTMAE":
            model.config.mask_ratio = 0.0
            options["noise"] = torch.arange(side**2).expand(2, -1)
        expected = model(images, **options).hidden_states
        for ours, theirs in zip(encoder.eval().blocks(images, [1, 2, 3]), expected[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3"])
@torch.no_grad()
def test_timms_models_at_other_resolutions(name: str, tmp_path: Path) -> None:
    model: Any = timm.create_model(name, dynamic_img_size=True).eval()
    torch.nn.init.normal_(model.pos_embed)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    native = choose_architecture(checkpoint, arch=name, resolution=160)
    for size in (128, 224):
        images = torch.randn(1, 3, size, size)
        expected = tokens(model, images)
        # Positions interpolated for each batch, then once when the file is read.
        for architecture in (native, choose_architecture(checkpoint, arch=name, resolution=size)):
            assert isinstance(architecture, Architecture) and architecture.interpolation == "timm"
            assert checkpoint.interpolates(architecture, size) and not checkpoint.interpolates(architecture, 160)
            assert checkpoint.notices(architecture, [size]) == []
            encoder = encoder_from(checkpoint, architecture).eval()
            for ours, theirs in zip(encoder.blocks(images, range(1, 7)), expected[:6], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# --- our own files


LEARNED = dict(timm_vit().state_dict())


def test_gradients_pass_through() -> None:
    for name in FORMULAS:
        architecture = Architecture("custom", 16, 32, 2, 4, patch_size=4, fixed_positions=False, interpolation=name)
        encoder = build_encoder(architecture)
        positions = encoder.vit.pos_embed
        assert positions is not None
        images = torch.randn(1, 3, 12, 12)
        encoder.embed(images)[0, 1:, 0].sum().backward()
        # The gradient of the sum is each old position's total weight in the new ones.
        share = weights_of_a_side(4, 3, *FORMULAS[name]).sum(0)
        assert positions.grad is not None
        expected = torch.from_numpy(np.outer(share, share)).flatten().float()
        torch.testing.assert_close(positions.grad[0, 1:, 0], expected, rtol=0, atol=1e-5)
        assert not positions.grad[0, :, 1:].any()


@pytest.mark.parametrize("to", ["timm", "onnx"])
def test_exports_for_another_resolution_have_the_rules_positions(to: str, tmp_path: Path) -> None:
    torch.save(dino(LEARNED), tmp_path / "a.pth")
    encoder, facts, _ = read_encoder(tmp_path / "a.pth", resolution=28)
    expected = reference(LEARNED["pos_embed"][:, 1:], 7, "dino")
    assert encoder.vit.pos_embed is not None
    torch.testing.assert_close(encoder.vit.pos_embed[:, 1:].detach(), expected, rtol=0, atol=1e-5)
    # Both exports read the written file back with other code and compare.
    if to == "timm":
        export_timm(encoder, tmp_path / "b.pth", facts)
        positions = torch.load(tmp_path / "b.pth")["pos_embed"][:, 1:]
        torch.testing.assert_close(positions, expected, rtol=0, atol=1e-5)
    else:
        pytest.importorskip("onnxruntime")
        assert export_onnx(encoder, tmp_path / "b.onnx", facts, [3]).difference < 1e-4
    other, _, _ = read_encoder(tmp_path / "a.pth", ReadingConfig(interpolation="timm"), resolution=28)
    assert other.vit.pos_embed is not None
    torch.testing.assert_close(
        other.vit.pos_embed[:, 1:].detach(), reference(LEARNED["pos_embed"][:, 1:], 7, "timm"), rtol=0, atol=1e-5
    )
