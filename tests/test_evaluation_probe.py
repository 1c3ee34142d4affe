"""The linear probe of cached features: batches, choice, resumption, divergence, bad input."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimref.config.base import DataConfig
from mimref.data.open import open_source
from mimref.data.sources import ArraySource
from mimref.errors import ConfigError, DataError, DivergenceError, Interrupted, OutputError, UserError
from mimref.evaluation.probe import cached, grid
from mimref.evaluation.probe.cached import probe_cached
from mimref.evaluation.probe.config import LEARNING_RATES, ProbeTrainingConfig
from mimref.evaluation.probe.ensemble import Norm, ProbeEnsemble
from mimref.evaluation.probe.grid import ProbeGrid, ProbeInput, default_batch
from mimref.features.matrix import Labels as Indices
from mimref.features.matrix import Matrix, SideBySide
from mimref.results import Row
from mimref.training import job

CPU = torch.device("cpu")
LAST, LAST4 = ProbeInput("last", "cls"), ProbeInput("last4", "cls+mean")
Features = dict[ProbeInput, Matrix]
NORMS: tuple[Norm, ...] = ("none", "batch")


class Stopped(Exception):
    """Stands in for a kill."""


def blobs(count: int, *, classes: int = 3, seed: int = 0, noise: float = 1.0) -> tuple[Features, Indices]:
    """Two inputs, 5 and 8 features wide, of Gaussian classes whose labels have gaps."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(count) % classes)
    centre = np.random.default_rng(99).normal(size=(classes, 13))
    x = (centre[y] + noise * rng.normal(size=(count, 13))).astype(np.float32)
    return {LAST: x[:, :5], LAST4: x[:, 5:]}, 10 * y + 3


def probed(**changes: Any) -> list[Row]:
    """Rows of a small probe of `blobs`."""
    train, train_y = blobs(90)
    test, test_y = blobs(40, seed=1)
    options: dict[str, Any] = {"lrs": (0.01, 0.1, 1.0), "epochs": 4, "batch_size": 16} | changes
    return probe_cached(
        options.pop("train", train),
        options.pop("train_y", train_y),
        options.pop("test", test),
        options.pop("test_y", test_y),
        **options,
    )


# --- training


@pytest.mark.parametrize(("batch_size", "used", "per_epoch"), [(64, 64, 3), (200, 200, 1), (1024, 200, 1), (7, 7, 28)])
def test_learning_rates_follow_the_batch(batch_size: int, used: int, per_epoch: int) -> None:
    train, train_y = blobs(200)
    run = ProbeGrid(ProbeTrainingConfig(batch_size=batch_size), 0, train_y, train, train_y, CPU)
    assert (run.batch, run.steps_per_epoch) == (used, per_epoch)
    torch.testing.assert_close(run.ensemble.rate_R, torch.tensor(LEARNING_RATES) * used / 256)


def test_every_image_is_seen_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    step = ProbeEnsemble.step

    def watch(self: ProbeEnsemble, inputs: list[Tensor], labels: Tensor, scale: float, offset: float = 0.0) -> None:
        seen.append(inputs[0][:, 0].tolist())
        assert [int(value) % 3 for value in seen[-1]] == labels.tolist()
        step(self, inputs, labels, scale, offset)

    monkeypatch.setattr(ProbeEnsemble, "step", watch)
    x = np.arange(50, dtype=np.float32)[:, None] + np.zeros((1, 2), dtype=np.float32)
    probe_cached({LAST: x}, np.arange(50) % 3, {LAST: x}, np.arange(50) % 3, epochs=3, batch_size=25)
    epochs = [sorted(seen[2 * i] + seen[2 * i + 1]) for i in range(3)]
    assert epochs == [list(range(50))] * 3
    assert len({tuple(batch) for batch in seen}) == 6


# --- divergence


def test_a_diverged_classifier_is_never_chosen() -> None:
    large: dict[str, Features] = {
        split: {key: 1e3 * x[:] for key, x in blobs(count, seed=seed)[0].items()}
        for split, count, seed in (("train", 90, 0), ("test", 40, 1))
    }
    # The labels are wrong, so that the classifier with finite weights scores low, too.
    rows = probed(lrs=(1e38, 1e-3), test_y=np.roll(blobs(40, seed=1)[1], 1), **large)
    assert [row["value"] for row in rows[1:]][::2] == [0.0, 0.0] and rows[0]["lr"] == 1e-3
    with pytest.raises(DivergenceError, match=r"^every classifier of the probe has diverged"):
        probed(lrs=(1e38,), **large)


