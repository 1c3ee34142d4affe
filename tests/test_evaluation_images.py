"""Peculiar images, unreadable images and class names, from a data set to rows, files and warnings."""

import csv
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimref.api import extract, load
from mimref.cli import run
from mimref.config.base import DataConfig
from mimref.data.open import open_source
from mimref.data.pixels import Decoding
from mimref.data.sources import ImageSource, Split
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint, save_encoder
from mimref.encoders.vit import Encoder, build_encoder
from mimref.errors import CheckpointError, Checks, ConfigError, DataError, UserErrors
from mimref.evaluation.cluster.config import ClusterConfig
from mimref.evaluation.cluster.protocol import evaluate_cluster
from mimref.evaluation.config import InterpolateConfig
from mimref.evaluation.interpolate import interpolate
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.evaluation.lowshot.config import LowshotConfig
from mimref.evaluation.lowshot.protocol import evaluate_lowshot, lowshot
from mimref.evaluation.metrics import name_classes
from mimref.evaluation.probe.config import ProbeConfig, ProbeTrainingConfig
from mimref.evaluation.probe.protocol import evaluate_probe
from mimref.features import opening
from mimref.features.config import CacheConfig, EncoderPassConfig
from mimref.features.header import data_record, resolve_data, shared_data, with_channels
from mimref.features.inputs import EncoderInputs
from mimref.features.opening import open_encoders
from mimref.pretraining.run import pretrain
from mimref.progress import Silent
from mimref.refinement.plan import make_plan
from mimref.reports.figures import plot_embedding
from mimref.results import EvaluationResult, frame
from tests.test_evaluation_run import Recorder
from tests.tiny import ARCHITECTURE, pretrain_config, refine_config, write_images

CLASSES = "abcd"


