"""Complete fine-tunings: resumption equals an uninterrupted run; splits, results, and what cannot be fine-tuned."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mimref.config.base import DataConfig
from mimref.config.load import load_config
from mimref.data.open import open_source
from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.classifier import read_classifier
from mimref.errors import CheckpointError, Checks, ConfigError, DataError, Interrupted, OutputError, UserErrors
from mimref.evaluation.lowshot.protocol import draw_split
from mimref.evaluation.lowshot.split_files import read_split_files
from mimref.progress import Silent
from mimref.refinement.run import refine
from mimref.transfer.finetune.config import FinetuneConfig
from mimref.transfer.finetune.plan import make_plan
from mimref.transfer.finetune.run import finetune
from tests.tiny import (
    Killed,
    Watcher,
    assert_same_run,
    finetune_config,
    header,
    kill_at,
    refine_config,
    results,
    saved_step,
    signal_at,
    turn,
    write_images,
    write_labelled,
    write_weights,
)

SHOTS: dict[str, Any] = {"shots": 6, "splits": 3, "finetune__epochs": 2, "monitor__log_every": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data` with two classes, and `encoder.safetensors`."""
    folder = tmp_path_factory.mktemp("fine-tuning")
    write_labelled(folder / "data")
    write_weights(folder / "encoder.safetensors")
    return folder


