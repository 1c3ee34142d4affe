"""The augmented probe on a tiny encoder: inputs of the classifiers, the unchanged encoder, reproducibility."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mimref.data.decode import BadImage
from mimref.data.sources import ArraySource
from mimref.data.transforms import EvalTransform
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import ConfigError, DataError
from mimref.evaluation.probe.attentive import TokenShape
from mimref.evaluation.probe.augmented import probe_inputs
from mimref.evaluation.probe.config import ProbeTrainingConfig
from mimref.evaluation.probe.ensemble import Norm, ProbeEnsemble
from mimref.evaluation.probe.grid import ProbeInput
from mimref.evaluation.probe.streamed import EncodedImages, Examined, probe_encoded
from mimref.features.encode import Column, Features, PassSettings, extract
from mimref.progress import Progress
from mimref.results import Row
from mimref.training import job
from tests.tiny import ARCHITECTURE

CPU = torch.device("cpu")
TRANSFORM = EvalTransform(16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
SETTINGS = PassSettings(TRANSFORM, CPU)
NORMS: tuple[Norm, ...] = ("none", "batch")


class Broken(ArraySource):
    """Images, some of which cannot be read."""

    unreadable: tuple[int, ...] = ()

    def read(self, index: int) -> Tensor:
        if index in self.unreadable:
            raise BadImage(self.path(index), "torn")
        return super().read(index)


def source(split: str, count: int, unreadable: Sequence[int] = ()) -> Broken:
    """Noise around one gray per class."""
    rng = np.random.default_rng(count)
    labels = rng.permutation(np.arange(count) % 2)
    images = np.clip(rng.normal(70 + 110 * labels[:, None, None, None], 40, (count, 3, 20, 24)), 0, 255)
    made = Broken("noise", images.astype(np.uint8), labels, ["a", "b"], split, np.arange(count))
    made.unreadable = tuple(unreadable)
    return made


def build(architecture: Architecture = ARCHITECTURE) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(architecture)


@pytest.fixture
def encoder() -> Encoder:
    return build()


def features(encoder: Encoder, images: ArraySource) -> Features:
    grids = [probe_inputs(encoder.depth, encoder.has_cls_token, norm=norm) for norm in NORMS]
    columns = [column for grid in grids for part in grid.values() for column in part]
    return extract(encoder, images, SETTINGS, list(dict.fromkeys(columns)))


def probed(encoder: Encoder, train: ArraySource | None = None, **changes: Any) -> list[Row]:
    return probe(encoder, train, **changes)[0]


def probe(
    encoder: Encoder,
    train: ArraySource | None = None,
    *,
    test: Features | None = None,
    seed: int = 0,
    workers: int = 0,
    max_bad: int = 100,
    state: Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Probe with 40 training images in batches of 10, for two epochs."""
    groups = probe_inputs(encoder.depth, encoder.has_cls_token, norm=settings.get("norm", "none"))
    return probe_encoded(
        EncodedImages(encoder, groups, replace(SETTINGS, workers=workers, max_bad=max_bad)),
        train or source("train", 40),
        test or features(encoder, source("val", 20)),
        ProbeTrainingConfig(**{"lr": [0.1, 1.0], "epochs": 2, "batch_size": 10} | settings),
        seed,
        augment=True,
        state=state,
        progress=progress,
    )


