"""`mimref reproduce ablations`: the page, what is run again, failures; and a real suite that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimref.benchmarks import duration
from mimref.benchmarks.duration import Duration
from mimref.cli import TOOLS, run
from mimref.config.load import load_config
from mimref.refinement.config import RefineConfig
from mimref.refinement.run import refine
from mimref.reproduce import jobs
from mimref.reproduce.plan import Run
from tests.tiny import EVALUATED, REFINE, results, tensors, write_labelled, write_weights

# Stands in for the process of a run. Its accuracy depends only on its name, and it fails if BAD in the environment is
# that name. Runs of the second seed leave out an image.
STAND_IN = """
import json, os, pathlib, sys
name, command, folder = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
if os.environ.get("BAD") == name:
    sys.exit("12:00:00 error: the loss is not finite")
folder.mkdir(parents=True)
(folder / "heads.pt").touch()
knn = 75.0 + ("default" in name) - name.endswith("1") / 10
rows = [{"model": "refined", "metric": metric, "value": knn, "shots": 1} for metric in ("knn_top1", "lowshot_top1")]
if command == "analyze-blocks":
    rows = [{"metric": "block_knn_top1", "block": block, "value": knn + block} for block in (1, 2, 3, 4)]
bad = [{"path": "data/a|b.png", "reason": "empty file"}] if name.endswith("seed1") else []
document = {"command": command, "elapsed_s": 60.0, "metrics": rows, "bad_images": bad}
(folder / "results.json").write_text(json.dumps(document))
"""


def line(folder: Path, *more: str) -> list[str]:
    settings = REFINE | {"encoder.weights": str(folder / "base.safetensors"), "data.spec": str(folder / "data")}
    settings |= {key.replace("__", "."): value for key, value in EVALUATED.items()}
    settings |= {"heads_stage.epochs": 1, "encoder_stage.epochs": 1}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={str(value).lower()}")]
    sets = [part.replace(str(folder).lower(), str(folder)) for part in sets]
    return ["reproduce", "ablations", "--preset", "quickstart", *sets, "--out", str(folder / "out"), *more]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_weights(tmp_path / "base.safetensors")
    write_labelled(tmp_path / "data")
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that were started."""
    names: list[str] = []

    def command(run: Run) -> list[str]:
        names.append(run.name)
        return [sys.executable, "-S", "-c", STAND_IN, run.name, run.config.command, str(run.folder)]

    monkeypatch.setattr(jobs, "command", command)
    monkeypatch.delenv("BAD", raising=False)
    return names


