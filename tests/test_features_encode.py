"""Features of whole data sets against those of one image at a time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mimref.config.base import DataConfig
from mimref.data.decode import BadImage
from mimref.data.open import open_source
from mimref.data.sources import ArraySource, FileSource
from mimref.data.transforms import EvalTransform
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import CheckpointError, ConfigError, DataError
from mimref.features.encode import PIXELS, Column, Features, PassSettings, columns_of, extract, raw_pixels
from mimref.features.header import data_record, eval_transform, resolve_data
from tests.tiny import ARCHITECTURE, write_images

CPU = torch.device("cpu")
TRANSFORM = EvalTransform(16)
SETTINGS = PassSettings(TRANSFORM, CPU)
FIRST, LAST = Column(1, "cls"), Column(3, "cls")


class Broken(ArraySource):
    """Images, some of which cannot be read."""

    unreadable: tuple[int, ...] = ()

    def read(self, index: int) -> Tensor:
        if index in self.unreadable:
            raise BadImage(self.path(index), "torn")
        return super().read(index)


def source(count: int = 11, unreadable: Sequence[int] = (), labels: bool = True) -> Broken:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3, 20, 24), dtype=np.uint8)
    y = rng.integers(0, 3, count) if labels else None
    made = Broken("noise", images, y, None, "train", np.arange(count))
    made.unreadable = tuple(unreadable)
    return made


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    built = build_encoder(Architecture("custom", 16, width=32, depth=3, num_heads=4, patch_size=4))
    for parameter in built.parameters():
        parameter.data.normal_(std=0.2)
    return built.eval()


def matrix(features: Features) -> np.ndarray:  # type: ignore[type-arg]
    """All columns side by side."""
    return features.matrix(list(features.columns))[:]


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean"])
@pytest.mark.parametrize("final_norm", [False, True])
@torch.no_grad()
def test_rows_equal_single_images(encoder: Encoder, pool: str, final_norm: bool) -> None:
    data = source(unreadable=[0, 5, 6, 7])
    groups = [columns_of([block], pool, final_norm, 3) for block in (3, 1)]
    settings = replace(SETTINGS, batch_size=3)
    found = extract(encoder, data, settings, [column for group in groups for column in group])
    readable = [1, 2, 3, 4, 8, 9, 10]
    assert found.indices.tolist() == readable and found.bad == [(f"noise/train/{i}", "torn") for i in (0, 5, 6, 7)]
    assert data.labels is not None and found.y is not None and found.y.tolist() == data.labels[readable].tolist()
    x = np.stack([found.matrix(group)[:] for group in groups], axis=1)
    assert x.shape == (7, 2, 64 if pool == "cls+mean" else 32) and x.dtype == np.float32
    for row, index in zip(x, readable, strict=True):
        image = TRANSFORM.normalize(TRANSFORM.crop(ArraySource.read(data, index))[None])
        for features, tokens in zip(row, encoder.blocks(image, [3, 1], final_norm=final_norm), strict=True):
            parts = {"cls": tokens[0, 0], "mean": tokens[0, 1:].mean(0)}
            expected = torch.cat([parts[part] for part in pool.split("+")])
            np.testing.assert_allclose(features, expected.numpy(), rtol=2e-5, atol=2e-5)


def test_batches_do_not_matter(encoder: Encoder) -> None:
    found = [matrix(extract(encoder, source(), replace(SETTINGS, batch_size=size), [LAST])) for size in (1, 4, 11, 99)]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5, atol=1e-5)


def test_more_bad_images_than_allowed(encoder: Encoder) -> None:
    data = source(unreadable=[2, 3, 4])
    assert len(extract(encoder, data, replace(SETTINGS, max_bad=3), [FIRST]).bad) == 3
    with pytest.raises(DataError, match=r"data\.max_bad=2: noise/train/2 \(torn"):
        extract(encoder, data, replace(SETTINGS, max_bad=2), [FIRST])
    with pytest.raises(DataError, match=r"^noise: no readable image of 3: noise/train/0 \(torn\)"):
        extract(encoder, source(3, [0, 1, 2]), SETTINGS, [FIRST])


def test_progress_reaches_the_end(encoder: Encoder) -> None:
    told: list[tuple[int, int]] = []
    settings = replace(SETTINGS, batch_size=4)
    extract(encoder, source(unreadable=[10]), settings, [FIRST], progress=lambda *at: told.append(at))
    assert told == [(4, 11), (8, 11), (11, 11)]


def test_mode_and_gradients_are_left_as_they_were(encoder: Encoder) -> None:
    assert not encoder.training
    encoder.train()
    seen: list[bool] = []
    hook = encoder.vit.blocks[0].register_forward_hook(lambda *_: seen.append(encoder.training))
    extract(encoder, source(3), SETTINGS, [FIRST])
    hook.remove()
    assert encoder.training and seen == [False]
    with pytest.raises(ConfigError):
        extract(encoder, source(3), SETTINGS, [Column(4, "cls")])
    assert encoder.training
    encoder.eval()
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_unlabelled_images(encoder: Encoder) -> None:
    assert extract(encoder, source(labels=False), SETTINGS, [FIRST]).y is None


def test_bf16_is_close_to_fp32(encoder: Encoder) -> None:
    full, half = (
        matrix(extract(encoder, source(), replace(SETTINGS, precision=precision), [LAST]))
        for precision in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == np.float32 and not np.array_equal(full, half)
    assert np.abs(full - half).max() < 0.05 * np.abs(full).max()


def test_loader_processes_give_the_same(encoder: Encoder, tmp_path: Path) -> None:
    write_images(tmp_path, per_class=5, split="train")
    (tmp_path / "train" / "a" / "002.png").write_bytes(b"nothing")
    data = open_source(DataConfig(spec=str(tmp_path)), "train")
    assert isinstance(data, FileSource)
    alone, two = (
        extract(encoder, data, replace(SETTINGS, batch_size=2, workers=workers), [FIRST, LAST]) for workers in (0, 2)
    )
    assert np.array_equal(matrix(alone), matrix(two)) and np.array_equal(alone.indices, two.indices)
    assert alone.bad == two.bad and len(alone.bad) == 1 and alone.indices.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]


class Stages:
    """An encoder whose blocks differ in width."""

    training = False
    embed_dim, depth, num_prefix_tokens, patch_size = 8, 2, 0, 4
    has_cls_token = False

    def blocks(
        self, images: Tensor, indices: Sequence[int], *, final_norm: bool | Sequence[bool] = False
    ) -> list[Tensor]:
        pixels = images.flatten(1)
        return [pixels[:, None, : 4 * index] for index in indices]

    def pool(self, tokens_BLD: Tensor, how: str) -> Tensor:
        return tokens_BLD.mean(1)

    def train(self, mode: bool = True) -> object:
        return self

    def eval(self) -> object:
        return self


def test_blocks_of_different_widths() -> None:
    found = extract(Stages(), source(5), SETTINGS, [Column(2, "mean"), Column(1, "mean")])
    wide, narrow = (found.columns[Column(block, "mean")][:] for block in (2, 1))
    assert wide.shape == (5, 8) and np.array_equal(narrow, wide[:, :4])


def test_raw_pixels() -> None:
    data = source(5, unreadable=[1])
    found = raw_pixels(data, SETTINGS)
    x = found.columns[PIXELS]
    assert x.shape == (4, 3 * 16 * 16) and found.indices.tolist() == [0, 2, 3, 4] and len(found.bad) == 1
    for row, index in zip(x[:], found.indices, strict=True):
        assert np.array_equal(row, TRANSFORM.crop(ArraySource.read(data, index)).numpy().ravel() / np.float32(255))
    large = raw_pixels(data, PassSettings(EvalTransform(64), CPU))
    crop = EvalTransform(64).crop(data.read(0)).double() / 255
    expected = crop.view(3, 32, 2, 32, 2).mean(dim=(2, 4)).flatten()
    np.testing.assert_allclose(large.columns[PIXELS][:1][0], expected.numpy(), atol=1e-6)


# --- header entries


def test_data_named_by_the_user_come_first() -> None:
    header = {"data": {"spec": "digits", "root": None, "train_limit": 100}}
    assert resolve_data(DataConfig(spec="imgs"), header) == DataConfig(spec="imgs")
    assert resolve_data(DataConfig(), header) == DataConfig(spec="digits", train_limit=100)
    # Single values are set on top of the recorded ones.
    asked = DataConfig(train_limit=50, max_bad=3, root="here")
    assert resolve_data(asked, header) == DataConfig(spec="digits", train_limit=50, max_bad=3, root="here")
    for empty in ({}, {"data": None}, {"data": {}}, {"data": {"spec": None}}):
        with pytest.raises(ConfigError, match=r"^no images: pass --data"):
            resolve_data(DataConfig(), empty)


@pytest.mark.parametrize("data", [3, "digits", ["digits"], {"spec": 3}, {"spec": "digits", "train_limit": -1}])
def test_damaged_records_of_data(data: object) -> None:
    with pytest.raises(CheckpointError, match="--data"):
        resolve_data(DataConfig(), {"data": data})
    assert resolve_data(DataConfig(spec="digits"), {"data": data}).spec == "digits"


def test_records_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_record(DataConfig(spec="digits")) == {"spec": "digits", "root": None, "train_limit": None}
    columns = data_record(DataConfig(spec="hf:a/b", image="img", label="fine_label"))
    assert columns == {"spec": "hf:a/b", "root": None, "train_limit": None, "image": "img", "label": "fine_label"}
    assert resolve_data(DataConfig(), {"data": columns}) == DataConfig(spec="hf:a/b", image="img", label="fine_label")
    assert resolve_data(DataConfig(label="coarse_label"), {"data": columns}).label == "coarse_label"
    folder = data_record(DataConfig(spec="imgs", train_limit=5))
    assert folder == {"spec": str(tmp_path / "imgs"), "root": None, "train_limit": 5}
    named = data_record(DataConfig(spec="torchvision:CIFAR10", root="files"))
    assert (named["spec"], named["root"]) == ("torchvision:CIFAR10", str(tmp_path / "files"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind in ("list:", "hf:", "wds:"):
        for path in ("below/{split}-*", "~/below/{split}-*", f"{tmp_path}/below/{{split}}-*"):
            assert data_record(DataConfig(spec=kind + path))["spec"] == f"{kind}{tmp_path}/below/{{split}}-*"
    for config in (DataConfig(spec="digits"), DataConfig(spec=str(tmp_path / "imgs"), train_limit=5)):
        assert resolve_data(DataConfig(), {"data": data_record(config)}) == config


def test_transform() -> None:
    recorded = EvalTransform(8, 1.0, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    header = {"transform": recorded.to_dict()}
    architecture = replace(ARCHITECTURE, image_size=8)
    assert eval_transform(architecture, DataConfig(), header) == recorded
    assert eval_transform(architecture, DataConfig(crop_fraction=0.5), header).crop_fraction == 0.5
    assert eval_transform(architecture, DataConfig(), header, resolution=12).image_size == 12
    assert eval_transform(architecture, DataConfig(), {}) == EvalTransform(8)
    direct = replace(recorded, resize="direct")
    assert eval_transform(architecture, DataConfig(resize="direct"), header) == direct
    assert eval_transform(architecture, DataConfig(), {"transform": direct.to_dict()}) == direct
    assert eval_transform(architecture, DataConfig(resize="shorter"), {"transform": direct.to_dict()}) == recorded
    for damaged in (
        None,
        3,
        "x",
        {},
        {"image_size": 8},
        recorded.to_dict() | {"mean": 1},
        recorded.to_dict() | {"std": [0] * 3},
    ):
        with pytest.raises(CheckpointError, match="transform"):
            eval_transform(architecture, DataConfig(), {"transform": damaged})


def test_normalization_that_timm_records_for_weights() -> None:
    clip = replace(ARCHITECTURE, name="vit_base_patch16_clip_224.openai")
    transform = eval_transform(clip, DataConfig(), {})
    # OpenAI's own preprocessing for CLIP.
    assert transform.mean == (0.48145466, 0.4578275, 0.40821073)
    assert transform.std == (0.26862954, 0.26130258, 0.27577711)
    recorded = EvalTransform(8, 1.0, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert eval_transform(clip, DataConfig(), {"transform": recorded.to_dict()}).mean == recorded.mean
    # What the publisher of such weights usually does is less certain than timm's record, and better than nothing.
    usual = {"transform": {"mean": [0.5] * 3, "std": [0.5] * 3, "assumed": True}}
    assert eval_transform(clip, DataConfig(), usual) == transform
    assert eval_transform(ARCHITECTURE, DataConfig(), usual).mean == (0.5, 0.5, 0.5)
