"""Weight averages between a base and a refined encoder."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.model_selection import train_test_split

import mimref
from mimref.cli import run
from mimref.config import load
from mimref.config.base import DataConfig
from mimref.data import sources
from mimref.data.open import open_source
from mimref.data.sources import ImageSource, Split, Subset
from mimref.encoders.backbones import find_architecture
from mimref.encoders.checkpoints import encoder_from, read_checkpoint, save_encoder
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import ConfigError, OutputError
from mimref.evaluation import interpolate as module
from mimref.evaluation.assess.config import AssessConfig
from mimref.evaluation.assess.protocol import assess
from mimref.evaluation.config import InterpolateConfig
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.features import opening
from mimref.features.config import CacheConfig
from tests.cli.test_channels import write_images as write_channels
from tests.tiny import ARCHITECTURE, write_images, write_labelled, write_unlabelled, write_weights


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("ends")
    return write_weights(folder / "base.safetensors"), write_weights(folder / "refined.safetensors", seed=1)


def test_averages_equal_a_plain_loop_and_have_a_knn(
    ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_labelled(tmp_path / "data")
    line = ["interpolate", *map(str, ends), "--alpha", "0,0.3,1", "--data", str(images), "--out", str(tmp_path / "out")]
    opened: list[str] = []

    def counting(data: DataConfig, split: Split, **options: Any) -> ImageSource:
        opened.append(split)
        return open_source(data, split, **options)

    monkeypatch.setattr(opening, "open_source", counting)
    assert run([*line, "--device", "cpu", "--workers", "0", "--quiet"]) == 0
    assert opened == ["train", "val"]
    base, refined = (read_checkpoint(path).tensors for path in ends)
    for alpha in (0.0, 0.3, 1.0):
        made = read_checkpoint(tmp_path / "out" / f"alpha-{alpha:g}.safetensors")
        assert made.header["interpolated"]["alpha"] == alpha and made.architecture == ARCHITECTURE
        for name, tensor in made.tensors.items():
            expected = (1 - alpha) * base[name].double() + alpha * refined[name].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=0 if alpha in (0, 1) else 1e-6)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert [(row["metric"], row["alpha"]) for row in rows] == [("knn_top1", 0.0), ("knn_top1", 0.3), ("knn_top1", 1.0)]
    assert 0 <= rows[1]["value"] <= 100
    left_out = images / "train" / "a" / "000.png"
    left_out.write_bytes(b"no image")
    assert run([*line, "--device", "cpu", "--workers", "0", "--quiet", "--force"]) == 0
    (bad,) = json.loads((tmp_path / "out" / "results.json").read_text())["bad_images"]
    assert bad["path"] == str(left_out)


def test_what_is_assumed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0)  # has two heads
    torch.save(vit.state_dict(), tmp_path / "foreign.pth")
    foreign = str(tmp_path / "foreign.pth")
    for command in (["interpolate", foreign, foreign], ["export", foreign, "--to", "timm"]):
        out = tmp_path / f"{command[0]}.safetensors"
        assert run([*command, "--out", str(out)]) == 0
        assert "1 attention heads are assumed" in capsys.readouterr().err
    heads = ["--num-heads", "2"]
    assert run(["export", foreign, "--to", "timm", "--out", str(tmp_path / "two.safetensors"), *heads]) == 0
    assert "heads are assumed" not in capsys.readouterr().err
    made = read_checkpoint(tmp_path / "two.safetensors").architecture
    assert made is not None and made.num_heads == 2
    with pytest.warns(UserWarning, match="1 attention heads are assumed"):
        mimref.load(foreign)
    assert mimref.load(foreign, num_heads=2).model.blocks(torch.zeros(1, 3, 160, 160), [1])


def test_without_data_only_weights_are_written(
    ends: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["interpolate", *map(str, ends), "--out", str(tmp_path / "out")]
    assert run(line) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith(f"5 encoders in {tmp_path / 'out'}\n")
    assert len(list((tmp_path / "out").glob("alpha-*.safetensors"))) == 5
    assert run(line) == 2
    assert "holds results" in capsys.readouterr().err
    assert run([*line, "--force"]) == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (replace(ARCHITECTURE, depth=3), "depth 3 and 4"),
        (replace(ARCHITECTURE, num_heads=1), "num_heads 1 and"),
        (replace(ARCHITECTURE, image_size=32), "image_size 32 and 16"),
    ],
)
def test_encoders_of_different_kinds(
    changes: Architecture, told: str, ends: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_weights(tmp_path / "other.safetensors", architecture=changes)
    assert run(["interpolate", str(other), str(ends[1]), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "are encoders of different kinds" in message and told in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", ["0,x", "1.5", "-0.1", ""])
def test_shares_that_are_none(
    alpha: str, ends: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["interpolate", *map(str, ends), f"--alpha={alpha}", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "alpha" in message and message.count("\n") == 1


# --- --choose


def chosen(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows, and the `interpolated` entry in the header of the only encoder written."""
    assert sorted(path.name for path in out.iterdir()) == ["encoder.safetensors", "results.csv", "results.json"]
    rows = json.loads((out / "results.json").read_text())["metrics"]
    return rows, read_checkpoint(out).header["interpolated"]