def config_of(folder: Path, **changes: Any) -> FinetuneConfig:
    return finetune_config(folder / "encoder.safetensors", folder / "data", **changes)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An uninterrupted run of 12 steps, 4 per epoch."""
    finetune(config_of(folder), folder / "whole")
    return folder / "whole"


@pytest.fixture(scope="module")
def split(folder: Path) -> Path:
    """Three trainings of 2 steps on 6 images per class."""
    finetune(config_of(folder, **SHOTS), folder / "split")
    return folder / "split"


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(folder: Path, whole: Path) -> None:
    files = {"config.toml", "encoder.safetensors", "metrics.jsonl", "results.csv", "results.json"}
    assert {path.name for path in whole.iterdir()} == files
    found, head = results(whole), header(whole)
    assert found["command"] == "finetune" and found["bad_images"] == []
    assert head["metrics"] == found["metrics"] and head["source"] == "mae"
    assert head["classifier"] == {"pool": "cls", "classes": ["a", "b"]}
    assert head["data"]["spec"] == str(folder / "data") and head["transform"]["image_size"] == 16
    lines = lines_of(whole)
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12]
    checks = [line for line in lines if "val_top1" in line]
    assert [line["step"] for line in checks] == [4, 8, 12] and "val_top5" not in checks[0]
    scores = [line["val_top1"] for line in checks]
    last, best = found["metrics"]
    assert last == {"metric": "finetune_top1", "value": scores[-1], "selected": "last epoch", "epoch": 3}
    best_epoch = scores.index(max(scores)) + 1
    assert best == {"metric": "finetune_top1", "value": max(scores), "selected": "best epoch", "epoch": best_epoch}
    # The classifier written is the one evaluated.
    classifier, _ = read_classifier(read_checkpoint(whole))
    val = open_source(DataConfig(spec=str(folder / "data")), "val")
    plan = make_plan(config_of(folder), Silent(), Checks())
    crops = torch.stack([plan.transform.crop(val.read(row)) for row in range(len(val))])
    predicted = classifier(plan.transform.normalize(crops)).argmax(1).numpy()
    assert 100 * float(np.mean(predicted == plan.val_labels)) == pytest.approx(scores[-1])


def test_interrupted_and_resumed_equals_uninterrupted(folder: Path, whole: Path, tmp_path: Path) -> None:
    """The run is interrupted by signals within and at the end of epochs, and by a kill."""
    stops = [(1, signal.SIGTERM), (4, signal.SIGINT), (6, signal.SIGTERM), (11, None), (12, signal.SIGTERM)]
    for attempt, (step, number) in enumerate(stops):
        watcher = kill_at("fine-tuning", step) if number is None else signal_at(step, number, what="fine-tuning")
        with pytest.raises((Interrupted, Killed)):
            finetune(config_of(folder), tmp_path, resume=attempt > 0, listener=watcher)
        assert not (tmp_path / "results.json").exists()
    finetune(config_of(folder), tmp_path, resume=True)
    assert_same_run(tmp_path, whole)
    assert not (tmp_path / "state").exists()


def test_a_run_does_not_go_on_from_other_weights(folder: Path, tmp_path: Path) -> None:
    config = finetune_config(write_weights(tmp_path / "base.safetensors"), folder / "data")
    with pytest.raises(Interrupted):
        finetune(config, tmp_path / "out", listener=signal_at(1, what="fine-tuning"))
    write_weights(tmp_path / "base.safetensors", seed=1)
    with pytest.raises(CheckpointError, match=r"base\.safetensors holds other weights"):
        finetune(config, tmp_path / "out", resume=True)


def assert_same_splits(out: Path, other: Path) -> None:
    for number in (1, 2, 3):
        found, expected = (load_file(each / f"split{number}.safetensors") for each in (out, other))
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert (out / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    assert results(out)["metrics"] == results(other)["metrics"]


def test_a_run_of_several_splits_resumes_in_any_of_them(folder: Path, split: Path, tmp_path: Path) -> None:
    config = config_of(folder, **SHOTS)
    second = "fine-tuning, split 2 of 3"
    # Stopped in the middle of the second split and at its end, and killed in the third before its first state.
    stops = [signal_at(1, what=second), signal_at(2, what=second), kill_at("fine-tuning, split 3 of 3", 1)]
    for attempt, (watcher, step) in enumerate(zip(stops, (3, 4, 4), strict=True)):
        with pytest.raises((Interrupted, Killed)):
            finetune(config, tmp_path, resume=attempt > 0, listener=watcher)
        assert saved_step(tmp_path) == step
    finetune(config, tmp_path, resume=True)
    assert_same_splits(tmp_path, split)


def test_splits_are_trained_each_on_its_own(folder: Path, split: Path) -> None:
    files = {*(f"split{number}.safetensors" for number in (1, 2, 3)), "config.toml", "metrics.jsonl"}
    assert {path.name for path in split.iterdir()} == files | {"results.csv", "results.json"}
    rows, lines = results(split)["metrics"], lines_of(split)
    for selected in ("last epoch", "best epoch"):
        mean, *each = [row for row in rows if row["selected"] == selected]
        scores: list[float] = []
        for number, row in enumerate(each, 1):
            epochs = [line["val_top1"] for line in lines if line.get("split") == number and "val_top1" in line]
            wanted = epochs[-1] if selected == "last epoch" else max(epochs)
            assert row["split"] == number and row["shots"] == 6 and row["value"] == wanted
            assert epochs[row["epoch"] - 1] == wanted
            scores.append(wanted)
        assert mean["value"] == mean["mean"] == pytest.approx(np.mean(scores)) and mean["splits"] == 3
        assert mean["std"] == pytest.approx(np.std(scores, ddof=1)) and "split" not in mean
    with safe_open(split / "split2.safetensors", framework="pt") as opened:
        head = json.loads(opened.metadata()["mimref"])
    assert head["metrics"][0] == {
        "metric": "finetune_top1", "selected": "last epoch", "shots": 6, "value": rows[2]["value"], "epoch": 2,
    }  # fmt: skip
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert len({line["loss"] for line in lines if "loss" in line}) == 6


def test_shots_are_those_of_lowshot(folder: Path) -> None:
    plan = make_plan(config_of(folder, **SHOTS, seed=5), Silent(), Checks())
    labels = plan.train.labels
    assert labels is not None
    for number in range(3):
        rows = plan.splits[number]
        assert rows is not None and np.array_equal(rows, draw_split(labels, 6, split=number, seed=5))
        assert np.array_equal(plan.labels_of(number), labels[rows])
        assert [plan.images(number).path(i) for i in range(12)] == [plan.train.path(row) for row in rows]


def test_classes_of_fewer_images_give_all_if_asked_to(folder: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "data", per_class=5, split="train")
    write_images(tmp_path / "data", per_class=5, split="val")
    for number in (1, 2, 3):
        (tmp_path / "data" / "train" / "b" / f"00{number}.png").unlink()
    few: dict[str, Any] = {"shots": 4, "splits": 2, "batch_size": 6}
    weights = folder / "encoder.safetensors"
    with pytest.raises(DataError, match="class b has only 2 training images"):
        make_plan(finetune_config(weights, tmp_path / "data", **few), Silent(), Checks())
    plan = make_plan(finetune_config(weights, tmp_path / "data", **few, all_if_fewer=True), Silent(), Checks())
    assert [sorted(plan.labels_of(number)) for number in (0, 1)] == [[0, 0, 0, 0, 1, 1]] * 2


def test_split_files_are_those_of_lowshot(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files differ in length; the run resumes from another folder, and its steps keep counting up."""
    monkeypatch.chdir(tmp_path)
    names = [
        [f"{name}/{number:03}.png" for name in "ab" for number in numbers] for numbers in (range(12), range(4, 10))
    ]
    for number, each in enumerate(names):
        Path(f"{number}.txt").write_text("\n".join(each))
    changes: dict[str, Any] = {"split_files": ["0.txt", "1.txt"], "finetune__epochs": 2, "monitor__log_every": 1}
    config = config_of(folder, **changes)
    plan = make_plan(config, Silent(), Checks())
    expected = read_split_files(["0.txt", "1.txt"], [plan.train.path(row) for row in range(48)])
    for found, rows in zip(plan.splits, expected, strict=True):
        assert found is not None and np.array_equal(found, rows)
    with pytest.raises(Interrupted):
        finetune(config, tmp_path / "out", listener=signal_at(1, what="fine-tuning, split 2 of 2"))
    assert saved_step(tmp_path / "out") == 5
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings = load_config(FinetuneConfig, str(tmp_path / "out" / "config.toml"))
    assert settings.split_files == [str(tmp_path / "0.txt"), str(tmp_path / "1.txt")]
    Path(tmp_path / "1.txt").write_text("\n".join(names[0]))
    with pytest.raises(DataError, match="split 2 of 2"):
        finetune(settings, tmp_path / "out", resume=True)
    Path(tmp_path / "1.txt").write_text("\n".join(names[1]))
    finetune(settings, tmp_path / "out", resume=True)
    assert [line["step"] for line in lines_of(tmp_path / "out") if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_returns_its_results_and_force_replaces_it(folder: Path, whole: Path, tmp_path: Path) -> None:
    watcher = kill_at("fine-tuning", 1)
    assert finetune(config_of(folder), whole, resume=True, listener=watcher).rows == results(whole)["metrics"]
    with pytest.raises(OutputError, match="--force"):
        finetune(config_of(folder), whole)
    finetune(config_of(folder, **SHOTS), tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    finetune(config_of(folder, finetune__epochs=1), tmp_path, force=True)
    assert not list(tmp_path.glob("split*"))
    assert (tmp_path / "mine.txt").exists() and (tmp_path / "encoder.safetensors").exists()


def test_config_toml_and_workers_give_the_same_run(folder: Path, whole: Path, tmp_path: Path) -> None:
    config = load_config(FinetuneConfig, str(whole / "config.toml"))
    assert config == load_config(FinetuneConfig, str(whole / "config.toml"), {"workers": 0})
    assert config.finetune == config_of(folder).finetune and config.optimizer.betas == (0.9, 0.999)
    finetune(load_config(FinetuneConfig, str(whole / "config.toml"), {"workers": 2, "micro_batch": None}), tmp_path)
    assert_same_run(tmp_path, whole)


def test_one_setting_of_the_optimizer_leaves_the_others() -> None:
    config = load_config(FinetuneConfig, None, {"optimizer.clip_grad": 1.0})
    assert (config.optimizer.betas, config.optimizer.end_lr, config.optimizer.clip_grad) == ((0.9, 0.999), 0.0, 1.0)


def test_the_result_can_be_refined_and_fine_tuned_again(folder: Path, whole: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"heads_stage__epochs": 1, "encoder_stage__epochs": 1}
    refine(refine_config(whole, folder / "data", **changes), tmp_path / "refined")
    assert header(tmp_path / "refined")["architecture"] == header(whole)["architecture"]
    assert "classifier" not in header(tmp_path / "refined")
    settings: dict[str, Any] = {"finetune__epochs": 1, "resolution": 32, "finetune__pool": "mean"}
    finetune(finetune_config(whole, folder / "data", **settings), tmp_path / "again")
    assert header(tmp_path / "again")["architecture"]["image_size"] == 32
    assert header(tmp_path / "again")["classifier"]["pool"] == "mean"
    assert header(tmp_path / "again")["transform"]["image_size"] == 32


def test_unreadable_images_are_left_out_and_told(folder: Path, tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data")
    bad = [data / "train" / "a" / "003.png", data / "val" / "b" / "001.png"]
    for image in bad:
        image.write_bytes(b"no image")
    finetune(finetune_config(folder / "encoder.safetensors", data), tmp_path / "out")
    assert [each["path"] for each in results(tmp_path / "out")["bad_images"]] == [str(path) for path in bad]
    # Each split may have as many as data.max_bad allows, also after a resume.
    for split in ("train", "val"):
        turn(data / split / "a" / "000.png")
    config = finetune_config(folder / "encoder.safetensors", data, data__max_bad=1)
    first, second = signal_at(5, what="fine-tuning"), Watcher()
    with pytest.raises(Interrupted):
        finetune(config, tmp_path / "one each", listener=first)
    finetune(config, tmp_path / "one each", resume=True, listener=second)
    assert results(tmp_path / "one each")["bad_images"] == results(tmp_path / "out")["bad_images"]
    # Peculiar images are reported once, also over a resume.
    lines = [line for line in first.warnings + second.warnings if "EXIF orientation" in line]
    assert len(lines) == 2 and re.match("1 of [0-9]+ training images", lines[0])
    assert lines[1].startswith("1 of 15 validation images")


# --- what cannot be fine-tuned


def told(folder: Path, **changes: Any) -> list[str]:
    with pytest.raises((ConfigError, DataError, UserErrors)) as caught:
        make_plan(config_of(folder, **changes), Silent(), Checks())
    errors = caught.value.errors if isinstance(caught.value, UserErrors) else [caught.value]
    assert all("\n" not in str(error) for error in errors)
    return list(map(str, errors))


def test_all_mistakes_are_listed_together(folder: Path) -> None:
    found = told(folder, batch_size=64, resolution=20, finetune__freeze_blocks=2)
    assert len(found) == 2
    assert "--resolution 20" in found[0] and "patch size 8" in found[0]
    assert "batch_size 64" in found[1] and "48" in found[1]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"finetune__freeze_blocks": 5}, ["finetune.freeze_blocks 5", "4 blocks"]),
        ({"shots": 25}, ["class a", "24", "25 shots"]),
        ({"shots": 5}, ["batch_size 12", "10 training images"]),
        ({"split_files": ["nothing.txt"]}, ["nothing.txt"]),
    ],
)
def test_settings_that_do_not_fit(folder: Path, changes: dict[str, Any], parts: list[str]) -> None:
    (line,) = told(folder, **changes)
    assert all(part in line for part in parts), line


