"""`mimref knn` from a checkpoint to rows: mimref's own files, MAE's layout, timm's state dicts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from mimref.cli import run
from mimref.config.base import DataConfig, ReadingConfig
from mimref.data.open import open_source
from mimref.data.transforms import EvalTransform
from mimref.encoders.checkpoints import save_encoder
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import CheckpointError, ConfigError, DataError, UserError
from mimref.evaluation.assess.config import AssessConfig
from mimref.evaluation.assess.protocol import assess
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.evaluation.blocks.protocol import evaluate_blocks
from mimref.evaluation.compare import compare_encoders
from mimref.evaluation.config import CompareConfig
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn, knn
from mimref.evaluation.lowshot.config import LowshotConfig
from mimref.evaluation.lowshot.protocol import evaluate_lowshot
from mimref.evaluation.probe.config import ProbeConfig, ProbeTrainingConfig
from mimref.evaluation.probe.protocol import evaluate_probe
from mimref.features.encode import PassSettings, block_groups, columns_of, extract
from mimref.features.inputs import model_name
from mimref.results import Row
from tests.tiny import write_images, write_labelled, write_unlabelled

TINY = Architecture("custom", 8, width=16, depth=5, num_heads=2, patch_size=4)


class Recorder:
    """A listener that records progress, notes and warnings."""

    def __init__(self) -> None:
        self.labels: dict[str, tuple[int, int]] = {}
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def progress(self, label: str, done: int, total: int) -> None:
        self.labels[label] = (done, total)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def make() -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(TINY)
    for parameter in encoder.parameters():
        parameter.data.normal_(std=0.2)
    return encoder.eval()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run on the digits, with its own transform."""
    folder = tmp_path_factory.mktemp("runs") / "refine-digits"
    header = {"data": {"spec": "digits", "train_limit": 300}, "transform": EvalTransform(8, 1.0).to_dict()}
    save_encoder(folder / "encoder.safetensors", make(), header)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 16 validation images of two classes."""
    return write_labelled(tmp_path_factory.mktemp("images"))


def config(checkpoint: Path | str, **values: Any) -> KnnConfig:
    return KnnConfig(**{"checkpoint": str(checkpoint), "device": "cpu", "workers": 0} | values)


def digits_features(block: int, pool: str = "cls") -> tuple[Any, Any, Any, Any]:
    data = DataConfig(spec="digits", train_limit=300)
    parts: list[Any] = []
    for split in ("train", "val"):
        source = open_source(data, split)  # type: ignore[arg-type]
        columns = columns_of([block], pool, False, 5)
        found = extract(make(), source, PassSettings(EvalTransform(8, 1.0), torch.device("cpu")), columns)
        parts += [found.matrix(columns)[:], found.y]
    return parts[0], parts[1], parts[2], parts[3]


def test_rows_of_listed_blocks(own: Path) -> None:
    result = evaluate_knn(config(own, blocks="5,2", pool="cls+mean", k=[1, 10], tau=[0.1]))
    expected = [
        {"model": "refine-digits", "metric": row["metric"], "value": row["value"], "blocks": block, "pool": "cls+mean"}
        | row
        for block in ("5", "2")
        for row in knn(*digits_features(int(block), "cls+mean"), k=[1, 10], tau=[0.1])
    ]
    assert result.rows == expected and len(expected) == 8
    assert list(result.rows[0]) == ["model", "metric", "value", "blocks", "pool", "k", "tau"]
    assert result.elapsed_s > 0
    assert result.frame["k"].tolist() == [row["k"] for row in expected] and result.frame["k"].dtype == "Int64"


def test_named_groups(own: Path) -> None:
    last = evaluate_knn(config(own))
    assert {row["blocks"] for row in last.rows} == {"last"}
    every = evaluate_knn(config(own, blocks="all"))
    assert [row["blocks"] for row in every.rows if row["metric"] == "knn_top1"] == ["1", "2", "3", "4", "5"]
    assert [row["value"] for row in every.rows if row["blocks"] == "5"] == [row["value"] for row in last.rows]
    four = evaluate_knn(config(own, blocks="last4")).rows
    parts = [digits_features(block) for block in (2, 3, 4, 5)]
    train_x, test_x = (torch.cat([torch.from_numpy(part[at]) for part in parts], 1).numpy() for at in (0, 2))
    expected = knn(train_x, parts[0][1], test_x, parts[0][3])
    assert [row["value"] for row in four] == [row["value"] for row in expected]
    assert {row["blocks"] for row in four} == {"last4"}


def test_one_encoder_pass_per_split(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    blocks = Encoder.blocks

    def counting(self: Encoder, images: torch.Tensor, *args: Any, **options: Any) -> list[torch.Tensor]:
        nonlocal seen
        seen += len(images)
        return blocks(self, images, *args, **options)

    monkeypatch.setattr(Encoder, "blocks", counting)
    evaluate_knn(config(own, blocks="all", k=[1, 5, 10]))
    assert seen == 300 + 360


def test_settings_beat_the_header(own: Path, images: Path) -> None:
    listener = Recorder()
    evaluate_knn(config(own, data=DataConfig(train_limit=50)), listener=listener)
    assert listener.labels["features of training images"] == (50, 50)
    evaluate_knn(config(own, data=DataConfig(spec=str(images)), resolution=12), listener=listener)
    assert listener.labels["features of training images"] == (48, 48)
    assert listener.labels["features of validation images"] == (16, 16)
    assert not listener.notes and not listener.warnings


def test_the_command_line(own: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    line = ["knn", str(own), "--k", "1,10,20", "--blocks", "all", "--out", str(out), "--device", "cpu"]
    assert run(line) == 0
    printed = capsys.readouterr().out
    assert "k-NN top-1" in printed
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    assert metrics == evaluate_knn(config(own, k=[1, 10, 20], blocks="all")).rows
    assert len(metrics) == 5 * 3 * 2
    assert (out / "results.csv").read_text().count("\n") == 31


def test_foreign_mae_files(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # In MAE's layout and a small size that timm knows: the paper's own files take hundreds of megabytes.
    torch.manual_seed(0)
    model: Any = timm.create_model("test_vit", num_classes=10)
    state = model.state_dict() | {"mask_token": torch.zeros(1, 1, 8), "decoder_pred.bias": torch.zeros(8)}
    torch.save({"model": state}, tmp_path / "mae_pretrain.pth")
    line = ["knn", str(tmp_path / "mae_pretrain.pth"), "--arch", "test_vit", "--resolution", "32"]
    line += ["--data", str(images), "--k", "3", "--device", "cpu", "--workers", "0", "--quiet"]
    assert run([*line, "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert [(row["model"], row["blocks"], row["k"]) for row in rows] == [("mae_pretrain.pth", "last", 3)]
    assert capsys.readouterr().err == ""
    # The file is recognised by its content, without --arch.
    assert run(["knn", str(tmp_path / "mae_pretrain.pth"), *line[4:]]) == 0
    torch.save({"model": state | {"extra": torch.zeros(2)}}, tmp_path / "other.pth")
    assert run(["knn", str(tmp_path / "other.pth"), "--data", str(images)]) == 2
    assert "other.pth: model.extra is unexpected; pass --arch (and --source)" in capsys.readouterr().err


def test_heads_that_weights_do_not_show(images: Path, tmp_path: Path) -> None:
    base: Any = timm.create_model("test_vit", num_classes=0)
    torch.save(base.state_dict(), tmp_path / "a.pth")
    settings: dict[str, Any] = {"k": [3], "resolution": 32, "data": DataConfig(spec=str(images))}
    listener = Recorder()
    guessed = evaluate_knn(config(tmp_path / "a.pth", **settings), listener=listener)
    assert sum("encoder.num_heads" in note for note in listener.notes) == 1
    given = config(tmp_path / "a.pth", encoder=ReadingConfig(num_heads=2), **settings)
    as_timm = config(tmp_path / "a.pth", arch="test_vit", **settings)
    for settled in (given, as_timm):
        listener = Recorder()
        evaluate_knn(settled, listener=listener)
        assert not any("num_heads" in note for note in listener.notes)
    assert guessed.rows[0]["model"] == "a.pth"


def test_other_backbones(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("test_convnext", num_classes=10)
    save_file(model.state_dict(), tmp_path / "convnext.safetensors")
    listener = Recorder()
    settings: dict[str, Any] = {"arch": "test_convnext", "resolution": 64, "data": DataConfig(spec=str(images))}
    result = evaluate_knn(config(tmp_path / "convnext.safetensors", blocks="all", k=[3], **settings), listener=listener)
    # Before timm 1.0.16 the stem counts as the first block.
    depth = 5 if timm.__version__ == "1.0.15" else 4
    assert [row["blocks"] for row in result.rows] == [str(number) for number in range(1, depth + 1)]
    assert len(listener.notes) == 1 and "test_convnext has no CLS token" in listener.notes[0]
    four = evaluate_knn(config(tmp_path / "convnext.safetensors", blocks="last4", k=[3], **settings))
    assert [row["blocks"] for row in four.rows] == ["last4"]
    # Rows record what was pooled, not what was asked for.
    common: dict[str, Any] = {"device": "cpu", "workers": 0, "pool": "cls+mean"} | settings
    path = str(tmp_path / "convnext.safetensors")
    other = shutil.copy(path, tmp_path / "other.safetensors")
    compared = CompareConfig(**common, base=path, refined=[str(other)], protocols=["knn"], k=3)
    for found in (
        result,
        evaluate_knn(config(path, k=[3], pool="cls+mean", **settings)),
        evaluate_blocks(BlocksConfig(**common, checkpoints=[path], k=3)),
        assess(AssessConfig(**common, checkpoints=[path])),
        compare_encoders(compared),
    ):
        assert found.rows and all(row["pool"] == "mean" for row in found.rows)
    with pytest.raises(ConfigError, match=f"block 6 does not exist; the encoder has blocks 1 to {depth}"):
        evaluate_knn(config(tmp_path / "convnext.safetensors", blocks="6", **settings))


def test_tagged_names_bring_their_normalisation(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "a.pth")
    means: list[Any] = []
    crop = EvalTransform.normalize

    def spying(self: EvalTransform, *args: Any, **options: Any) -> torch.Tensor:
        means.append(self.mean)
        return crop(self, *args, **options)

    monkeypatch.setattr(EvalTransform, "normalize", spying)
    for name in ("test_vit", "test_vit.r160_in1k"):
        evaluate_knn(config(tmp_path / "a.pth", arch=name, resolution=16, k=[1], data=DataConfig(spec=str(images))))
    assert means == [(0.485, 0.456, 0.406)] * 2 + [(0.5, 0.5, 0.5)] * 2


def test_unreadable_images_are_reported(own: Path, tmp_path: Path) -> None:
    folder = write_labelled(tmp_path)
    (folder / "train" / "b" / "003.png").write_bytes(b"")
    listener = Recorder()
    evaluate_knn(config(own, data=DataConfig(spec=str(folder))), listener=listener)
    assert len(listener.warnings) == 1
    assert listener.warnings[0].startswith("1 of 48 training images cannot be read")
    assert "003.png (empty file)" in listener.warnings[0]
    with pytest.raises(DataError, match=r"1 image could not be read, more than data\.max_bad=0"):
        evaluate_knn(config(own, data=DataConfig(spec=str(folder), max_bad=0)))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"blocks": "6"}, ConfigError, r"^--blocks 6: block 6 does not exist; the encoder has blocks 1 to 5$"),
        ({"blocks": "0,2"}, ConfigError, "block 0 does not exist"),
        ({"blocks": "first"}, ConfigError, "'first': expected last, last4, all or blocks such as 1,5,12"),
        ({"blocks": ""}, ConfigError, "expected last, last4, all"),
        ({"k": [10, 301]}, ConfigError, r"^k 301 is more than the 300 training images; choose a smaller k$"),
        ({"resolution": 9}, ConfigError, r"^--resolution 9 is not divisible by the patch size 4 of custom; .* 8$"),
        ({"arch": "vit_b16"}, ConfigError, r"^--arch vit_b16: .* custom; omit --arch$"),
        ({"device": "mps"}, ConfigError, "device 'mps' is not available"),
    ],
)
def test_settings_that_do_not_fit(
    own: Path, values: dict[str, Any], error: type[UserError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_now(*args: Any, **options: Any) -> None:
        raise AssertionError("the encoder ran before the settings were checked")

    monkeypatch.setattr(Encoder, "blocks", not_now)
    with pytest.raises(error, match=message):
        evaluate_knn(config(own, **values))


def test_data_that_do_not_fit(own: Path, tmp_path: Path) -> None:
    unlabelled = write_unlabelled(tmp_path / "plain")
    with pytest.raises(DataError, match="the train images have no labels"):
        evaluate_knn(config(own, data=DataConfig(spec=str(unlabelled))))
    # The limit leaves a class without training images.
    many = tmp_path / "many"
    for split in ("train", "val"):
        write_images(many, per_class=2, classes=("a", "b", "c"), split=split)
    with pytest.raises(DataError, match=r"^test: class c has no training image"):
        evaluate_knn(config(own, data=DataConfig(spec=str(many), train_limit=2), k=[1]))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataConfig]:
    """VTAB-1K as published, whose test images have a class without training images, and without that class."""
    found: dict[str, DataConfig] = {}
    for name, classes in (("lacking", "abc"), ("complete", "ab")):
        root = tmp_path_factory.mktemp(name)
        folder = root / "sun397"
        for part, of_part in (("train800val200", "ab"), ("test", classes)):
            write_images(folder, per_class=3 if part == "test" else 12, classes=of_part, split=part)
            images = sorted((folder / part).rglob("*.png"))
            lines = [f"{image.relative_to(folder)} {'abc'.index(image.parent.name)}\n" for image in images]
            (folder / f"{part}.txt").write_text("".join(lines))
        found[name] = DataConfig(spec="vtab1k:sun397", root=str(root))
    return found


@pytest.mark.parametrize("protocol", ["knn", "lowshot", "probe", "streamed", "compare", "blocks"])
def test_classes_that_published_splits_lack_are_errors(
    protocol: str, own: Path, published: dict[str, DataConfig]
) -> None:
    def rows(data: DataConfig) -> list[Row]:
        common: dict[str, Any] = {"data": data, "device": "cpu", "workers": 0}
        one: dict[str, Any] = {"checkpoint": str(own), **common}
        if protocol == "knn":
            return evaluate_knn(KnnConfig(**one, k=[3, 1], retrieval=True, recall_at=[1, 2])).rows
        if protocol == "lowshot":
            return evaluate_lowshot(LowshotConfig(**one, shots=[2], splits=1)).rows
        if protocol in ("probe", "streamed"):
            training = ProbeTrainingConfig(epochs=2, lr=[0.1], blocks="last")
            return evaluate_probe(ProbeConfig(**one, probe=training, cached=protocol == "probe")).rows
        if protocol == "compare":
            return compare_encoders(
                CompareConfig(**common, base=str(own), refined=["peak"], protocols=["knn"], k=3)
            ).rows
        found = evaluate_blocks(BlocksConfig(**common, checkpoints=[str(own)], k=3)).rows
        return [row for row in found if row["metric"] == "block_knn_top1"]

    lacking, complete = rows(published["lacking"]), rows(published["complete"])
    assert len(lacking) == len(complete) > 0
    for row, other in zip(lacking, complete, strict=True):
        assert float(row["value"]) == pytest.approx(float(other["value"]) * 2 / 3), row


def test_files_without_a_record_of_their_data(tmp_path: Path) -> None:
    save_encoder(tmp_path / "a.safetensors", make(), {})
    with pytest.raises(ConfigError, match=r"^no images: pass --data"):
        evaluate_knn(config(tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match="no such file"):
        evaluate_knn(config(tmp_path / "b.safetensors"))


def test_block_groups() -> None:
    assert block_groups("last", 12) == {"last": [12]}
    assert block_groups("last4", 12) == {"last4": [9, 10, 11, 12]}
    assert block_groups("all", 3) == {"1": [1], "2": [2], "3": [3]}
    assert block_groups("5, 1,5", 12) == {"5": [5], "1": [1]}
    with pytest.raises(ConfigError, match="the encoder has only 3 blocks"):
        block_groups("last4", 3)


def test_model_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_name("quickstart") == "quickstart"
    assert model_name("below/weights.pth") == "weights.pth"
    assert model_name(".") == tmp_path.name
