"""Mistakes on the command line: all that can be found early are listed together, in the user's words."""

import ast
import re
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import mimref
from mimref.cli import COMMANDS, TOOLS, app, run
from mimref.cli.options import Configured
from mimref.config.base import CommandConfig
from mimref.config.load import setting_fields
from mimref.encoders.vit import Encoder
from mimref.errors import Checks, ConfigError, DataError, Typed, UserErrors
from mimref.evaluation.assess.config import AssessConfig
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.evaluation.cluster.config import ClusterConfig
from mimref.evaluation.config import CompareConfig, InterpolateConfig
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.evaluation.lowshot.config import LowshotConfig
from mimref.evaluation.probe.config import ProbeConfig
from mimref.evaluation.search.config import SearchConfig
from mimref.features.config import ExtractConfig
from mimref.pretraining.config import PretrainConfig
from mimref.pretraining.run import pretrain
from mimref.refinement.config import RefineConfig
from mimref.refinement.run import refine
from mimref.reproduce.config import AblationsConfig
from mimref.transfer.finetune.config import FinetuneConfig, PredictConfig
from mimref.transfer.robustness.config import RobustnessConfig
from mimref.transfer.segment.config import SegmentConfig
from mimref.transfer.suite.config import SuiteConfig
from tests.tiny import pretrain_config, write_labelled

MODELS: dict[str, type[CommandConfig]] = {
    model.command: model
    for model in (
        *(RefineConfig, PretrainConfig, KnnConfig, LowshotConfig, ClusterConfig, ProbeConfig),
        *(BlocksConfig, AssessConfig, CompareConfig, ExtractConfig, InterpolateConfig, SearchConfig),
        *(FinetuneConfig, PredictConfig, SuiteConfig, RobustnessConfig, SegmentConfig),
    )
} | {"ablations": AblationsConfig}
"""Config by command name; a command in a group has its own name only."""

# Command line -> a part of every line of its error, in order. `{base}` and `{data}` are files that exist.
LISTS = {
    "refine --weights gone.pth": ("gone.pth: no such file",),
    "refine --weights gone.pth --data nowhere --batch-size x --set foo=1 --out done": (
        "gone.pth",
        "--data nowhere",
        "--batch-size x: expected a whole number",
        "'foo'",
        "done: holds a finished run",
    ),
    "refine --preset quickstart --weights {base} --data {data} --heads 9 --micro-batch 2000 --heads-from gone": (
        "gone",
        "heads 9 does not fit: the encoder has blocks 1 to 4",
        "--micro-batch 2000 exceeds batch_size",
    ),
    "refine --preset quickstart --weights {base} --data {data} --heads 9 --strict": (
        "heads 9 does not fit: the encoder has blocks 1 to 4",
        "batch_size 128",
        "views.local_size 12",
        "heads.queue_size 1024",
    ),
    # Settings that a recipe would derive are not reported as mistakes.
    "refine --weights {base} --data nowhere --source d2v2": ("--data nowhere",),
    "refine --source mae": ("--source",),
    "refine --preset mae_l61 --weights gone.pth --data unreadable": (
        "gone.pth",
        "train/a/0.png (not an image)",
        "'mae_l61'",
    ),
    # Nothing is downloaded for a line that cannot run.
    "refine --arch vit_l16 --source mae --data nowhere": ("--data nowhere",),
    "pretrain --objective simmin --set mae.lr=1 --set simmim.lr=0": ("--objective simmin", "simmim.lr = 0"),
    "pretrain --data nowhere --arch swin --epochs 0 --out done": ("'swin'", "--data nowhere", "--epochs 0", "done"),
    "knn gone.pth --data nowhere --k ten --precision bf17 --set foo.bar=1 --set seed --out done": (
        "gone.pth",
        "--data nowhere",
        "--k ten",
        "--precision bf17",
        "'foo.bar'",
        "'seed'",
        "done",
    ),
    "knn gone.pth --data {data} --k 49": ("gone.pth", "--k 49"),
    "knn {base} --data unreadable --k 49 --blocks 9": (
        "--blocks 9",
        "train/a/0.png (not an image)",
        "val/a/0.png (not an image)",
        "--k 49",
    ),
    "knn --features gone.npz lost.npz --out done": ("gone.npz", "lost.npz", "done"),
    "lowshot gone.pth --data {data} --shots 25": ("gone.pth", "25 shots"),
    "lowshot {base} --data {data} --split-file gone.txt --blocks 9": ("--blocks 9", "gone.txt"),
    "cluster gone.pth --data {data} --classes a,z --metrics nmj --umap x.jpg": (
        "gone.pth",
        "'z'",
        "--umap x.jpg",
        "'nmj'",
    ),
    "probe gone.pth --data nowhere --epochs -1 --select x --resume": (
        "gone.pth",
        "--data nowhere",
        "--epochs -1",
        "--select x",
        "--resume",
    ),
    "compare gone.pth lost.pth --data {data} --shots 99 --metrics nmj --set probe.epochs=0": (
        "gone.pth",
        "lost.pth",
        "99 shots",
        "'nmj'",
        "probe.epochs = 0",
    ),
    "knn gone.pth --data nowhere --device cpu --set data.decode=device": (
        "gone.pth",
        "--data nowhere",
        "data.decode device needs CUDA",
    ),
    "refine --preset quickstart --weights {base} --data {data} --device cpu --set data.decode=device": (
        "data.decode device needs CUDA",
    ),
    "assess gone.pth {base} --data nowhere --blocks 9 --k 0 --measure rank": (
        "gone.pth",
        "block 9",
        "--data nowhere",
        "--measure rank",
        "--k 0",
    ),
    "analyze-blocks gone.pth lost.pth --data {data} --k 49": ("gone.pth", "lost.pth", "--k 49"),
    "search gone.pth --data nowhere --query a.png --k 0 --split test --out done": (
        "gone.pth",
        "nowhere",
        "--k 0",
        "--split test",
        "done",
    ),
    "search {base} --data {data} --query a.png b.png --blocks all --out done": ("--blocks all", "a.png", "done"),
    "cluster {base} --data {data} --clusters 16 --metrics nmj": ("--clusters 16", "'nmj'"),
    "knn gone.pth --data {data} --retrieval --set recall_at=49": ("gone.pth", "recall_at 49"),
    "extract gone.pth --data nowhere --split test --out x.csv": ("gone.pth", "nowhere", "--split test", "--out x.csv"),
    "interpolate gone.pth lost.pth --data nowhere --alpha 3 --out done": (
        "gone.pth",
        "lost.pth",
        "--alpha 3",
        "--data nowhere",
        "done",
    ),
    "export gone.pth --to timm --blocks 1 --out x.txt": ("gone.pth", "--out x.txt", "--blocks 1"),
}


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "unreadable" / split / "a").mkdir(parents=True)
        (tmp_path / "unreadable" / split / "b").mkdir()
        for name in ("a/0.png", "b/1.png"):
            (tmp_path / "unreadable" / split / name).write_bytes(b"no image")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "results.json").write_text("{}")
    return folder