def test_a_suite(folder: Path, started: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    assert run(line(folder, "--seeds", "0,1", "--tables", "a,e", "--jobs", "3")) == 0
    assert len(started) == len(set(started)) == 2 * (1 + 2 + 1) + 3
    printed, told = capsys.readouterr()
    assert told.count("data/a|b.png (empty file)") == 2 * (1 + 2 + 1) // 2 + 1 + 1  # for runs of seed 1, and at the end
    assert "warning: 1 unreadable image skipped: data/a|b.png (empty file)" in told
    assert "(a) Number of heads" in printed and "(e) Neighbours of negatives" in printed and "(b)" not in printed
    page = (out / "ablations.md").read_text()
    assert "| swapped | swapped | k-NN | 75.0 (74.9 to 75.0) | 80.9 | -1.0 (-1.0 to -1.0) | -0.1 |" in page
    assert "agrees: worse with all 2 seeds, worse by 0.1 in the paper." in page
    assert "Differences from the default: 4 agree with the paper's, 1 disagree." in page
    assert "The refined encoder is best at block 4." in page and "8 min of training" in page
    for theme in ("light", "dark"):
        assert f"blocks-{theme}.svg#only-{theme}" in page and (out / f"blocks-{theme}.svg").read_text().startswith(
            "<?xml"
        )
    assert results(out)["command"] == "reproduce ablations" and (out / "results.csv").is_file()
    assert "1 image could not be read." in page and "| data/a\\|b.png | empty file |" in page
    assert results(out)["bad_images"] == [{"path": "data/a|b.png", "reason": "empty file"}]
    # The same command runs nothing again; another table adds its runs.
    written = (out / "runs" / "default-seed0" / "results.json").stat().st_mtime_ns
    del started[:]
    assert run(line(folder, "--seeds", "0,1", "--tables", "a,e")) == 0 and started == []
    assert run(line(folder, "--seeds", "0,1", "--tables", "d")) == 0
    assert sorted({name.rpartition("-")[0] for name in started}) == ["d-frozen-1", "d-frozen-2"]
    assert (out / "runs" / "default-seed0" / "results.json").stat().st_mtime_ns == written
    page = (out / "ablations.md").read_text()
    assert "## (a)" in page and "## (d)" in page and "## (e)" in page
    # Another seed adds its runs of the tables asked for; the other lines keep their seeds.
    del started[:]
    assert run(line(folder, "--seeds", "2", "--tables", "e")) == 0
    assert sorted(started) == ["blocks-default-seed2", "default-seed2", "e-swapped-seed2"]
    page = (out / "ablations.md").read_text()
    assert "Seeds 0, 1, 2; " in page and "| swapped | swapped | k-NN | 75.0 (74.9 to 75.0) |" in page
    assert "agrees: worse with all 3 seeds" in page and "## (a)" in page
    assert "Lines of (a), (d) have fewer seeds." in page
    # --resume continues the last command, and not all combinations of seeds and tables.
    del started[:]
    assert run(["reproduce", "ablations", "--resume", "--out", str(out), "--quiet"]) == 0 and started == []
    assert "## (a)" in (out / "ablations.md").read_text()
    (out / "ablations.toml").write_text("seeds = 0")
    assert run(line(folder, "--seeds", "2", "--tables", "e")) == 2
    assert "ablations.toml" in capsys.readouterr().err
    assert run(line(folder, "--seeds", "0", "--tables", "e", "--force")) == 0
    assert "Seeds 0; " in (out / "ablations.md").read_text()
    del started[:]
    assert run(["reproduce", "ablations", "--resume", "--out", str(out), "--quiet"]) == 0 and started == []


def test_a_failed_run_is_named(
    folder: Path, started: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD", "e-swapped-seed0")
    words = line(folder, "--seeds", "0", "--tables", "e", "--quiet")
    assert run(words) == 1
    captured = capsys.readouterr()
    assert "run e-swapped-seed0: the loss is not finite; see " in captured.err and captured.err.count("error") == 1
    assert "- swapped (the paper's swapped): no results." in (folder / "out" / "ablations.md").read_text()
    monkeypatch.delenv("BAD")
    del started[:]
    assert run(words) == 0 and started == ["e-swapped-seed0"]


def test_folders_and_settings_that_do_not_fit(
    folder: Path, started: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = line(folder, "--seeds", "0", "--tables", "e", "--quiet")
    assert run([*words, "--resume"]) == 2
    assert "holds no suite to resume" in capsys.readouterr().err
    assert run(words) == 0
    del started[:]
    assert run([*words, "--set", "heads.temperature=0.4"]) == 2
    told = capsys.readouterr().err
    assert "default-seed0" in told and "heads.temperature: it was 0.3 and is now 0.4" in told and started == []
    (mine := folder / "out" / "runs" / "mine").mkdir()
    assert run([*words, "--set", "heads.temperature=0.4", "--force"]) == 0 and len(started) == 4
    assert mine.is_dir()  # --force replaces the suite's own runs
    for varied in ("loss.schedule=one_hot", "loss.swap_negatives=true", "encoder_stage.freeze_blocks=1"):
        assert run([*words, "--set", varied]) == 2
        assert "varied by the tables" in capsys.readouterr().err
    assert run([*words, "--set", "heads.blocks=2-3"]) == 2
    assert "heads.blocks ends at block 3" in capsys.readouterr().err
    other = folder / "other"
    (other / "runs").mkdir(parents=True)
    assert run([*words[:-1], "--out", str(other)]) == 2
    assert "already holds runs, and no suite" in capsys.readouterr().err


def test_tables_of_interrupted_calls_stay(
    folder: Path, started: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(folder)
    words = [word.replace(f"{folder}/", "") for word in line(folder, "--seeds", "0", "--quiet")]
    with monkeypatch.context() as patched:
        patched.setattr("mimref.reproduce.run.run_jobs", interrupted)
        for tables in ("a,e", "d"):
            assert run([*words, "--tables", tables]) == 130
    # The settings name the same files from any folder.
    monkeypatch.chdir("/")
    assert run(["reproduce", "ablations", "--resume", "--out", str(folder / "out"), "--quiet"]) == 0
    assert results(folder / "out")["config"]["tables"] == ["a", "d", "e"]
    assert {name.partition("-")[0] for name in started} == {"default", "d", "blocks"}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run([*words[:-1], "--resume"]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_a_dry_run_lists_runs_and_their_time(
    folder: Path, started: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Duration(0.1, 0.1, 600.0, 1200.0, 60.0)
    measured: list[RefineConfig] = []

    def measure(plan: object) -> Duration:
        measured.append(plan.config)  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(duration, "measure_duration", measure)
    assert run(line(folder, "--seeds", "0,1", "--tables", "c,e", "--jobs", "2", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "default-seed0" in printed and "about 31 min" in printed
    assert "c-one_hot-seed1" in printed and "about 21 min, stage 1 from default-seed1" in printed
    # Two defaults, two swapped, eight schedules: 4 * 31 + 8 * 21 minutes, two at a time.
    assert "12, 2 at the same time" in printed and "about 2.4 h" in printed
    assert len(measured) == 1 and started == [] and not (folder / "out").exists()


@pytest.mark.slow
def test_a_killed_suite_continues(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed after its first run and repeated, it gives what `mimref refine` gives, and leaves no process behind."""
    words = line(folder, "--seeds", "0", "--tables", "d,e", "--jobs", "2")
    process = subprocess.Popen([sys.executable, "-m", "mimref", *words], stderr=subprocess.DEVNULL)
    first = folder / "out" / "runs" / "default-seed0" / "results.json"
    deadline = time.monotonic() + 300
    while not first.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = first.stat().st_mtime_ns
    assert run(words) == 0, capsys.readouterr().err
    assert first.stat().st_mtime_ns == written
    document = results(folder / "out")["metrics"]
    assert {row["table"] for row in document if "table" in row} == {"d", "e"}
    assert sum(row["metric"] == "block_knn_top1" for row in document) == 2 * 4
    for name in ("default", "e-swapped", "d-frozen-2"):
        settings = load_config(RefineConfig, str(folder / "out" / "settings" / f"{name}-seed0.toml"))
        refine(settings.model_copy(update={"stage": "both", "heads_from": None}), folder / name)
        found, expected = tensors(folder / "out" / "runs" / f"{name}-seed0"), tensors(folder / name)
        assert [key for key in expected if not (found[key] == expected[key]).all()] == []
        assert results(folder / name)["metrics"] == results(folder / "out" / "runs" / f"{name}-seed0")["metrics"]


@pytest.mark.parametrize("group", list(TOOLS))
def test_a_group_alone_lists_its_commands(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([group]) == 0
    listed = capsys.readouterr().out.partition("Commands:\n")[2]
    assert [line.split()[0] for line in listed.splitlines() if line[2:3].strip()] == list(TOOLS[group][1])