class Seen:
    """Records the inputs of the encoder and of the classifiers in training."""

    def __init__(self, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[Tensor] = []
        self.inputs: list[list[Tensor]] = []
        self.labels: list[Tensor] = []
        self.modes: list[tuple[bool, bool]] = []
        blocks, step = encoder.blocks, ProbeEnsemble.step

        def watch_blocks(images: Tensor, *arguments: Any, **options: Any) -> list[Tensor]:
            self.images.append(images)
            self.modes.append((encoder.training, torch.is_inference_mode_enabled()))
            return blocks(images, *arguments, **options)

        def watch_step(ensemble: ProbeEnsemble, inputs: list[Tensor], labels: Tensor, *rates: float) -> None:
            self.inputs.append(inputs)
            self.labels.append(labels)
            step(ensemble, inputs, labels, *rates)

        monkeypatch.setattr(encoder, "blocks", watch_blocks)
        monkeypatch.setattr(ProbeEnsemble, "step", watch_step)


def test_inputs() -> None:
    four = probe_inputs(12, True)
    assert [tuple(key) for key in four] == [
        ("last", "cls"),
        ("last", "cls+mean"),
        ("last4", "cls"),
        ("last4", "cls+mean"),
    ]
    assert four[ProbeInput("last", "cls+mean")] == [Column(12, "cls", True), Column(12, "mean", True)]
    # DINOv2: the normed CLS tokens of four blocks, and the mean of the last block.
    cls = [Column(block, "cls", True) for block in (9, 10, 11, 12)]
    assert four[ProbeInput("last4", "cls")] == cls
    assert four[ProbeInput("last4", "cls+mean")] == [*cls, Column(12, "mean", True)]
    release = probe_inputs(12, True, norm="batch")
    assert list(release) == list(four)
    assert all(release[key] == four[key] for key in four if key.blocks == "last")
    assert release[ProbeInput("last4", "cls")] == [Column(block, "cls") for block in (9, 10, 11, 12)]
    both = [Column(block, pool) for block in (9, 10, 11, 12) for pool in ("cls", "mean")]
    assert release[ProbeInput("last4", "cls+mean")] == both
    assert [tuple(key) for key in probe_inputs(3, True)] == [("last", "cls"), ("last", "cls+mean")]
    assert [tuple(key) for key in probe_inputs(12, False)] == [("last", "mean"), ("last4", "mean")]
    for norm in NORMS:
        raw = probe_inputs(12, True, norm=norm, final_norm=False)
        assert not any(column.final_norm for part in raw.values() for column in part)
    staged = probe_inputs(12, True, norm_any_block=False)
    assert staged[ProbeInput("last4", "cls")] == [Column(block, "cls", block == 12) for block in (9, 10, 11, 12)]


def test_chosen_inputs() -> None:
    assert [tuple(key) for key in probe_inputs(12, True, blocks="last4")] == [("last4", "cls"), ("last4", "cls+mean")]
    assert [tuple(key) for key in probe_inputs(2, True, blocks="last")] == [("last", "cls"), ("last", "cls+mean")]
    with pytest.raises(ConfigError, match=r"probe\.blocks 'last4': there are only 3 blocks; use probe\.blocks='last'"):
        probe_inputs(3, True, blocks="last4")


@pytest.mark.parametrize("norm", NORMS)
def test_one_pass_per_batch_feeds_all_inputs(norm: Norm, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.nn.init.normal_(encoder.vit.norm.weight)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    test = features(encoder, source("val", 20))
    seen = Seen(encoder, monkeypatch)
    rows = probed(encoder, test=test, norm=norm)
    # Two epochs of four batches; each pass feeds all four inputs, in evaluation and inference mode.
    assert len(seen.images) == len(seen.inputs) == 8 and set(seen.modes) == {(False, True)}
    assert not encoder.training and all(parameter.grad is None for parameter in encoder.parameters())
    after = encoder.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for images, (last_cls, last_both, four_cls, four_both) in zip(seen.images[:8], seen.inputs, strict=True):
        with torch.no_grad():
            tokens = Encoder.blocks(encoder, images, [1, 2, 3, 4])
            normed = [encoder.vit.norm(block) for block in tokens]
        cls, mean = [block[:, 0] for block in normed], [block[:, 1:].mean(1) for block in normed]
        last = [cls[3], torch.cat([cls[3], mean[3]], 1)]
        if norm == "none":
            expected = [*last, torch.cat(cls, 1), torch.cat([*cls, mean[3]], 1)]
        else:
            cls, mean = [block[:, 0] for block in tokens], [block[:, 1:].mean(1) for block in tokens]
            pairs = [part for pair in zip(cls, mean, strict=True) for part in pair]
            expected = [*last, torch.cat(cls, 1), torch.cat(pairs, 1)]
        for ours, theirs in zip((last_cls, last_both, four_cls, four_both), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert rows[0].items() >= {"select": "test", "protocol": "augmented", "norm": norm, "epochs": 2}.items()
    assert [row["classifier"] for row in rows[1:]] == list(range(1, 9)) and len(rows) == 9


def test_augmentations_follow_seed_epoch_and_image(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def images(**changes: Any) -> tuple[list[Row], Tensor]:
        with monkeypatch.context() as patch:
            seen = Seen(encoder, patch)
            rows = probed(encoder, test=test, **changes)
        return rows, torch.stack(seen.images)

    test = features(encoder, source("val", 20))
    rows, first = images()
    again, second = images(workers=1)
    assert again == rows and torch.equal(first, second)
    _, other = images(seed=1)
    assert not torch.equal(first, other)
    # No view of the second epoch equals one of the first.
    one, two = first[:4].flatten(0, 1), first[4:].flatten(0, 1)
    assert not (one[:, None] == two[None]).flatten(2).all(2).any()
    # Only crops and flips: every pixel is in the range [0, 1] of resized images, normalised.
    assert first.shape == (8, 10, 3, 16, 16)
    assert (
        float(first[:, :, 0].min()) >= (0 - 0.4) / 0.2 - 1e-5 and float(first[:, :, 0].max()) <= (1 - 0.4) / 0.2 + 1e-5
    )


def test_labels_stay_with_their_images(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    for select in ("test", "val-split"):
        with monkeypatch.context() as patch:
            seen = Seen(encoder, patch)
            probed(encoder, source("train", 40, [3, 4]), select=select)
        for images, labels in zip(
            [x for x in seen.images if len(x) < 20][: len(seen.labels)], seen.labels, strict=True
        ):
            assert torch.equal((images.mean((1, 2, 3)) > 0).long(), labels)


def test_resumed_equals_uninterrupted(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(job, "SAVE_COST", 0.0)
    test = features(encoder, source("val", 20))
    expected = probed(encoder, test=test, norm="batch", state=tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probed(encoder, test=test, norm="batch", state=tmp_path / "parts", progress=stop)
    assert probed(encoder, test=test, norm="batch", state=tmp_path / "parts") == expected
    whole, parts = (torch.load(tmp_path / name)["ensemble"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    for changes in ({"test": features(build(ARCHITECTURE_OTHER), source("val", 20))}, {"train": source("train", 44)}):
        with pytest.raises(ConfigError, match="another set of images or encoder"):
            probed(encoder, **{"norm": "batch", "state": tmp_path / "parts", "test": test, **changes})


ARCHITECTURE_OTHER = Architecture("custom", 16, width=32, depth=4, num_heads=4, patch_size=4)


def test_the_honest_choice(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    test = features(encoder, source("val", 20))
    train = source("train", 40, [3, 4])
    with monkeypatch.context() as patch:
        seen = Seen(encoder, patch)
        rows, bad = probe(encoder, train, test=test, select="val-split", max_bad=5)
    # 36 images in six batches of ten over two epochs, and the four held-out images once.
    assert len(seen.images) == 7 and 3 <= len(seen.images[-1]) <= 4
    held = [float(row["held_out_top1"]) for row in rows[1:]]
    winner = rows[1:][held.index(max(held))]
    assert rows[0]["select"] == "val-split" and rows[0]["protocol"] == "augmented"
    assert all(rows[0][key] == winner[key] for key in ("value", "held_out_top1", "lr", "blocks", "pool"))
    assert bad == [("noise/train/3", "torn"), ("noise/train/4", "torn")]


def test_encoders_of_other_shapes() -> None:
    shallow = build(Architecture("custom", 16, width=32, depth=3, num_heads=2, patch_size=8))
    assert {(row["blocks"], row["pool"]) for row in probed(shallow)} == {("last", "cls"), ("last", "cls+mean")}
    headless = build(Architecture("custom", 16, width=32, depth=4, num_heads=2, patch_size=8, class_token=False))
    assert {(row["blocks"], row["pool"]) for row in probed(headless)} == {("last", "mean"), ("last4", "mean")}


def test_unreadable_images(encoder: Encoder) -> None:
    test = features(encoder, source("val", 20))
    assert len(probed(encoder, source("train", 40, range(9)), test=test, batch_size=4, norm="batch")) == 9
    with pytest.raises(DataError, match=r"more than data\.max_bad=2"):
        probed(encoder, source("train", 40, range(9)), test=test, max_bad=2)


def test_each_split_may_have_as_many_unreadable_images(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(job, "SAVE_COST", 0.0)
    train, val = source("train", 40, range(3)), source("val", 20, range(3))
    groups = probe_inputs(encoder.depth, encoder.has_cls_token, norm="none")
    shapes = [TokenShape(1, (encoder.embed_dim,) * len(columns)) for columns in groups.values()]

    def probing(stop: int | None = None) -> list[tuple[str, str]]:
        def progress(done: int, total: int) -> None:
            if done == stop:
                raise KeyboardInterrupt

        images = EncodedImages(encoder, groups, replace(SETTINGS, max_bad=3))
        settings = ProbeTrainingConfig(lr=[0.1], epochs=2, batch_size=10)
        return probe_encoded(
            *(images, train, Examined(val, {}), settings, 0),
            augment=False,
            shapes=shapes,
            state=tmp_path / "state",
            progress=progress,
        )[1]

    with pytest.raises(KeyboardInterrupt):
        probing(stop=8)
    # Those of training are listed as well if the run resumes after training.
    places = [f"noise/{split}/{number}" for split in ("train", "val") for number in range(3)]
    assert [path for path, _ in probing()] == places


def test_images_that_cannot_be_used(encoder: Encoder) -> None:
    test = features(encoder, source("val", 20))
    unlabelled = source("train", 40)
    unlabelled.labels = None
    with pytest.raises(DataError, match=r"^noise: the training images have no labels"):
        probed(encoder, unlabelled, test=test)
    one_class = source("train", 40)
    one_class.labels = np.zeros(40, dtype=np.int64)
    with pytest.raises(DataError, match="all images are of class 0"):
        probed(encoder, one_class, test=test)