def test_a_split_file_that_lacks_a_class(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "split.txt").write_text("\n".join(f"a/{number:03}.png" for number in range(12)))
    (line,) = told(folder, split_files=[str(tmp_path / "split.txt")])
    assert f"{tmp_path / 'split.txt'}" in line and "class b" in line


def test_images_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "no val", per_class=8, split="train")
    write_images(tmp_path / "new", per_class=8, split="train")
    write_images(tmp_path / "new", per_class=2, classes=("a", "b", "new"), split="val")
    write_images(tmp_path / "flat", per_class=8, split="train")
    write_images(tmp_path / "flat", per_class=8, classes=("",), split="val")
    write_images(tmp_path / "one", per_class=24, classes=("a",), split="train")
    write_images(tmp_path / "one", per_class=24, classes=("a",), split="val")
    for name, part in (("no val", "no val"), ("new", "class 'new'"), ("flat", "val"), ("one", "two classes or more")):
        with pytest.raises((ConfigError, DataError)) as caught:
            make_plan(finetune_config(folder / "encoder.safetensors", tmp_path / name), Silent(), Checks())
        assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "nonsense", "rand-x9", "rand-m9-n0", "rand-n99-tweights", "augmix-m5"])
def test_unknown_augmentations_are_named(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(FinetuneConfig, None, {"augment.rand_augment": text})
    assert "augment.rand_augment" in str(caught.value) and "rand-m9-mstd0.5-inc1" in str(caught.value)


def test_shots_and_split_files_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="shots and split_files"):
        load_config(FinetuneConfig, None, {"shots": 1, "split_files": ["a.txt"]})


def test_another_kind_of_encoder_is_named(tmp_path: Path, folder: Path) -> None:
    torch.save({"transformer.wte.weight": torch.zeros(3, 2)}, tmp_path / "gpt.pt")
    with pytest.raises(UserErrors) as caught:
        make_plan(finetune_config(tmp_path / "gpt.pt", folder / "nowhere"), Silent(), Checks())
    assert len(caught.value.errors) == 2 and "gpt.pt" in str(caught.value) and "nowhere" in str(caught.value)
