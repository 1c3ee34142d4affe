"""Layouts of public checkpoints: recognised by content, with the features of their own models."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from mimref.config.base import ReadingConfig
from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.formats import recognise
from mimref.encoders.parts import Unrecognised
from mimref.encoders.positions import sincos_positions
from mimref.encoders.recognised import Recognised
from mimref.encoders.vit import Architecture, Encoder
from mimref.errors import UserError
from tests.checkpoints import (
    DEPTH,
    IMAGE,
    LAYOUTS,
    MAE_DECODER,
    PATCH,
    SIDE,
    WIDTH,
    State,
    data2vec,
    data2vec_tokens,
    load_encoder,
    mae_vit,
    outline,
    prefixed,
    timm_vit,
    tokens,
)


def loaded(content: Any, path: Path) -> Encoder:
    torch.save(content, path)
    encoder, header = load_encoder(path)
    assert isinstance(encoder, Encoder) and header == {}
    return encoder.eval()


@pytest.mark.parametrize(("layout", "model", "name", "source"), LAYOUTS, ids=[entry[0].__name__ for entry in LAYOUTS])
@torch.no_grad()
def test_features_equal_those_of_the_layouts_own_model(
    layout: Callable[[State], Any],
    model: Callable[[], VisionTransformer],
    name: str,
    source: str | None,
    tmp_path: Path,
) -> None:
    vit = model()
    content = layout(dict(vit.state_dict()))
    encoder = loaded(content, tmp_path / "mae_pretrain_vit_large.pth")
    images = torch.randn(2, 3, IMAGE, IMAGE)
    for ours, theirs in zip(encoder.blocks(images, [1, 2, 3]), tokens(vit, images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    normed = encoder.blocks(images, [3], final_norm=True)[0]
    torch.testing.assert_close(normed, vit.norm(tokens(vit, images)[-1]), rtol=0, atol=1e-5)
    (tmp_path / "mae_pretrain_vit_large.pth").rename(tmp_path / "renamed.bin")
    recognised = read_checkpoint(tmp_path / "renamed.bin").recognised
    assert recognised is not None
    assert recognised.format.startswith(name) and recognised.source == source
    assert_nothing_is_lost(content, recognised)


def assert_nothing_is_lost(content: Any, recognised: Recognised) -> None:
    """Every tensor of the file belongs to the encoder or to a dropped group."""

    def names(part: Any, prefix: str = "") -> list[str]:
        found = []
        for name, value in part.items():
            if isinstance(value, Tensor) and isinstance(name, str):
                found.append(prefix + name)
            elif isinstance(value, dict) and isinstance(name, str):
                found += names(value, f"{prefix}{name}.")
        return found

    found = [name for group in (*recognised.origins.values(), *recognised.dropped.values()) for name in group]
    assert sorted(found) == sorted(names(content))


# --- data2vec 2.0


@pytest.mark.parametrize("prefix", ["", "model."])
@torch.no_grad()
def test_data2vec(prefix: str, tmp_path: Path) -> None:
    state = data2vec()
    teacher = {name: tensor + 1 for name, tensor in state.items() if "decoder" not in name}
    model = {**prefixed(prefix, state), "_ema": teacher}
    content = {"args": None, "cfg": {"model": {"depth": DEPTH}}, "model": model, "extra_state": {"epoch": 5}}
    encoder = loaded(content, tmp_path / "a.pt")
    images = torch.randn(2, 3, IMAGE, IMAGE)
    for ours, theirs in zip(encoder.blocks(images, [1, 2, 3]), data2vec_tokens(state, images, heads=2), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    recognised = read_checkpoint(tmp_path / "a.pt").recognised
    assert recognised is not None and recognised.architecture.post_norm
    assert (recognised.format, recognised.source) == ("data2vec 2.0", "d2v2")
    assert set(recognised.dropped) == {"decoder", "other encoder"}
    assert_nothing_is_lost(content, recognised)


@torch.no_grad()
def test_released_post_norm_models(tmp_path: Path) -> None:
    state = data2vec()
    image = "modality_encoders.IMAGE."
    kept = {name: tensor for name, tensor in state.items() if name.startswith("blocks.")}
    kept |= {f"patch_embed.proj.{part}": state[f"{image}local_encoder.proj.{part}"] for part in ("weight", "bias")}
    kept |= {f"embed_norm.{part}": state[f"{image}context_encoder.norm.{part}"] for part in ("weight", "bias")}
    kept["pos_embed.embed"] = state[f"{image}fixed_positional_encoder.positions"].reshape(1, SIDE, SIDE, WIDTH)
    kept["cls_tokens.tokens"] = state[f"{image}extra_tokens"]
    encoder = loaded({"state_dict": kept, "ctor_kwargs": {}}, tmp_path / "d2v2refined_l16.th")
    images = torch.randn(2, 3, IMAGE, IMAGE)
    for ours, theirs in zip(encoder.blocks(images, [1, 2, 3]), data2vec_tokens(state, images, heads=2), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    recognised = read_checkpoint(tmp_path / "d2v2refined_l16.th").recognised
    assert recognised is not None and recognised.format == "MIM-Refiner release (post-norm)"


# --- Hugging Face


def hugging_face(kind: str, *, with_head: bool) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "layer_norm_eps": 1e-6,
    }
    gelu_width = {} if kind.startswith("Dinov2") else {"intermediate_size": 4 * WIDTH}
    options: dict[str, Any] = {"use_swiglu_ffn": True} if kind == "Dinov2WithRegisters" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **gelu_width, **options)
    name = {"ViT": "ForImageClassification", "ViTMAE": "ForPreTraining"}.get(kind, "Model") if with_head else "Model"
    model = getattr(transformers, f"{kind}{name}")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("with_head", "saved_by_library"), [(True, False), (False, True)])
@pytest.mark.parametrize("kind", ["ViT", "ViTMAE", "ViTMSN", "Dinov2", "Dinov2WithRegisters", "IJepa"])
@torch.no_grad()
def test_hugging_face(kind: str, with_head: bool, saved_by_library: bool, tmp_path: Path) -> None:
    model = hugging_face(kind, with_head=with_head)
    if saved_by_library:
        # Files on their hub have other names than the model in memory.
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    else:
        path = tmp_path / "model.pt"
        torch.save(model.state_dict(), path)
    encoder, _ = load_encoder(path)
    assert isinstance(encoder, Encoder)
    images = torch.randn(2, 3, IMAGE, IMAGE)
    options: dict[str, Any] = {"output_hidden_states": True}
    if kind == "ViTMAE":
        # Its forward pass masks and shuffles patches by this noise.
        model.config.mask_ratio = 0.0
        options["noise"] = torch.arange(SIDE**2).expand(2, -1)
    expected = model(images, **options).hidden_states
    for ours, theirs in zip(encoder.eval().blocks(images, [1, 2, 3]), expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# --- sizes


@pytest.mark.parametrize(
    ("width", "depth", "patch", "grid", "mlp", "name", "num_heads"),
    [
        (768, 12, 16, 14, None, "vit_b16", 12),
        (1280, 32, 14, 16, None, "vit_h14", 16),
        (2560, 24, 14, 16, None, "vit_2b14", 32),
        (1280, 32, 16, 28, None, "custom", 16),
        (1408, 40, 16, 14, 6144, "custom", 16),
        (384, 12, 8, 28, None, "custom", 6),
    ],
)
def test_published_sizes(
    width: int, depth: int, patch: int, grid: int, mlp: int | None, name: str, num_heads: int
) -> None:
    recognised = recognise(outline(width, depth, patch, grid=grid, mlp=mlp))
    architecture = recognised.architecture
    assert (architecture.name, architecture.num_heads) == (name, num_heads)
    assert (architecture.width, architecture.depth) == (width, depth)
    assert architecture.image_size == grid * patch
    assert architecture.mlp_width == (mlp or 0)
    assert recognised.notices == []


@torch.no_grad()
def test_features_of_a_true_width_need_the_right_heads(tmp_path: Path) -> None:
    # ViT-H's 1280 channels have 16 heads, not one per 64 channels.
    vit = timm_vit(embed_dim=1280, depth=1, num_heads=16)
    encoder = loaded({"model": dict(vit.state_dict())}, tmp_path / "a.pth")
    images = torch.randn(1, 3, IMAGE, IMAGE)
    expected = tokens(vit, images)[0]
    atol = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(encoder.blocks(images, [1])[0], expected, rtol=0, atol=atol)


def test_assumed_heads_are_reported() -> None:
    recognised = recognise(outline(320, 2, 16, grid=3))
    assert recognised.architecture.num_heads == 5
    (notice,) = recognised.notices
    assert "5 attention heads" in notice and "encoder.num_heads" in notice
    with pytest.raises(Unrecognised, match=r"width of 96.*encoder\.num_heads"):
        recognise(outline(96, 2, 16, grid=3))


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12)])
def test_small_encoders_in_the_layout_of_mae_may_have_more_heads(width: int, heads: int) -> None:
    outlined = dict(outline(width, 2, 16, grid=3))
    pretrained = outlined | {"pos_embed": sincos_positions(width, 3)}
    fine_tuned = outlined | {"fc_norm.weight": torch.ones(width), "fc_norm.bias": torch.zeros(width)}
    for file in (pretrained, fine_tuned):
        found = recognise(file)
        assert found.architecture.num_heads == heads
        told = [notice for notice in found.notices if "MAE-Lite have 12" in notice and "num_heads" in notice]
        assert len(told) == (width < 768)
        chosen = recognise(file, ReadingConfig(num_heads=12))
        assert chosen.architecture.num_heads == 12 and not any("attention heads" in each for each in chosen.notices)


def test_the_positions_of_moco_v3() -> None:
    # As in its own code: of a 2 x 2 grid, the first half of the width encodes the row.
    rows = torch.tensor([0.0, 0.0, 1.0, 1.0])
    omega = 1.0 / 10000 ** (torch.arange(96) / 96)
    row, column = rows[:, None] * omega, rows[[0, 2, 1, 3]][:, None] * omega
    patches = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
    file = dict(outline(384, 2, 16, grid=2)) | {"pos_embed": torch.cat([torch.zeros(1, 384), patches])[None]}
    found = recognise(file)
    assert isinstance(found.architecture, Architecture)
    assert found.architecture.num_heads == 12 and found.architecture.fixed_positions
    assert not any("attention heads" in notice for notice in found.notices)


@torch.no_grad()
def test_positions_of_any_grid() -> None:
    vit = timm_vit()
    state = dict(vit.state_dict())
    patches = state["pos_embed"][:, 1:]
    flat = recognise(state | {"pos_embed": state["pos_embed"][0]})
    assert torch.equal(flat.tensors["pos_embed"], state["pos_embed"])
    without_cls = recognise(state | {"pos_embed": patches})
    assert torch.equal(without_cls.tensors["pos_embed"][:, 1:], patches)
    assert not without_cls.tensors["pos_embed"][:, 0].any()
    wide = torch.randn(1, 2, 4, WIDTH)
    resized = recognise(state | {"pos_embed": wide})
    expected = F.interpolate(wide.permute(0, 3, 1, 2), size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized.tensors["pos_embed"][:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2))
    assert resized.notices[0] == "positions of 2 x 4 patches were interpolated to 4 x 4"


def test_what_fits_already_is_not_copied() -> None:
    state = dict(mae_vit().state_dict())
    recognised = recognise({"model": state | MAE_DECODER})
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in recognised.tensors.items())
    assert recognised.architecture.fixed_positions
    assert not recognise(dict(timm_vit().state_dict())).architecture.fixed_positions


PLAIN = dict(timm_vit().state_dict())
OTHER = {name: tensor + 1 for name, tensor in PLAIN.items()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"transformer.wte.weight": torch.zeros(9, 4), "ln_f.bias": torch.zeros(4)},
            "contains no vision transformer: none",
        ),
        (MAE_DECODER, "contains no vision transformer"),
        (PLAIN | {"extra.weight": torch.zeros(2)}, "extra.weight is unexpected"),
        ({name: PLAIN[name] for name in PLAIN if name != "norm.bias"}, "norm.bias is missing"),
        (
            {name: PLAIN[name] for name in PLAIN if not name.startswith("norm.")},
            "norm.weight is missing; norm.bias is missing",
        ),
        ({name: PLAIN[name] for name in PLAIN if "blocks.1." not in name}, "blocks.1.norm1.weight is missing"),
        ({name: PLAIN[name] for name in PLAIN if name != "pos_embed"}, "has no position embedding"),
        (PLAIN | {"pos_embed": torch.zeros(1, 3, WIDTH)}, "(1, 3, 128), which is not a grid"),
        (PLAIN | {"pos_embed": torch.zeros(1, 17, 64)}, "pos_embed has shape (1, 17, 64) instead of (1, 17, 128)"),
        (
            PLAIN | {"blocks.1.attn.qkv.weight": torch.zeros(96, 32)},
            "blocks.1.attn.qkv.weight has shape (96, 32) instead",
        ),
        (PLAIN | {"norm.bias": torch.zeros(WIDTH, dtype=torch.int64)}, "norm.bias is of type torch.int64"),
        (PLAIN | {"patch_embed.proj.weight": torch.zeros(WIDTH, 3, 4, 2)}, "square patches are needed"),
        (PLAIN | {"blocks.0.attn.q_bias": torch.zeros(WIDTH)}, "relative positions (BEiT"),
        (PLAIN | {"blocks.0.attn.q_norm.weight": torch.zeros(2)}, "normalised queries and keys"),
        (PLAIN | {"dist_token": torch.zeros(1, 1, WIDTH)}, "a distillation token"),
        ({"a": PLAIN, "b": OTHER}, "(a, b)"),
        (
            PLAIN | {"register_tokens": torch.zeros(1, 1, 2), "reg_token": torch.zeros(1, 1, 2)},
            "two names of one tensor",
        ),
        (
            data2vec() | {"modality_encoders.AUDIO.decoder.proj.bias": torch.zeros(2)},
            "AUDIO.decoder.proj.bias is unexpected",
        ),
    ],
)
def test_other_models_are_refused_with_the_reason(content: Any, message: str) -> None:
    with pytest.raises(Unrecognised) as caught:
        recognise(content)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "channels"),
    [(PLAIN | {"patch_embed.proj.weight": torch.zeros(WIDTH, 4, 4, 4)}, 4), (data2vec(channels=2), 2)],
)
def test_weights_of_any_channels_are_recognised(content: Any, channels: int) -> None:
    assert recognise(content).architecture.channels == channels


def test_changed_names_and_shapes_are_loaded_or_refused_in_one_line(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sources = [entry[0](dict(entry[1]().state_dict())) for entry in LAYOUTS] + [{"model": data2vec()}]
    outcomes = {"loaded": 0, "refused": 0}
    for trial in range(88):
        content = sources[trial % len(sources)]
        torch.save(mutated(content, random), tmp_path / "a.pth")
        try:
            load_encoder(tmp_path / "a.pth")
            outcomes["loaded"] += 1
        except UserError as error:
            assert "\n" not in str(error) and str(tmp_path / "a.pth") in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 5, outcomes


def mutated(content: Any, random: np.random.Generator) -> Any:
    """The content with one tensor, at any depth, renamed, left out, reshaped or of another type."""
    names = [name for name, value in content.items() if isinstance(value, dict | Tensor)]
    if not names:
        return content
    name = names[random.integers(len(names))]
    value = content[name]
    if isinstance(value, dict):
        return {**content, name: mutated(value, random)}
    rest = {other: content[other] for other in content if other != name}
    letter = random.integers(len(name))
    change = random.integers(6)
    if change == 0:
        return rest
    if change == 1:
        return rest | {name[:letter] + "x" + name[letter + 1 :]: value}
    if change == 2:
        return rest | {name[:letter]: value}
    if change == 3:
        return rest | {name: value.flatten()[: random.integers(0, 9)]}
    if change == 4:
        return rest | {name: value[None]}
    return rest | {name: value.to([torch.int64, torch.bool, torch.float64, torch.complex64][random.integers(4)])}


def test_heads_can_be_given() -> None:
    assert recognise(outline(96, 2, 16, grid=3), ReadingConfig(num_heads=3)).architecture.num_heads == 3
    assert recognise(outline(768, 2, 16, grid=3), ReadingConfig(num_heads=6)).architecture.num_heads == 6
    with pytest.raises(Unrecognised, match=r"width of 96.*encoder\.num_heads 5"):
        recognise(outline(96, 2, 16, grid=3), ReadingConfig(num_heads=5))


# --- large files

_MEASURE = """
import resource, sys, time
import torch
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, started = peak(), time.monotonic()
from tests.checkpoints import load_encoder
from mimref.encoders.inspection import inspect_file
if sys.argv[1] == "inspect":
    inspect_file(sys.argv[2])
else:
    print(sum(float(parameter.detach().sum()) for parameter in load_encoder(sys.argv[2])[0].parameters()))
print(time.monotonic() - started, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_huge_file_is_inspected_and_loaded_without_a_copy(suffix: str, tmp_path: Path) -> None:
    state = {name: torch.rand(tensor.shape) for name, tensor in outline(1280, 32, 14, grid=16).items()}
    path = tmp_path / f"h.{suffix}"
    torch.save({"model": state}, path) if suffix == "pth" else save_file(state, path)
    del state
    size_mb = path.stat().st_size / 2**20

    def measure(job: str) -> tuple[float, float]:
        """Seconds and megabytes in addition to those for importing torch."""
        line = [sys.executable, "-c", _MEASURE, job, str(path)]
        printed = subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()
        return float(printed[-2]), float(printed[-1])

    seconds, megabytes = measure("inspect")
    assert megabytes < 300 and seconds < 10  # 2.5 s on two quiet cores, most of it timm's import
    assert measure("load")[1] < 1.2 * size_mb
