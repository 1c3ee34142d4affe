"""`mimref transfer` on the command line: tables, files, exit codes, and the suite in the documentation."""

import re
from pathlib import Path

import pandas as pd
import pytest

from mimref.cli import run
from mimref.config.load import load_config
from mimref.errors import Checks
from mimref.transfer.suite.config import SuiteConfig
from mimref.transfer.suite.plan import plan_entries
from tests.tiny import results

CHEAP = ["--device", "cpu", "--workers", "0"]


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    lines = ["resolution = 16"]
    for name, k in (("near", 3), ("far", 20)):
        lines += ["[[entries]]", f'name = "{name}"', f'data = "{folder / "data"}"', 'protocol = "knn"']
        lines += [f"settings.k = [{k}]"]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(lines))
    return path


def line(folder: Path, file: Path, *more: str) -> list[str]:
    models = [str(folder / f"{name}.safetensors") for name in ("base", "refined")]
    return ["transfer", *models, "--suite", str(file), *CHEAP, *more]


def test_two_encoders(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(line(folder, file)) == 0
    printed = capsys.readouterr()
    assert all(word in printed.out for word in ("near", "far", "average", "average rank", "refined.safetensors"))
    out = tmp_path / "runs" / "transfer-mine"
    table = pd.read_csv(out / "results.csv")
    assert list(table.metric) == ["knn_top1"] * 4 + ["suite_average"] * 2 + ["suite_rank"] * 2
    assert list(table.entry[:4]) == ["near", "near", "far", "far"] and list(table.k[:4]) == [3, 3, 20, 20]
    assert (out / "suite.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "results.md").read_text().splitlines()
    assert text[0] == "| | base.safetensors | refined.safetensors |"
    assert [row.split(" | ")[0] for row in text[2:]] == ["| near", "| far", "| average", "| average rank"]
    assert run(line(folder, file)) == 2
    assert "--resume" in capsys.readouterr().err
    before = (out / "results.csv").read_bytes()
    # With --resume, neither encoders nor suite have to be repeated.
    assert run(["transfer", "--resume", "--out", str(out)]) == 0
    assert capsys.readouterr().out == printed.out and (out / "results.csv").read_bytes() == before


def test_a_resumed_suite_takes_only_entries_from_another_file(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert run(line(folder, file, "--seed", "3", "--out", out)) == 0
    bigger = tmp_path / "bigger.toml"
    added = f'[[entries]]\nname = "new"\ndata = "{folder / "data"}"\nprotocol = "knn"\nsettings.k = [5]\n'
    bigger.write_text("workers = 0\nresolution = 8\n" + file.read_text().partition("\n")[2] + "\n" + added)
    capsys.readouterr()
    assert run(["transfer", "--suite", str(bigger), "--resume", "--out", out]) == 0
    assert f"{bigger}: resolution not read" in capsys.readouterr().err
    for model in ("base", "refined"):
        config = results(tmp_path / "out" / "new" / f"{model}.safetensors")["config"]
        assert (config["seed"], config["resolution"], config["device"]) == (3, 16, "cpu")
    assert len([row for row in results(tmp_path / "out")["metrics"] if "entry" in row]) == 6
    assert run(["transfer", "--resume", "--seed", "4", "--out", out]) == 2
    assert "seed was 3 and is now 4" in capsys.readouterr().err
    bigger.write_text("entries = 3")
    assert run(["transfer", "--suite", str(bigger), "--resume", "--out", out]) == 2
    assert "bigger.toml: entries" in capsys.readouterr().err


def test_the_rank_is_better_when_it_is_lower(folder: Path, file: Path, tmp_path: Path) -> None:
    assert run(line(folder, file, "--out", str(tmp_path / "out"))) == 0
    ranks = {
        row["model"]: row["value"] for row in results(tmp_path / "out")["metrics"] if row["metric"] == "suite_rank"
    }
    (shown,) = (row for row in (tmp_path / "out" / "results.md").read_text().splitlines() if "average rank" in row)
    cells = dict(zip(ranks, (cell.strip() for cell in shown.split("|")[2:4]), strict=True))
    best = min(ranks.values())
    for model, rank in ranks.items():
        assert cells[model].lstrip("*").startswith(f"{rank:.1f}") and cells[model].startswith("**") == (rank == best)


def test_missing_data_is_exit_code_2_with_a_line_each(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = file.read_text()
    for name, spec in (("gone", str(tmp_path / "nowhere")), ("pets", "vtab:pets")):
        text += f'\n[[entries]]\nname = "{name}"\ndata = "{spec}"\nprotocol = "knn"\n'
    file.write_text(text)
    more = ["--set", f"data.root={tmp_path}", "--out", str(tmp_path / "out"), "--quiet"]
    assert run(line(folder, file, *more)) == 2
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert first.startswith("mimref: error: entry 'gone': ") and "nowhere" in first
    assert second.startswith("mimref: error: entry 'pets': ") and "data.download=true" in second
    assert "near" in captured.out and "gone" not in captured.out
    assert {row.get("entry") for row in results(tmp_path / "out")["metrics"]} == {"near", "far", None}


def test_without_a_suite_the_built_in_ones_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["transfer"], ["transfer", "quickstart", "--resume"]):
        assert run(words) == 2
        error = capsys.readouterr().err
        assert "--suite" in error and "vtab-natural" in error and "quickstart" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--suite", "vtab-naturel"], "did you mean 'vtab-natural'"),
        (["--suite", "gone.toml"], "gone.toml"),
        (["--suite", "quickstart", "--set", "probe.epochs=2"], "probe.epochs"),
        (["--suite", "quickstart", "--device", "gpu"], "--device gpu"),
        (["--suite", "quickstart", "--seed", "x"], "--seed x"),
    ],
)
def test_mistakes_are_one_line(
    more: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["transfer", *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []


def test_the_suite_in_the_documentation_loads(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "transfer.md").read_text()
    (text,) = re.findall(r"```toml title=\"small\.toml\"\n(.*?)```", page, re.DOTALL)
    (tmp_path / "small.toml").write_text(text)
    planned = plan_entries(load_config(SuiteConfig, str(tmp_path / "small.toml")), checks := Checks())
    checks.finish()
    assert {entry.config.data.spec for entry in planned} == {"digits", "fashion-mnist"}
    assert {entry.given.protocol for entry in planned} >= {"knn", "lowshot", "probe"}