@pytest.mark.parametrize("line", LISTS)
def test_all_mistakes_are_listed(
    line: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "blocks", None)  # no image reaches an encoder
    words = line.format(base=here / "base.safetensors", data=here / "data").split()
    assert run(words) == 2
    captured = capsys.readouterr()
    lines = [text.removeprefix("mimref: error: ") for text in captured.err.splitlines()]
    assert captured.out == "" and len(lines) == len(LISTS[line]), captured.err
    assert [part for part, text in zip(LISTS[line], lines, strict=True) if part not in text] == [], captured.err
    assert sorted(path.name for path in Path().iterdir()) == ["done", "unreadable"]


def test_python_gets_one_exception(here: Path, tmp_path: Path) -> None:
    settings = {"checkpoint": "gone.pth", "k": [49], "data": {"spec": str(here / "data")}}
    with pytest.raises(UserErrors) as caught:
        evaluate_knn(KnnConfig.model_validate(settings))
    assert [str(error).partition(" ")[0] for error in caught.value.errors] == ["gone.pth:", "k"]
    assert str(caught.value) == "\n".join(map(str, caught.value.errors))
    with pytest.raises(UserErrors) as caught:
        refine(
            RefineConfig.model_validate({"encoder": {"weights": "gone.pth"}, "data": {"spec": "nowhere"}}), Path("done")
        )
    assert len(caught.value.errors) == 3
    with pytest.raises(UserErrors) as caught:
        pretrain(pretrain_config(here / "data", batch_size=49, device="cuda"), Path("done"))
    assert len(caught.value.errors) == 3 - torch.cuda.is_available()