# --- rows and choice


def test_rows() -> None:
    rows = probed()
    best, every = rows[0], rows[1:]
    assert [row["classifier"] for row in every] == [1, 2, 3, 4, 5, 6]
    settings = [(row["blocks"], row["pool"], row["lr"]) for row in every]
    assert settings == [("last", "cls", lr) for lr in (0.01, 0.1, 1.0)] + [
        ("last4", "cls+mean", lr) for lr in (0.01, 0.1, 1.0)
    ]
    shared = {"metric": "probe_top1", "epochs": 4, "batch_size": 16, "norm": "none", "protocol": "cached"}
    assert all(row.items() >= shared.items() for row in rows)
    values = [float(row["value"]) for row in every]
    assert best["value"] == max(values) and best["select"] == "test" and "classifier" not in best
    winner = every[values.index(max(values))]
    assert all(best[key] == winner[key] for key in ("blocks", "pool", "lr"))
    assert all(value == pytest.approx(round(value * 0.4) / 0.4) for value in values)
    assert not any("held_out_top1" in row for row in rows)


def test_ties_go_to_the_first() -> None:
    train, train_y = blobs(60, noise=0.01)
    assert probed(train=train, train_y=train_y, test=train, test_y=train_y, lrs=(0.5, 1.0))[0]["lr"] == 0.5


def test_the_honest_choice_does_not_see_test_labels() -> None:
    test_y = blobs(40, seed=1)[1]
    rows = probed(select="val-split", train=blobs(90, noise=3)[0])
    shuffled = probed(
        select="val-split", train=blobs(90, noise=3)[0], test_y=np.random.default_rng(3).permutation(test_y)
    )
    keys = ("blocks", "pool", "lr", "held_out_top1")
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in shuffled]
    assert [row["value"] for row in rows] != [row["value"] for row in shuffled]
    best, every = rows[0], rows[1:]
    held = [float(row["held_out_top1"]) for row in every]
    winner = every[held.index(max(held))]
    assert best["select"] == "val-split" and all(best[key] == winner[key] for key in ("value", *keys))
    # Nine of ninety images are held out.
    assert all(value == pytest.approx(round(value * 0.09) / 0.09) for value in held)


def test_held_out_images_are_not_trained_on() -> None:
    train, train_y = blobs(60)
    run = ProbeGrid(ProbeTrainingConfig(select="val-split"), 0, train_y, train, train_y, CPU)
    assert sorted([*run.train_rows, *run.held_rows]) == list(range(60)) and len(run.held_rows) == 6
    rows = probed(select="val-split", train=train, train_y=train_y)
    wrong = {key: np.array(x[:]) for key, x in train.items()}
    for x in wrong.values():
        x[run.held_rows] = 1e6
    other = probed(select="val-split", train=wrong, train_y=train_y)
    assert [row["value"] for row in rows[1:]] == [row["value"] for row in other[1:]]


def test_seed() -> None:
    assert probed() == probed() and probed(seed=1) != probed()


def test_digits() -> None:
    (train, train_y), (test, test_y) = digits("train"), digits("val")
    for norm in NORMS:
        rows = probe_cached({LAST: train}, train_y, {LAST: test}, test_y, epochs=10, batch_size=64, norm=norm)
        assert 92 <= float(rows[0]["value"]) <= 99 and len(rows) == 14


def digits(split: Literal["train", "val"]) -> tuple[NDArray[np.float32], Indices]:
    source = open_source(DataConfig(spec="digits"), split)
    assert isinstance(source, ArraySource) and source.labels is not None
    return (source.images.reshape(len(source), -1) / 255).astype(np.float32), source.labels


# --- how features are read