def average_file(ends: tuple[Path, Path], file: Path, alpha: float) -> Path:
    """Write an average computed by a plain loop."""
    base, refined = (read_checkpoint(path) for path in ends)
    encoder = build_encoder(ARCHITECTURE)
    mixed = {key: torch.lerp(base.tensors[key], refined.tensors[key], alpha) for key in refined.tensors}
    encoder.vit.load_state_dict(mixed)
    save_encoder(file, encoder, {"source": "mae"})
    return file


def test_chosen_by_knn_on_held_out_images(ends: tuple[Path, Path], tmp_path: Path) -> None:
    images, out, alphas = write_labelled(tmp_path / "data"), tmp_path / "out", (0.0, 0.3, 0.6, 1.0)
    line = ["interpolate", *map(str, ends), "--alpha", "0,0.3,0.6,1", "--data", str(images), "--out", str(out)]
    assert run([*line, "--choose", "knn", "--device", "cpu", "--workers", "0", "--quiet"]) == 0
    rows, facts = chosen(out)
    train, val = (open_source(DataConfig(spec=str(images)), split, need_labels=True) for split in ("train", "val"))
    assert train.labels is not None
    kept, held = train_test_split(np.arange(48), test_size=0.2, stratify=train.labels, random_state=0)
    expected, validation = [], []
    for alpha in alphas:
        file = average_file(ends, tmp_path / f"{alpha:g}.safetensors", alpha)
        common = {"checkpoint": str(file), "device": "cpu", "workers": 0, "cache": CacheConfig(folder="off")}
        for found, (first, second) in (
            (expected, (Subset(train, np.sort(kept)), Subset(train, np.sort(held)))),
            (validation, (train, val)),
        ):
            config = KnnConfig(**common, data=DataConfig(spec=str(images)))
            found.append(evaluate_knn(config, sources={"train": first, "val": second}).rows[0]["value"])
    best = int(np.argmax(expected))
    assert [(row["alpha"], row["value"], row["images"]) for row in rows[:4]] == [
        (alpha, value, "held out") for alpha, value in zip(alphas, expected, strict=True)
    ]
    assert facts["alpha"] == alphas[best] and facts["chosen_by"] == "knn"
    (last,) = rows[4:]
    assert (last["alpha"], last["value"], last["images"]) == (alphas[best], validation[best], "validation")


def test_chosen_by_the_measure_of_assess(ends: tuple[Path, Path], tmp_path: Path) -> None:
    images, out, alphas = write_unlabelled(tmp_path / "data"), tmp_path / "out", (0.0, 0.5, 1.0)
    line = ["interpolate", *map(str, ends), "--alpha", "0,0.5,1", "--data", str(images), "--out", str(out)]
    assert run([*line, "--choose", "assess", "--device", "cpu", "--workers", "0", "--quiet"]) == 0
    rows, facts = chosen(out)
    expected = []
    for alpha in alphas:
        file = average_file(ends, tmp_path / f"{alpha:g}.safetensors", alpha)
        config = AssessConfig(
            checkpoints=[str(file)],
            device="cpu",
            workers=0,
            data=DataConfig(spec=str(images)),
            cache=CacheConfig(folder="off"),
        )
        expected += [row["value"] for row in assess(config).rows if row["metric"] == "neighbour_consistency"]
    assert [row["value"] for row in rows] == expected and {row["images"] for row in rows} == {"training"}
    assert facts["alpha"] == alphas[int(np.argmax(expected))] and facts["chosen_by"] == "assess"