def stripes(label: int, side: int = 32) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rows = np.repeat((np.arange(side) // (2 + 2 * label) % 2)[None], side, axis=0)
    noise = np.random.default_rng(label).normal(0, 0.05, (side, side))
    return np.clip((rows * 0.7 + 0.15 + noise) * 255, 0, 255).astype(np.uint8)


def write(folder: Path, image: Any, suffix: str = "png", **options: Any) -> DataConfig:
    """Four classes of two images each in train and val; `image` makes an image from the stripes of a class."""
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                image(stripes(label)).save(folder / split / name / f"{number}.{suffix}", **options)
    return DataConfig(spec=str(folder))


def top1(data: DataConfig, **changes: Any) -> tuple[float, list[str]]:
    listener = Recorder()
    data = data.model_copy(update=changes)
    config = KnnConfig(data=data, k=[1], cache=CacheConfig(folder="off"), device="cpu", workers=0)
    return float(evaluate_knn(config, listener=listener).rows[0]["value"]), listener.warnings


def shape_in_alpha(gray: Any) -> Image.Image:
    rgba = np.zeros((*gray.shape, 4), np.uint8)
    rgba[..., 3] = gray
    return Image.fromarray(rgba)


# --- images that need a setting


def test_shapes_in_the_alpha_channel(tmp_path: Path) -> None:
    data = write(tmp_path / "icons", shape_in_alpha)
    value, told = top1(data)
    assert math.isnan(value) and len(told) == 2  # features do not vary
    assert "8 of 8 training images" in told[0] and "8 of 8 validation images" in told[1]
    assert all("data.alpha" in line and "of one colour" in line for line in told)
    for alpha in ("white", "checker"):
        assert top1(data, alpha=alpha) == (100, [])
    value, told = top1(data, alpha="black")  # black on black
    assert math.isnan(value) and all("of one colour" in line for line in told)


@pytest.mark.parametrize("choice", ["image", "percentile", "900,1155"])
def test_scans_that_use_a_small_range(tmp_path: Path, choice: str) -> None:
    data = write(tmp_path / "ct", lambda gray: Image.fromarray(gray.astype(np.uint16) + 900), "tif")
    value, told = top1(data)
    assert value != 100 and len(told) == 2 and all("data.range" in line and "16" in line for line in told)
    assert top1(data, range=choice) == (100, [])


def test_floating_point_scans(tmp_path: Path) -> None:
    data = write(tmp_path / "float", lambda gray: Image.fromarray(gray.astype(np.float32) / 255 - 0.5), "tif")
    with pytest.raises(UserErrors, match=r"no readable image of 8: .*0\.tif \(floating-point .*data\.range"):
        top1(data)
    assert top1(data, range="image")[0] == top1(data, range="-0.5,0.5")[0] == 100


def test_images_of_one_colour_are_reported(tmp_path: Path) -> None:
    data = write(tmp_path / "blank", lambda gray: Image.new("RGB", gray.shape, (9, 9, 9)))
    _, told = top1(data)
    assert len(told) == 2 and all("8 of 8" in line and "0.png" in line for line in told)


def test_exif_orientation_changes_features_back(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    encoder = load("quickstart")
    found = []
    for name in ("upright", "turned"):
        (tmp_path / name).mkdir()
        image = Image.fromarray(stripes(1)[:24]).convert("RGB")
        if name == "turned":
            image = image.transpose(Image.Transpose.ROTATE_90)
        image.save(tmp_path / name / "0.png", **({"exif": exif} if name == "turned" else {}))
        found.append(extract(encoder, DataConfig(spec=str(tmp_path / name), orientation="exif"), device="cpu").x)
    assert np.array_equal(*found)
    with pytest.warns(UserWarning, match=r"1 of 1 images .*data\.orientation=exif"):
        ignored = extract(encoder, tmp_path / "turned", device="cpu").x
    assert not np.allclose(ignored, found[0])


# --- cache and headers


def test_cached_features_depend_on_settings_that_are_not_the_default(tmp_path: Path) -> None:
    data = write(tmp_path / "icons", shape_in_alpha)
    told = []
    for alpha in (None, "drop", "white", "white"):
        listener = Recorder()
        config = KnnConfig(data=data.model_copy(update={"alpha": alpha}), k=[1], device="cpu", workers=0)
        config = config.model_copy(update={"cache": CacheConfig(folder=str(tmp_path / "cache"))})
        evaluate_knn(config, listener=listener)
        told.append(len(listener.warnings))
    entries = [json.loads(path.read_text())["spec"] for path in (tmp_path / "cache").glob("*/entry.json")]
    assert sorted(str(entry.get("decoding")) for entry in entries) == ["None"] * 2 + ["{'alpha': 'white'}"] * 2
    assert told == [2, 2, 0, 0]  # cached features give the warnings, too


def test_what_headers_record_is_known_before_images_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "float", lambda gray: Image.fromarray(gray.astype(np.float32) / 255 - 0.5), "tif")
    checkpoint = read_checkpoint("quickstart")
    encoder = encoder_from(checkpoint, choose_architecture(checkpoint))
    assert isinstance(encoder, Encoder)
    weights = str(tmp_path / "a.safetensors")
    save_encoder(tmp_path / "a.safetensors", encoder, {**checkpoint.header, "data": {"range": "image"}})
    splits: list[str] = []

    def counting(data: DataConfig, split: Split, **options: Any) -> ImageSource:
        splits.append(split)
        return open_source(data, split, **options)

    monkeypatch.setattr(opening, "open_source", counting)
    common: dict[str, Any] = {"data": data, "device": "cpu", "workers": 0}
    config = KnnConfig(checkpoint=weights, k=[1], cache=CacheConfig(folder="off"), **common)
    assert evaluate_knn(config).rows[0]["value"] == 100
    ends = InterpolateConfig(base=weights, refined=weights, alpha=[0.0, 1.0], **common)
    assert [row["value"] for row in interpolate(ends, tmp_path / "out").rows] == [100, 100]
    assert splits == ["train", "val"] * 2
    plan = make_plan(refine_config(Path(weights), Path(str(data.spec)), batch_size=4, heads__queue_size=8))
    assert plan.source.decoding.range == "image"
    assert splits == ["train", "val"] * 2 + ["train"]


def test_headers_record_how_images_were_decoded() -> None:
    assert data_record(DataConfig(spec="digits")).keys() == {"spec", "root", "train_limit"}
    header = {"data": data_record(DataConfig(spec="digits", alpha="white", range="0,9"))}
    for given in (DataConfig(), DataConfig(spec="fashion-mnist")):
        found = resolve_data(given, header)
        assert (found.orientation, found.alpha, found.range) == (None, "white", "0,9")
    assert resolve_data(DataConfig(spec="digits", alpha="drop"), header).alpha == "drop"
    with pytest.raises(CheckpointError, match=r"data\.alpha"):
        resolve_data(DataConfig(spec="digits"), {"data": {"alpha": 3}})


def test_alpha_and_other_channels_exclude_each_other_wherever_they_come_from() -> None:
    digits = DataConfig(spec="digits")
    with pytest.raises(ConfigError, match=r"data\.alpha white .* data\.channels is 5; omit data\.alpha"):
        resolve_data(digits.model_copy(update={"alpha": "white"}), {"data": {"channels": 5}})
    with pytest.raises(ConfigError, match=r"data\.alpha white .* data\.channels is 5; omit data\.alpha"):
        with_channels(digits.model_copy(update={"alpha": "white"}), replace(ARCHITECTURE, channels=5))
    # A recorded alpha is for the colour images of then.
    found = resolve_data(DataConfig(spec="digits", channels=5), {"data": {"alpha": "white", "orientation": "exif"}})
    assert (found.alpha, found.orientation, found.channels) == (None, "exif", 5)


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_encoders_see_the_same_images_in_any_order(tmp_path: Path, order: tuple[int, ...]) -> None:
    for split in ("train", "val"):
        data = write_images(tmp_path / "images", per_class=1, split=split)
    records: list[Any] = [{}, {"spec": str(data), "orientation": "exif"}, {"orientation": "exif", "range": "image"}]
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for file, record in zip(files, records, strict=True):
        save_encoder(file, build_encoder(ARCHITECTURE), {"source": "mae", "data": record})
    checkpoints = [str(files[number]) for number in order]
    config, heard = EncoderPassConfig(device="cpu", workers=0), Notes()
    opened = open_encoders(config, checkpoints, heard, Checks(), "checkpoints", need_labels=False)
    for each in opened:
        assert isinstance(each.inputs, EncoderInputs)
        assert each.inputs.data == DataConfig(spec=str(data), orientation="exif", range="image")
        assert each.sources["val"].decoding == Decoding(orientation="exif", range="image")
    (line,) = [line for line in heard.lines if "differ" in line]
    assert "data.orientation=exif, data.range=image" in line
    # What the user sets does not differ.
    heard.lines.clear()
    asked = config.model_copy(update={"data": DataConfig(orientation="file", range="type")})
    opened = open_encoders(asked, checkpoints, heard, Checks(), "checkpoints", need_labels=False)
    assert {each.sources["val"].decoding for each in opened} == {Decoding()}
    assert not [line for line in heard.lines if "differ" in line]


def test_headers_that_agree_are_followed_without_a_notice() -> None:
    same = {"data": {"orientation": "exif", "range": "type"}}
    data, differing = shared_data(DataConfig(spec="digits"), [same, {"data": {"orientation": "exif"}}])
    assert (data.orientation, data.range, differing) == ("exif", "type", [])
    first, second = {"data": {"alpha": "white"}}, {"data": {"alpha": "black"}}
    data, differing = shared_data(DataConfig(spec="digits"), [{}, first, second])
    assert (data.alpha, differing) == ("white", ["data.alpha=white"])
    data, differing = shared_data(DataConfig(spec="digits"), [first, {"data": {"channels": 2}}])
    assert (data.alpha, data.channels, differing) == (None, 2, ["data.channels=2"])
    assert shared_data(DataConfig(), [{}, {"data": 3}]) == (DataConfig(), [])


# --- training


def test_pretraining_says_what_is_peculiar_once(tmp_path: Path) -> None:
    data = write(tmp_path / "icons", shape_in_alpha)
    listener = Recorder()
    assert data.spec is not None
    config = pretrain_config(Path(data.spec), batch_size=8, workers=0)
    pretrain(config, tmp_path / "run", listener=listener)  # type: ignore[arg-type]
    (line,) = [line for line in listener.warnings if "data.alpha" in line]
    assert line.startswith("8 of 8 training images")


def test_pretraining_without_a_readable_image(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", per_class=4)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"<html>gone</html>")
    config = pretrain_config(folder, batch_size=8, workers=0, monitor__knn_every_epochs=0)
    with pytest.raises(DataError, match=r"no readable image of 8: .*000\.png \(not an image but an HTML page"):
        pretrain(config, tmp_path / "run")


# --- class names


def knn_of(folder: Path, names: list[str], tmp_path: Path) -> EvaluationResult:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                noise = rng.integers(0, 20, (8, 8), dtype=np.uint8)
                Image.fromarray(noise + np.uint8(40 * label)).save(folder / split / name / f"{number}.png")
    config = KnnConfig(data=DataConfig(spec=str(folder)), k=[1], per_class=True, device="cpu", workers=0)
    return evaluate_knn(config)


def test_odd_names_in_rows_files_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["dog, big", 'say "hi"', "日本語", "[red]x|y", "tab\there", "a\nb"]
    found = knn_of(tmp_path / "images", names, tmp_path)
    assert {row["class"] for row in found.rows if "class" in row} == set(names)
    capsys.readouterr()
    words = ["knn", "--data", str(tmp_path / "images"), "--k", "1", "--per-class", "--cache", "off", "--quiet"]
    assert run([*words, "--out", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "results.csv", newline="", encoding="utf-8") as file:
        assert {row["class"] for row in csv.DictReader(file) if row["class"]} == set(names)
    shown = capsys.readouterr().out
    for name in ("dog, big", 'say "hi"', "日本語", "[red]x|y", "tab\\there", "a\\nb"):
        assert name in shown


def test_names_that_no_text_file_holds(tmp_path: Path) -> None:
    assert name_classes(np.array([0, 1, 2]), ["caf\udce9", "a\rb", "c"]) == ["caf\\udce9", "a\\rb", "c"]


def test_labels_without_names_stay_labels() -> None:
    assert name_classes(np.array([0, 5]), None) == [0, 5]
    assert name_classes(np.array([0, 1]), ["0", "1"]) == [0, 1]
    assert name_classes(np.array([0, 2]), ["0", "1", "10"]) == ["0", "10"]
    assert name_classes(np.array([-1, 7]), ["a"]) == [-1, 7]


def test_numbered_folders_keep_their_names(tmp_path: Path) -> None:
    found = knn_of(tmp_path / "images", ["0", "1", "2", "10"], tmp_path)
    assert {str(row["class"]) for row in found.rows if "class" in row} == {"0", "1", "2", "10"}


def test_digits_keep_their_csv() -> None:
    config = KnnConfig(data=DataConfig(spec="digits", train_limit=50), k=[1], per_class=True, device="cpu")
    table = frame(evaluate_knn(config).rows)
    assert table["class"].dropna().tolist() == list(range(10)) and str(table["class"].dtype) == "Int64"


def test_names_travel_with_features(tmp_path: Path) -> None:
    write(tmp_path / "images", Image.fromarray)
    files = []
    for split in ("train", "val"):
        files.append(str(tmp_path / f"{split}.npz"))
        words = ["extract", "quickstart", "--data", str(tmp_path / "images"), "--split", split, "--out", files[-1]]
        assert run([*words, "--quiet", "--cache", "off"]) == 0
    pair = (files[0], files[1])
    rows = evaluate_knn(KnnConfig(features=pair, k=[1], per_class=True, device="cpu")).rows
    assert [row["class"] for row in rows if "class" in row] == list(CLASSES)
    result, _ = evaluate_cluster(ClusterConfig(features=pair, classes="a,c", runs=1))
    assert result.rows[0]["classes"] == 2
    with np.load(files[0]) as file:
        arrays = dict(file)
    np.savez(files[0], **{**arrays, "class_names": np.array(["x", "y"])})
    with pytest.raises(DataError, match="class_names"):
        evaluate_knn(KnnConfig(features=pair, k=[1], device="cpu"))
    np.savez(files[0], **{**arrays, "class_names": np.arange(4)})
    with pytest.raises(DataError, match="class_names"):
        evaluate_knn(KnnConfig(features=pair, k=[1], device="cpu"))


def test_messages_name_classes(tmp_path: Path) -> None:
    write_images(tmp_path, per_class=2, classes=("cat", "dog", "owl"), split="train")
    write_images(tmp_path, per_class=2, classes=("cat", "dog", "owl"), split="val")
    with pytest.raises(DataError, match="class owl has no training image"):
        evaluate_knn(KnnConfig(data=DataConfig(spec=str(tmp_path), train_limit=2), k=[1], device="cpu"))
    few = DataConfig(spec=str(tmp_path), train_limit=3)
    with pytest.raises(DataError, match="class cat has only 1 training"):
        evaluate_lowshot(LowshotConfig(data=few, shots=[2], device="cpu"))
    with pytest.raises(DataError, match="class cat has only one training image"):
        training = ProbeTrainingConfig(select="val-split")
        evaluate_probe(ProbeConfig(data=few, probe=training, cached=True, device="cpu"))
    splits = [[0, 1]]
    x, y = np.eye(3, dtype=np.float32), np.arange(3)
    with pytest.raises(DataError, match="split 0: class owl has no image"):
        lowshot(x, y, x, y, splits=splits, class_names=["cat", "dog", "owl"])


@pytest.mark.filterwarnings("error")
def test_figures_of_odd_names(tmp_path: Path) -> None:
    names = ["猫 $x$", "_dog, big", "tab\there", "caf\udce9", ""]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_embedding(tmp_path / "a.png", np.random.default_rng(0).normal(size=(5, 2)), np.arange(5), names)
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