def test_joined_and_memory_mapped_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = blobs(90)[0], blobs(40, seed=1)[0]
    expected = probed(select="val-split")

    def joined(features: Features, name: str) -> Features:
        x = np.asarray(features[LAST4][:])
        np.save(tmp_path / name, features[LAST][:])
        return {LAST: np.load(tmp_path / f"{name}.npy", mmap_mode="r"), LAST4: SideBySide([x[:, :3], x[:, 3:]])}

    for held_bytes in (cached.HELD_BYTES, 0):
        monkeypatch.setattr(cached, "HELD_BYTES", held_bytes)
        monkeypatch.setattr(grid, "SCORE_ELEMENTS", 90)
        assert probed(select="val-split", train=joined(train, "train"), test=joined(test, "test")) == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8])
def test_number_formats(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = (
        {key: np.abs(x[:] * 20).astype(dtype) for key, x in blobs(n, seed=s)[0].items()} for n, s in ((90, 0), (40, 1))
    )
    single = [{key: x.astype(np.float32) for key, x in features.items()} for features in (train, test)]
    expected = probed(train=single[0], test=single[1])
    assert probed(train=train, test=test) == expected
    monkeypatch.setattr(cached, "HELD_BYTES", 0)
    assert probed(train=train, test=test) == expected


# --- resumption


def stop_at(step: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise Stopped

    return progress


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stops", [[5], [7, 12], [19, 20]])
def test_resumed_equals_uninterrupted(
    norm: Norm, stops: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(job, "SAVE_COST", 0.0)
    expected = probed(norm=norm, state=tmp_path / "whole")
    told: list[int] = []
    for stop in stops:
        with pytest.raises(Stopped):
            probed(norm=norm, state=tmp_path / "parts", progress=stop_at(stop))
    (tmp_path / ".parts.abcd.tmp").write_bytes(b"half")
    rows = probed(norm=norm, state=tmp_path / "parts", progress=lambda done, total: told.append(done))
    assert rows == expected and told == list(range(stops[-1], 21))
    whole, parts = (torch.load(tmp_path / name)["ensemble"] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))
    # A finished probe is only scored again.
    assert probed(norm=norm, state=tmp_path / "parts", progress=stop_at(1)) == expected


def test_states_are_written_now_and_then(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        probed(state=tmp_path / "state", progress=stop_at(7))
    assert not (tmp_path / "state").exists()
    probed(state=tmp_path / "state")
    assert torch.load(tmp_path / "state")["step"] == 20


def test_a_signal_saves_first(tmp_path: Path) -> None:
    expected = probed()

    def interrupt(done: int, total: int) -> None:
        if done == 7:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 7 of 20"):
        probed(state=tmp_path / "state", progress=interrupt)
    assert torch.load(tmp_path / "state")["step"] == 7
    assert probed(state=tmp_path / "state") == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lrs": (0.01, 0.1, 2.0)}, "another lr: it was [0.01, 0.1, 1.0] and is now [0.01, 0.1, 2.0];"),
        ({"epochs": 5}, "another epochs:"),
        ({"batch_size": 15}, "another batch_size:"),
        ({"norm": "batch"}, "another norm:"),
        ({"select": "val-split"}, "another select:"),
        ({"seed": 3}, "another seed:"),
        ({"train": {LAST: blobs(90)[0][LAST]}, "test": {LAST: blobs(40, seed=1)[0][LAST]}}, "another inputs:"),
        ({"train": blobs(90, seed=5)[0]}, "another set of images or encoder:"),
        ({"train_y": blobs(90, seed=5)[1]}, "another set of images or encoder:"),
    ],
)
def test_states_of_other_settings_are_refused(
    change: dict[str, Any], words: str, tmp_path: Path, finished_state: bytes
) -> None:
    (tmp_path / "state").write_bytes(finished_state)
    with pytest.raises(ConfigError) as caught:
        probed(state=tmp_path / "state", **change)
    assert words in str(caught.value) and str(tmp_path / "state") in str(caught.value)


@pytest.fixture(scope="module")
def finished_state(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("probe") / "state"
    probed(state=path)
    return path.read_bytes()


def test_damaged_states(tmp_path: Path) -> None:
    path = tmp_path / "state"
    probed(state=path)
    whole, saved = path.read_bytes(), torch.load(path)
    middle = whole.index(saved["ensemble"]["weights.1"].numpy().tobytes())
    for content in (
        b"",
        b"nothing",
        whole[:middle],
        whole[:middle] + bytes([whole[middle] ^ 255]) * 9 + whole[middle + 9 :],
    ):
        path.write_bytes(content)
        with pytest.raises(OutputError, match="damaged state of a probe"):
            probed(state=path)
    tensors = saved["ensemble"]
    for wrong in (3, {}, saved | {"ensemble": {}}, saved | {"ensemble": tensors | {"bias": 3}}, saved | {"step": "x"}):
        torch.save(wrong, path)
        with pytest.raises(OutputError, match="damaged state"):
            probed(state=path)
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError):
        probed(state=path)


# --- bad input


def changed(key: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> dict[str, Any]:
    """`blobs` with the first input of `key` (train or test) changed."""
    count, seed = (90, 0) if key == "train" else (40, 1)
    features = blobs(count, seed=seed)[0]
    return {key: features | {LAST: change(np.array(features[LAST][:]))}}


def put(value: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    def change(x: NDArray[Any]) -> NDArray[Any]:
        x[7, 2] = value
        return x

    return change


def lonely() -> Indices:
    y = blobs(90)[1]
    y[0] = 77
    return y


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"train_y": np.full(90, 3)}, DataError, "train: all images are of class 3"),
        ({"test_y": np.full(40, 4)}, DataError, "test: class 4 has no training image"),
        (changed("train", put(math.nan)), DataError, "train (last cls): features of image 7 (counted from 0) are not"),
        (changed("test", put(math.inf)), DataError, "test (last cls): features of image 7 (counted from 0) are not"),
        (changed("train", lambda x: x[:80]), DataError, "(last cls): 80 rows of features, but labels of shape (90,)"),
        (changed("test", lambda x: x[:30]), DataError, "(last cls): 30 rows of features, but labels of shape (40,)"),
        (changed("train", lambda x: x[:0]), DataError, "train (last cls): features have shape (0, 5)"),
        (changed("test", lambda x: x[:, 0]), DataError, "test features of last cls (40 wide)"),
        (changed("train", lambda x: x[:, :4]), DataError, "train features are of last cls (4 wide)"),
        ({"train": {}}, DataError, "train features are of nothing, test features of last cls (5 wide), last4 cls+mean"),
        ({"train": {}, "test": {}}, DataError, "test: there are no features"),
        ({"test": {LAST: blobs(40)[0][LAST]}}, DataError, "test features of last cls (5 wide)"),
        ({"train_y": np.zeros(90)}, DataError, "type float64"),
        ({"lrs": ()}, ConfigError, "lr = []"),
        ({"lrs": (0.1, 0.0)}, ConfigError, "lr = [0.1, 0.0]"),
        ({"lrs": (math.nan,)}, ConfigError, "lr = "),
        ({"epochs": 0}, ConfigError, "epochs = 0"),
        ({"batch_size": 0}, ConfigError, "batch_size = 0"),
        ({"batch_size": 1, "norm": "batch"}, ConfigError, "probe.batch_size"),
        ({"norm": "layer"}, ConfigError, 'norm = "layer"'),
        ({"select": "train"}, ConfigError, 'select = "train"'),
        ({"device": "cuda"}, ConfigError, "device 'cuda' is not available"),
        ({"select": "val-split", "train_y": lonely()}, DataError, "class 77 has only one training image"),
        (
            {"select": "val-split", "train_y": np.arange(90) % 20, "test_y": np.arange(40) % 20},
            DataError,
            "select = 'val-split' would hold out 9 of 90 training images, fewer than the 20 classes",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], kind: type[UserError], words: str) -> None:
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(kind) as caught:
        probed(**change)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_few_images_get_smaller_batches() -> None:
    expected = {1: 1, 2: 1, 40: 4, 1437: 128, 10_239: 512, 10_240: 1024, 1_281_167: 1024}
    assert {images: default_batch(images) for images in expected} == expected


def test_few_images_have_batches_that_batchnorm_takes() -> None:
    train, train_y = blobs(6)
    run = ProbeGrid(ProbeTrainingConfig(norm="batch"), 0, train_y, train, train_y, CPU)
    assert (run.batch, run.steps_per_epoch) == (2, 3)
