"""`mimref finetune` and `mimref predict` from the command line to their files, and the commands that read these."""

import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

from mimref.cli import run
from mimref.config.base import DataConfig
from mimref.config.presets import choose_finetune_preset
from mimref.data.open import open_source
from mimref.data.transforms import EvalTransform
from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.classifier import Classifier, read_classifier, save_classifier
from mimref.encoders.vit import Architecture, build_encoder
from mimref.reports import terminal
from tests.tiny import ARCHITECTURE, FINETUNE, arguments, assert_same_run, results, write_images, write_labelled

PNG = b"\x89PNG\r\n"
# Class names that CSV files must quote, or that terminals must not receive as they are.
ODD = ["a,b", 'say "x"', " c", "d\ne", "ü", "=1+1", "-"]


@pytest.fixture(scope="module")
def settings(folder: Path) -> dict[str, Any]:
    return FINETUNE | {"data.spec": folder / "data"}


@pytest.fixture(scope="module")
def tuned(folder: Path, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fine-tuning."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    assert run(command(folder, settings, out)) == 0
    return out


def command(folder: Path, settings: dict[str, Any], out: Path, *more: str) -> list[str]:
    name, *line = arguments("finetune", out, settings)
    return [name, str(folder / "base.safetensors"), *line, *more]


def write_classifier(path: Path, classes: list[str], architecture: Architecture = ARCHITECTURE) -> Classifier:
    torch.manual_seed(3)
    classifier = Classifier(build_encoder(architecture), len(classes))
    for parameter in classifier.parameters():
        parameter.data.normal_(std=0.3)
    save_classifier(path, classifier, classes, {"transform": EvalTransform(architecture.image_size, 1.0).to_dict()})
    return classifier.eval()


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def refusal(capsys: pytest.CaptureFixture[str], *line: object) -> list[str]:
    """Return the error lines of a failing command."""
    assert run([str(each) for each in line]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return [text.removeprefix("mimref: error: ") for text in captured.err.splitlines()]


# --- finetune


def test_a_run_prints_a_table_and_leaves_its_files(
    folder: Path, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(command(folder, settings, out)) == 0
    captured = capsys.readouterr()
    assert "last epoch" in captured.out and "best epoch" in captured.out and "fine-tuned top-1" in captured.out
    assert "fine-tuning: 12/12" in captured.err and "fine-tuning, epoch 3: val top1 " in captured.err
    assert f"encoder in {out / 'encoder.safetensors'}, results in {out / 'results.json'}" in captured.err
    assert (out / "curve.png").read_bytes().startswith(PNG)
    selected = [row["selected"] for row in table(out / "results.csv")]
    assert selected == ["last epoch", "best epoch"]
    assert "--force" in refusal(capsys, *command(folder, settings, out))[0]
    assert run(["finetune", "--resume", "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr().out == captured.out
    line = ["finetune", str(folder / "base.safetensors"), "--preset", str(out / "config.toml"), "--quiet"]
    assert run([*line, "--out", str(tmp_path / "again")]) == 0
    quiet = capsys.readouterr()
    assert (quiet.out, quiet.err) == (captured.out, "")
    assert_same_run(tmp_path / "again", out)


def test_a_signal_saves_and_resume_needs_no_more_options(
    folder: Path, settings: dict[str, Any], tuned: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def progress(self: terminal.Terminal, label: str, done: int, total: int) -> None:
        if (label, done) == ("fine-tuning", 6):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(terminal.Terminal, "progress", progress)
        assert run(command(folder, settings, tmp_path)) == 143
    message = capsys.readouterr().err.splitlines()[-1]
    assert "step 6 of 12" in message and "--resume" in message
    changed = refusal(capsys, "finetune", "--resume", "--out", tmp_path, "--set", "augment.mixup=0.1")
    assert "augment.mixup" in changed[0]
    assert run(["finetune", "--resume", "--out", str(tmp_path)]) == 0
    assert_same_run(tmp_path, tuned)


def test_splits_have_a_file_and_a_curve_each(
    folder: Path, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    few = settings | {"finetune.epochs": 1}
    assert run(command(folder, few, out, "--shots", "6", "--splits", "2")) == 0
    captured = capsys.readouterr()
    assert "±" in captured.out and "shots 6, splits 2" in captured.out
    assert "split1.safetensors" in captured.err and "split2.safetensors" in captured.err
    assert (out / "curve.png").read_bytes().startswith(PNG)
    assert len(table(out / "results.csv")) == 6
    (line,) = refusal(capsys, "predict", out, folder / "unlabelled", "--out", tmp_path / "x.csv")
    assert "split1.safetensors" in line
    line = ["predict", str(out / "split2.safetensors"), str(folder / "unlabelled"), "--out", str(tmp_path / "l.csv")]
    assert run(line) == 0 and len(table(tmp_path / "l.csv")) == 48


def test_the_packaged_encoder_has_a_preset() -> None:
    assert choose_finetune_preset(None, None, None) == "finetune/quickstart"
    assert choose_finetune_preset(None, None, "quickstart") == "finetune/quickstart"
    assert choose_finetune_preset(None, "vit_l16", None) is None
    assert choose_finetune_preset(None, None, "runs/mae_l16") is None
    assert choose_finetune_preset("imagenet_l16", None, None) == "imagenet_l16"


MISTAKES = {
    "gone.pth --data nowhere --shots 0 --set augment.rand_augment=foo": (
        "gone.pth",
        "--data nowhere",
        "--shots 0",
        "augment.rand_augment",
    ),
    "{base} --data {data} --batch-size 64 --resolution 20 --out done": ("--resolution 20", "--batch-size 64", "done"),
    "{base} --data {data} --shots 2 --split-file x.txt": ("shots and split_files",),
    "{base} --data {data} --batch-size 12 --shots 30": ("30 shots",),
    "{base} --data {data} --batch-size 12 --pool max --lr fast": ("--lr fast", "--pool max"),
    "{base} --data {unlabelled} --batch-size 12": ("no labels",),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_all_mistakes_are_listed(
    line: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "results.json").write_text("{}")
    names = {"base": folder / "base.safetensors", "data": folder / "data", "unlabelled": folder / "unlabelled"}
    lines = refusal(capsys, "finetune", *line.format(**names).split())
    found = sorted(part for part in MISTAKES[line] if any(part in each for each in lines))
    assert found == sorted(MISTAKES[line]) and len(lines) == len(MISTAKES[line]), lines
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


# --- predict


@pytest.mark.parametrize("spec", ["unlabelled", "data"])
def test_labels_and_probabilities_are_of_a_direct_pass(
    spec: str, folder: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels.csv"
    assert run(["predict", str(tuned), str(folder / spec), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith(f"images in {out}\n")
    source = open_source(DataConfig(spec=str(folder / spec)), "val", need_labels=False)
    checkpoint = read_checkpoint(tuned)
    classifier, classes = read_classifier(checkpoint)
    transform = EvalTransform.from_dict(checkpoint.header["transform"])
    crops = torch.stack([transform.crop(source.read(row)) for row in range(len(source))])
    with torch.inference_mode():
        probabilities = classifier(transform.normalize(crops)).softmax(1).numpy()
    found = table(out)
    assert [row["path"] for row in found] == [source.path(row) for row in range(len(source))]
    assert [row["label"] for row in found] == [classes[number] for number in probabilities.argmax(1)]
    assert np.allclose([float(row["probability"]) for row in found], probabilities.max(1), rtol=1e-4)


def test_odd_names_survive_the_table(folder: Path, tmp_path: Path) -> None:
    names = [f"class {name}" for name in ODD]
    write_classifier(tmp_path / "c.safetensors", names)
    images = tmp_path / "im,ages"
    write_images(images, per_class=8, classes=("",))
    (images / "odd\n,name.png").write_bytes((images / "000.png").read_bytes())
    assert run(["predict", str(tmp_path / "c.safetensors"), str(images), "--out", str(tmp_path / "l.csv")]) == 0
    found = table(tmp_path / "l.csv")
    assert len(found) == 9 and {row["label"] for row in found} <= set(names)
    assert sum("odd\\n,name.png" in row["path"] for row in found) == 1
    assert all(0 < float(row["probability"]) <= 1 for row in found)


def test_class_names_of_folders_reach_the_table(folder: Path, tmp_path: Path) -> None:
    """Odd folder names survive a fine-tuning and reach the table."""
    for split in ("train", "val"):
        write_images(tmp_path / "data", per_class=6, classes=("a,b", 'c "d"', " e"), split=split)
    settings = FINETUNE | {"data.spec": tmp_path / "data", "finetune.epochs": 1}
    assert run(command(folder, settings, tmp_path / "out")) == 0
    assert read_checkpoint(tmp_path / "out").header["classifier"]["classes"] == [" e", "a,b", 'c "d"']
    line = ["predict", str(tmp_path / "out"), str(tmp_path / "data"), "--split", "train", "--out"]
    assert run([*line, str(tmp_path / "l.csv")]) == 0
    found = table(tmp_path / "l.csv")
    assert len(found) == 18 and {row["label"] for row in found} <= {" e", "a,b", 'c "d"'}


def test_unreadable_images_are_named(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images", per_class=4, classes=("",))
    (images / "001.png").write_bytes(b"no image")
    line = ["predict", str(tuned), str(images), "--out", str(tmp_path / "l.csv"), "--set", "device=cpu"]
    assert run(line) == 0
    assert [Path(row["path"]).name for row in table(tmp_path / "l.csv")] == ["000.png", "002.png", "003.png"]
    assert "001.png (not an image)" in capsys.readouterr().err
    assert "l.csv" in refusal(capsys, *line)[0]
    assert run([*line, "--force", "--set", "workers=1"]) == 0
    capsys.readouterr()
    for image in images.iterdir():
        image.write_bytes(b"no image")
    before = (tmp_path / "l.csv").read_text()
    (error,) = refusal(capsys, *line, "--force")
    assert "000.png (not an image)" in error
    assert (tmp_path / "l.csv").read_text() == before


def test_predictions_that_cannot_be(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = refusal(capsys, "predict", folder / "base.safetensors", tmp_path / "nowhere", "--out", tmp_path / "l.txt")
    assert len(lines) == 3
    assert "mimref finetune" in lines[0] and "nowhere" in lines[1] and ".csv" in lines[2]
    write_classifier(tmp_path / "c.safetensors", ["a", "b"])
    (line,) = refusal(
        capsys, "predict", tmp_path / "c.safetensors", folder / "data", "--out", tmp_path / "l.csv", "--resolution", 20
    )
    assert "--resolution 20" in line


def test_public_classifiers_predict(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}
    vit = VisionTransformer(**sizes, num_classes=7, global_pool="avg")
    torch.save({"model": vit.state_dict()}, tmp_path / "mae_finetuned.pth")
    line = ["predict", str(tmp_path / "mae_finetuned.pth"), str(folder / "data"), "--out", str(tmp_path / "l.csv")]
    assert run(line) == 0
    assert {row["label"] for row in table(tmp_path / "l.csv")} <= set("0123456") and capsys.readouterr().err


# --- commands that read the result


def test_inspect_names_the_classifier(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tuned)]) == 0
    assert "2 classes (a, b), reads the CLS token" in capsys.readouterr().out
    assert run(["inspect", str(tuned), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["header"]["classifier"] == {"pool": "cls", "classes": ["a", "b"]}


def test_evaluations_read_the_encoder(
    folder: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (
        ["knn", str(tuned), "--out", str(tmp_path / "knn")],
        ["extract", str(tuned), "--out", str(tmp_path / "x.npz"), "--final-norm"],
        ["compare", str(folder / "base.safetensors"), str(tuned), "--metrics", "acc", "--set", "runs=1"],
    ):
        assert run(line) == 0, capsys.readouterr().err
    assert results(tmp_path / "knn")["metrics"][0]["metric"] == "knn_top1"
    # The classifier's logits are its head applied to the extracted features.
    classifier, classes = read_classifier(read_checkpoint(tuned))
    logits = np.load(tmp_path / "x.npz")["x"] @ classifier.head.weight.detach().numpy().T
    logits += classifier.head.bias.detach().numpy()
    assert run(["predict", str(tuned), str(folder / "data"), "--out", str(tmp_path / "l.csv")]) == 0
    assert [row["label"] for row in table(tmp_path / "l.csv")] == [classes[number] for number in logits.argmax(1)]


def test_averages_have_no_classifier(folder: Path, tuned: Path, tmp_path: Path) -> None:
    """The base has no classifier, so the average is exported as an encoder alone."""
    assert run(["interpolate", str(folder / "base.safetensors"), str(tuned), "--out", str(tmp_path), "--quiet"]) == 0
    average = tmp_path / "alpha-0.5.safetensors"
    assert "classifier" not in read_checkpoint(average).header
    assert run(["export", str(average), "--to", "timm", "--out", str(tmp_path / "t.pth"), "--quiet"]) == 0


def test_export_keeps_the_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = Architecture("custom", 224, width=192, depth=12, num_heads=3, patch_size=16)
    classifier = write_classifier(tmp_path / "c.safetensors", ["a", "b,c", "d"], sizes)
    out = tmp_path / "t.safetensors"
    assert run(["export", str(tmp_path / "c.safetensors"), "--to", "timm", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    call = f"timm.create_model('vit_tiny_patch16_224', checkpoint_path={str(out)!r}, num_classes=3)"
    assert call in printed
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(eval(call, {"timm": timm}).eval()(images), classifier(images), rtol=1e-4, atol=1e-3)
    with safe_open(out, framework="pt") as opened:
        stored = json.loads(opened.metadata()["mimref"])
    assert stored["classes"] == ["a", "b,c", "d"] and stored["transform"]["crop_fraction"] == 1.0
    # Other formats cannot store the classifier, and the command says so.
    assert run(["export", str(tmp_path / "c.safetensors"), "--to", "release", "--out", str(tmp_path / "r.th")]) == 0
    assert "leaves the classifier out" in capsys.readouterr().err


def test_damaged_results_are_one_line(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tuned, tmp_path / "out")
    file = tmp_path / "out" / "encoder.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    data = write_labelled(tmp_path / "data")
    (error,) = refusal(capsys, "predict", tmp_path / "out", data, "--out", tmp_path / "l.csv")
    assert str(file) in error