def test_images_are_tried_until_one_can_be_read(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_labelled(tmp_path / "data")
    for path in sorted(data.rglob("*.png"))[:3]:
        path.write_bytes(b"no image")
    line = ["knn", str(here / "base.safetensors"), "--data", str(data)]
    assert run(line) == 0
    assert "3 of 48 training images" in capsys.readouterr().err
    assert run([*line, "--set", "data.max_bad=2", "--blocks", "9"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "--blocks 9" in first and "3 images" in second and "data.max_bad=2" in second


# --- names


def every_option() -> Iterator[tuple[str, type[Configured], str, str]]:
    commands = [*COMMANDS.values(), *(commands.values() for _, commands in TOOLS.values())]
    for function in (function for panel in commands for function in panel):
        (group,) = (parameter.annotation for parameter in signature(function).parameters.values())
        if issubclass(group, Configured):
            for field, (option, _) in group.declared().items():
                if option.sets and not option.positional:
                    yield function.__name__, group, field, option.name(field)


def test_an_option_is_called_as_the_user_typed_it() -> None:
    refused = 0
    for name, group, field, flag in every_option():
        model = MODELS.get(name.replace("_", "-"), RefineConfig)  # benchmarks have the settings of refine
        options = group(**dict.fromkeys(group.declared()))
        required = {"base": "x", "refined": "y" if model is InterpolateConfig else ["y"]}
        options.__dict__.update({key: value for key, value in required.items() if key in model.model_fields})
        options.__dict__[field] = "?!"
        options.load(model)
        if not options.checks.passed and field != "heads_from":  # refine sets the matching stage
            refused += 1
            with pytest.raises(ConfigError) as caught:
                options.checks.finish()
            assert str(caught.value).startswith(f"{flag} ?!: expected "), (name, flag)
    assert refused > 80


def test_checks() -> None:
    checks = Checks(["a", "b", "sets"], {"b": Typed("--bee", "3", "1,2"), "c": Typed("--sea", "x", "")})

    def fail(message: str) -> int:
        raise DataError(message)

    assert checks.run("a", lambda: 3) == 3 and checks.passed
    assert checks.run("z", lambda: fail("of --set")) is None
    assert checks.run("b", lambda: fail("b 3 is more than b = 3, not b 30 or a.b 3")) is None
    assert checks.run("a", lambda: fail("c 'x' is no axis")) is None
    assert checks.run("b", lambda: fail("of --set")) is None  # already listed
    checks.unusable.add("d")
    assert checks.run("d", lambda: fail("never run")) is None
    with pytest.raises(UserErrors) as caught:
        checks.finished(1)
    assert str(caught.value).splitlines() == [
        "--sea x is no axis",
        "--bee 3 is more than --bee 3, not b 30 or a.b 3",
        "of --set",
    ]
    assert {type(error) for error in caught.value.errors} == {DataError}


def names_in_messages() -> Iterator[tuple[str, str]]:
    """Yield the options and dotted settings in the package's strings, with their places; docstrings are skipped."""
    for path in sorted(Path(mimref.__path__[0]).rglob("*.py")):
        tree = ast.parse(path.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                for name in re.findall(
                    r"(?<![\w-])--[a-z][a-z-]*|--set [a-z_.]+|(?<![\w./`'])[a-z_]+(?:\.[a-z_]+)+", node.value
                ):
                    yield name, f"{path.relative_to(Path(mimref.__path__[0]))}:{node.lineno}"


def test_messages_name_options_and_settings_that_exist() -> None:
    def parameters(command: Any) -> Iterator[str]:
        for parameter in command.params:
            yield from (*parameter.opts, *parameter.secondary_opts)
        for below in getattr(command, "commands", {}).values():
            yield from parameters(below)

    # Options of torchrun, containers, pip and pytest.
    others = {"--max-restarts", "--shm-size", "--no-build-isolation", "--junitxml"}
    options = {*parameters(get_command(app)), "--help", *others}
    settings = {key for model in MODELS.values() for key in setting_fields(model)}
    sections = {key.partition(".")[0] for key in settings if "." in key}
    found = dict(names_in_messages())
    assert len(found) > 100
    for name, place in found.items():
        if name.startswith("--set "):
            assert name.removeprefix("--set ") in settings, (name, place)
        elif name.startswith("--"):
            assert name in options, (name, place)
        elif name.partition(".")[0] in sections and not name.endswith(FILES) and TENSORS not in place:
            assert name in settings, (name, place)


TENSORS = "encoders/families/"
"""Dotted names in this folder are names of tensors in foreign files."""
FILES = (".pkl", ".png", ".csv", ".html", ".md", ".json", ".pt", ".pth", ".safetensors", ".npz")


@pytest.mark.parametrize("command", ["cluster", "probe --cached --set probe.select=val-split"])
def test_an_only_class_is_named_once(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "data" / "val"
    rows = [f"{path},cat,{split}" for path in sorted(folder.rglob("*.png"))[:4] for split in ("train", "val")]
    Path("cats.csv").write_text("\n".join(["path,label,split", *rows]))
    assert run([*command.split(), str(here / "base.safetensors"), "--data", "list:cats.csv"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "class cat" in line