@pytest.mark.parametrize(("choose", "channels"), [("knn", 3), ("assess", 3), ("knn", 4)])
def test_the_choice_does_not_read_validation_images(
    choose: str, channels: int, ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, decode = list[str](), sources.decode_file
    if channels == 3:
        images = write_labelled(tmp_path / "data")
    else:
        images, wide = write_channels(tmp_path / "data", channels, "npy"), replace(ARCHITECTURE, channels=channels)
        base, refined = (write_weights(tmp_path / f"{n}.safetensors", seed=n, architecture=wide) for n in (0, 1))
        ends = base, refined

    def watched(path: str, *args: Any) -> Any:
        reads.append(path)
        return decode(path, *args)

    for validated in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(sources, "decode_file", watched)
            patch.setattr(opening, "check_readable", lambda *_: None)  # it reads the first image
            if not validated:
                patch.setattr(module, "_validate", lambda *_: ([], []))
            config = InterpolateConfig.model_validate(
                {"base": str(ends[0]), "refined": str(ends[1]), "alpha": [0.0, 1.0], "choose": choose, "workers": 0}
                | {"data": {"spec": str(images)}, "device": "cpu"}
            )
            module.interpolate(config, tmp_path / str(validated))
        assert any("/train/" in path for path in reads)
        assert any("/val/" in path for path in reads) == validated


def test_mistakes_of_choices(ends: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["interpolate", *map(str, ends), "--out", str(tmp_path / "out"), "--choose"]
    assert run([*line, "knn"]) == 2
    assert "no images: pass --data" in capsys.readouterr().err
    few = write_images(tmp_path / "few", per_class=1, split="train")
    write_images(few, per_class=1, split="val")
    assert run([*line, "knn", "--data", str(few)]) == 2
    assert "--choose knn: " in capsys.readouterr().err
    assert run([*line, "best", "--data", str(few)]) == 2
    assert "--choose best: expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("choose", [None, "assess"])
def test_files_in_the_folder_are_kept(choose: str | None, tmp_path: Path) -> None:
    ends = {
        "base": str(write_weights(tmp_path / "a.safetensors")),
        "refined": str(tmp_path / "mine/encoder.safetensors"),
    }
    (tmp_path / "mine").mkdir()
    name = "encoder.safetensors" if choose else "alpha-0.5.safetensors"
    write_weights(tmp_path / "mine" / "encoder.safetensors", seed=1)
    content = (tmp_path / "mine" / "encoder.safetensors").read_bytes()
    (tmp_path / "mine" / "alpha-0.5.safetensors").write_bytes(b"precious")
    config = load.validated(InterpolateConfig, ends | {"alpha": [0.5], "choose": choose, "data": {"spec": "digits"}})
    with pytest.raises(OutputError, match=name):
        module.interpolate(config, tmp_path / "mine")
    with pytest.raises(OutputError, match="one of the encoders") if choose else nullcontext():
        own = config.data if choose else DataConfig()
        module.interpolate(config.model_copy(update={"data": own}), tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "encoder.safetensors").read_bytes() == content
    kept = (tmp_path / "mine" / "alpha-0.5.safetensors").read_bytes() == b"precious"
    assert kept == bool(choose)  # --force replaces what it names, and never an input


def test_weights_of_unknown_architecture_have_that_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "list_models", lambda *_, **__: ["test_convnext"])  # building all takes seconds
    torch.manual_seed(0)
    model: Any = timm.create_model("test_convnext", num_classes=10)
    foreign = tmp_path / "foreign.pth"
    torch.save(model.state_dict(), foreign)
    own = tmp_path / "refined.safetensors"
    architecture = find_architecture("test_convnext", None, None)
    save_encoder(own, encoder_from(read_checkpoint(foreign), architecture), {"data": {"spec": "digits"}})
    line = ["interpolate", str(foreign), str(own), "--alpha", "0.5"]
    assert run([*line, "--out", str(tmp_path / "out")]) == 0
    made, start = (read_checkpoint(path).tensors for path in (tmp_path / "out/alpha-0.5.safetensors", foreign))
    assert made and all(torch.equal(tensor, start[name]) for name, tensor in made.items() if name in start)
    line[2] = str(foreign)
    capsys.readouterr()
    assert run([*line, "--out", str(tmp_path / "both")]) == 2
    assert "--arch test_convnext" in capsys.readouterr().err
    assert run([*line, "--out", str(tmp_path / "both"), "--arch", "test_convnext"]) == 0


def test_channels_are_adapted_as_asked(
    ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    measure = module.evaluate_knn

    def watching(config: KnnConfig, **options: Any) -> Any:
        asked.append((config.encoder.channel_init, config.encoder.color_channels))
        return measure(config, **options)

    monkeypatch.setattr(module, "evaluate_knn", watching)
    images = write_channels(tmp_path / "data", 4, "npy")
    line = [
        "interpolate",
        *map(str, ends),
        "--alpha",
        "0.5",
        "--data",
        str(images),
        "--channels",
        "4",
        "--workers",
        "0",
    ]
    assert run([*line, "--set", "encoder.channel_init=sum", "--out", str(tmp_path / "out")]) == 0
    assert asked == [("sum", None)]


@pytest.mark.parametrize("choose", [None, "assess"])
def test_a_failure_leaves_no_averages(
    choose: str | None, ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"base": str(ends[0]), "refined": str(ends[1])}
    images = {"data": {"spec": str(write_labelled(tmp_path / "data"))}, "workers": 0}
    config = load.validated(InterpolateConfig, files | images | {"alpha": [0.5], "choose": choose})
    with monkeypatch.context() as patched:
        patched.setattr(module, "evaluate_knn", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module.interpolate(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / ".averages-killed").mkdir(parents=True)
    module.interpolate(config, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))
    name = "encoder.safetensors" if choose else "alpha-0.5.safetensors"
    (tmp_path / "other" / name).mkdir(parents=True)
    with pytest.raises(OutputError, match="is a folder"):
        module.interpolate(config, tmp_path / "other", force=True)


def test_alphas_with_the_same_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected each value once"):
        load.validated(InterpolateConfig, {"base": "a", "refined": "b", "alpha": [0.1234567, 0.1234568]})
