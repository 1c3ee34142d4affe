"""Suites: entries equal their commands, nothing runs twice, missing data stops nothing else, mistakes are listed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimref.config.load import load_config
from mimref.config.presets import preset_names
from mimref.errors import Checks, OutputError, UserError, UserErrors
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.evaluation.probe.config import ProbeConfig
from mimref.transfer.suite import run as module
from mimref.transfer.suite.config import SuiteConfig
from mimref.transfer.suite.plan import plan_entries
from mimref.transfer.suite.run import SuiteResult, run_suite
from tests.tiny import ARCHITECTURE, Killed, Watcher, results, write_labelled, write_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two encoders and two data sets."""
    for seed, name in enumerate(("base", "refined")):
        write_weights(tmp_path / f"{name}.safetensors", seed=seed)
    for name in ("one", "two"):
        write_labelled(tmp_path / name)
    return tmp_path


def entries(folder: Path) -> list[dict[str, Any]]:
    return [
        {"name": "first", "data": str(folder / "one"), "protocol": "knn", "settings": {"k": [3]}},
        {"name": "second", "data": str(folder / "two"), "protocol": "knn", "settings": {"k": [5]}},
        {
            "name": "third",
            "data": str(folder / "two"),
            "protocol": "probe",
            "settings": {"cached": True, "probe": {"epochs": 2, "batch_size": 16}},
        },
    ]


def suite(folder: Path, listed: list[dict[str, Any]] | None = None, **changes: Any) -> SuiteConfig:
    checkpoints = [str(folder / f"{name}.safetensors") for name in ("base", "refined")]
    values = {"checkpoints": checkpoints, "entries": listed or entries(folder), "device": "cpu", "workers": 0}
    return load_config(SuiteConfig, None, values | {key.replace("__", "."): value for key, value in changes.items()})


class Runs:
    """Records every evaluation: its protocol, checkpoint and images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, str, str]] = []
        for name in ("evaluate_knn", "evaluate_probe"):
            monkeypatch.setattr(module, name, self.counting(getattr(module, name)))

    def counting(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def counted(config: Any, **options: Any) -> Any:
            found = evaluate(config, **options)
            self.done.append((config.command, Path(config.checkpoint).stem, Path(config.data.spec).name))
            return found

        return counted


def values(result: SuiteResult) -> dict[tuple[str, str], float]:
    return {(str(row.get("entry", row["metric"])), str(row["model"])): float(row["value"]) for row in result.rows}


def test_entries_are_what_their_commands_give(folder: Path) -> None:
    found = run_suite(suite(folder, seed=3), folder / "out")
    scores = values(found)
    assert found.failed == [] and len(found.rows) == 3 * 2 + 2 + 2
    for entry, data, k in (("first", "one", 3), ("second", "two", 5)):
        for model in ("base.safetensors", "refined.safetensors"):
            config = load_config(
                KnnConfig, None, {"checkpoint": str(folder / model), "data.spec": str(folder / data), "k": [k]}
            )
            assert scores[entry, model] == evaluate_knn(config).rows[0]["value"]
            own = results(folder / "out" / entry / model)
            assert own["command"] == "knn" and own["config"]["seed"] == 3 and own["metrics"][0]["k"] == k
    for model in ("base.safetensors", "refined.safetensors"):
        mean = sum(scores[entry, model] for entry in ("first", "second", "third")) / 3
        assert scores["suite_average", model] == pytest.approx(mean)
    assert scores["suite_rank", "base.safetensors"] + scores["suite_rank", "refined.safetensors"] == 3
    assert results(folder / "out")["metrics"] == found.rows and results(folder / "out")["command"] == "transfer"


def test_a_killed_suite_resumes_and_runs_nothing_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_suite(suite(folder), folder / "whole")
    runs = Runs(monkeypatch)

    def kill(label: str, done: int) -> None:
        if label == "linear probes" and done == 2:
            raise Killed

    with pytest.raises(Killed):
        run_suite(suite(folder), folder / "out", listener=Watcher(kill))
    assert len(runs.done) == 4 and not (folder / "out" / "results.json").exists()
    found = run_suite(suite(folder), folder / "out", resume=True)
    expected = [("knn", model, data) for data in ("one", "two") for model in ("base", "refined")]
    assert runs.done == [*expected, ("probe", "base", "two"), ("probe", "refined", "two")]
    assert values(found) == values(whole)
    # Finished: nothing runs, and the results are the same. Of more checkpoints, only the new one runs.
    assert run_suite(suite(folder), folder / "out", resume=True).rows == found.rows and len(runs.done) == 6
    write_weights(folder / "third.safetensors", seed=2)
    more = [*suite(folder).checkpoints, str(folder / "third.safetensors")]
    run_suite(suite(folder, checkpoints=more), folder / "out", resume=True)
    assert [model for _, model, _ in runs.done[6:]] == ["third"] * 3
    assert run_suite(suite(folder), folder / "out", force=True).rows == found.rows and len(runs.done) == 15


def test_an_interrupted_probe_continues(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimref.training.job.SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("mimref.training.job.SAVE_COST", 0.0)
    steps: list[int] = []

    def stop(label: str, done: int) -> None:
        if label == "linear probes":
            steps.append(done)
            if steps == [1, 2]:
                raise KeyboardInterrupt

    config = suite(folder, entries(folder)[2:])
    with pytest.raises(KeyboardInterrupt):
        run_suite(config, folder / "out", listener=Watcher(stop))
    place = folder / "out" / "third" / "base.safetensors"
    assert (place / "state" / "probe.pt").is_file()
    run_suite(config, folder / "out", resume=True, listener=Watcher(stop))
    assert steps[2] > 1 and not (place / "state").exists()


def test_an_entry_without_data_stops_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = entries(folder)
    listed[0]["data"] = str(folder / "nowhere")
    listed[1]["settings"]["k"] = [49]  # more than there are training images, which is known once they are opened
    runs = Runs(monkeypatch)
    found = run_suite(suite(folder, listed), folder / "out")
    assert [each[0] for each in runs.done] == ["probe", "probe"]
    messages = [str(error) for error in found.failed]
    assert len(messages) == 3 and "'first'" in messages[0] and "nowhere" in messages[0]
    assert all("'second'" in line and "k 49" in line and "48" in line for line in messages[1:])
    assert "base.safetensors" in messages[1] and "refined.safetensors" in messages[2]
    assert {row["entry"] for row in found.rows if "entry" in row} == {"third"}
    assert [row["entries"] for row in found.rows if row["metric"] == "suite_rank"] == [1, 1]
    # Once the data is there, only what is missing runs.
    write_labelled(folder / "nowhere")
    listed[1]["settings"]["k"] = [4]
    found = run_suite(suite(folder, listed), folder / "out", resume=True)
    assert found.failed == [] and [each[0] for each in runs.done] == ["probe"] * 2 + ["knn"] * 4


def test_a_full_disk_stops_the_suite(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OutputError("cannot write: disk full")

    monkeypatch.setattr(module, "write_results", full)
    with pytest.raises(OutputError, match="disk full"):
        run_suite(suite(folder), folder / "out")


def test_an_entry_of_several_results_stops_no_other(folder: Path) -> None:
    for name, count in (("one", 1), ("two", 2)):
        lines = [f"train/{label}/{number:03}.png" for label in "ab" for number in range(count)]
        (folder / f"{name}.txt").write_text("\n".join(line.removeprefix("train/") for line in lines))
    files = [str(folder / f"{name}.txt") for name in ("one", "two")]
    shots = {"name": "shots", "data": str(folder / "one"), "protocol": "lowshot", "settings": {"split_files": files}}
    for resume in (False, True):
        result = run_suite(suite(folder, [shots, *entries(folder)[:1]]), folder / "out", resume=resume)
        assert len(result.failed) == 2 and all("'shots'" in str(error) for error in result.failed)
        assert {row["entry"] for row in result.rows if "entry" in row} == {"first"}


def refused(config: SuiteConfig, out: Path, **options: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        run_suite(config, out, **options)
    error = caught.value
    return [str(each) for each in (error.errors if isinstance(error, UserErrors) else [error])]


def test_all_mistakes_are_listed_before_anything_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [
        {"name": "a b", "data": "digits", "protocol": "knn"},
        {"name": "near", "data": "digits", "protocol": "knm"},
        {"name": "keys", "data": "digits", "protocol": "probe", "settings": {"probe": {"epoch": 3}, "cached": 1}},
        {"name": "many", "data": "digits", "protocol": "knn", "settings": {"k": [1, 2], "blocks": "all"}},
        {"name": "shots", "data": "digits", "protocol": "lowshot"},
        {"name": "acc", "data": "digits", "protocol": "cluster", "settings": {"metrics": ["nmi"]}},
        {"name": "acc", "data": "digits", "protocol": "knn"},
        {"name": "acc", "data": "digits", "protocol": "knn"},
        {"data": "digits", "protocol": "knn", "more": 1},
        {"name": "own", "data": "digits", "protocol": "knn", "settings": {"checkpoint": "x.pth"}},
        {"name": "preset", "data": "digits", "protocol": "probe", "preset": "relaese"},
    ]
    runs = Runs(monkeypatch)
    config = suite(folder, listed, checkpoints=["gone.pth", "gone.pth"], data__spec="digits")
    lines = refused(config, folder / "out")
    expected = [
        ("'a b'", "name"), ("'near'", "protocol", "knm"), ("'keys'", "probe.epoch"), ("'keys'", "cached"),
        ("'many'", "blocks = all"), ("'many'", "k = [1, 2]"), ("'shots'", "shots = [1, 2, 5]"), ("'acc'", "nmi"),
        ("'acc'", "another entry"), ("entry 9", "'more'"), ("entry 9", "name is missing"),
        ("'own'", "checkpoint"),
        ("'preset'", "did you mean 'release'"), ("data.spec", "digits"), ("gone.pth", "twice"), ("gone.pth", "no such"),
    ]  # fmt: skip
    for parts in expected:
        assert any(all(part in line for part in parts) for line in lines), (parts, lines)
    assert runs.done == [] and not (folder / "out").exists() and all("\n" not in line for line in lines)


def test_settings_of_the_suite_hold_for_entries_that_have_them(folder: Path) -> None:
    listed = [
        {"name": "a", "data": "digits", "protocol": "knn", "settings": {"resolution": 8}},
        {"name": "b", "data": "digits", "protocol": "probe", "preset": "release"},
    ]
    config = suite(folder, listed, resolution=16, seed=5, data__root="/x", data__resize="direct")
    (_, first), (_, second) = ((entry.name, entry.config) for entry in plan_entries(config, Checks()))
    assert (first.resolution, first.seed, first.data.root, first.data.resize) == (8, 5, "/x", "direct")
    assert isinstance(second, ProbeConfig) and (second.resolution, second.probe.norm) == (16, "batch")
    assert second.checkpoint == "quickstart" and second.data.spec == "digits"


def test_folders_that_must_not_be_used(folder: Path) -> None:
    config, out = suite(folder, entries(folder)[:1]), folder / "out"
    assert "no suite" in refused(config, out, resume=True)[0]
    assert "choose one" in refused(config, out, resume=True, force=True)[0]
    run_suite(config, out)
    assert "--resume" in refused(config, out)[0] and "--force" in refused(config, out)[0]
    changed = entries(folder)[:1]
    changed[0]["settings"]["k"] = [4]
    lines = refused(suite(folder, changed), out, resume=True)
    assert len(lines) == 2 and all("k was [3] and is now [4]" in line for line in lines)
    (out / "first" / "base.safetensors" / "results.json").write_text("{")
    assert "cannot be read" in refused(config, out, resume=True)[0]
    # Another encoder of the same name is not mistaken for the one evaluated.
    (folder / "else").mkdir()
    write_weights(folder / "else" / "base.safetensors", seed=5)
    other = folder / "other"
    run_suite(suite(folder, entries(folder)[:1], checkpoints=[str(folder / "base.safetensors")]), other)
    elsewhere = suite(folder, entries(folder)[:1], checkpoints=[str(folder / "else" / "base.safetensors")])
    assert "checkpoint was" in refused(elsewhere, other, resume=True)[0]
    for name in ("results.json", "first/refined.safetensors/notes.txt"):
        (folder / name[:5] / name).parent.mkdir(parents=True)
        (folder / name[:5] / name).write_text("{}")
        for force in (False, True):
            (line,) = refused(config, folder / name[:5], force=force)
            assert name.partition("/notes")[0] in line and (folder / name[:5] / name).exists()


def test_encoders_of_one_name_are_kept_apart(folder: Path) -> None:
    (folder / "else").mkdir()
    write_weights(folder / "else" / "base.safetensors", seed=5)
    files = [str(folder / "base.safetensors"), str(folder / "else" / "base.safetensors")]
    found = run_suite(suite(folder, entries(folder)[:1], checkpoints=files), folder / "out")
    assert [row["model"] for row in found.rows if "entry" in row] == files
    assert len(list((folder / "out" / "first").iterdir())) == 2


def test_an_encoder_of_a_finished_ones_name_is_added(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(folder / "base.safetensors"), str(folder / "else" / "base.safetensors")]
    run_suite(suite(folder, entries(folder)[:1], checkpoints=files[:1]), folder / "out")
    (folder / "else").mkdir()
    write_weights(folder / "else" / "base.safetensors", seed=5)
    runs = Runs(monkeypatch)
    found = run_suite(suite(folder, entries(folder)[:1], checkpoints=files), folder / "out", resume=True)
    assert len(runs.done) == 1 and [row["model"] for row in found.rows if "entry" in row] == files


def test_a_suite_of_relative_paths_resumes_from_any_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "draw.txt").write_text("\n".join(f"{label}/000.png" for label in "ab"))
    (folder / "own.toml").write_text("k = [3]")
    listed = [
        {"name": "near", "data": "one", "protocol": "knn", "preset": "own.toml"},
        {
            "name": "drawn",
            "data": "two",
            "protocol": "lowshot",
            "preset": "none",
            "settings": {"split_files": ["draw.txt"]},
        },
    ]
    monkeypatch.chdir(folder)
    config = suite(folder, listed, checkpoints=["base.safetensors"], data__root=".")
    found = run_suite(config, Path("out"))
    assert found.failed == [] and len(found.rows) == 3
    (folder / "else").mkdir()
    runs = Runs(monkeypatch)
    for place in (folder / "else", folder):
        monkeypatch.chdir(place)
        config = load_config(SuiteConfig, str(folder / "out" / "suite.toml"))
        assert run_suite(config, folder / "out", resume=True).rows == found.rows and runs.done == []
    assert config.data.root == str(folder)


def test_a_setting_that_is_no_longer_set_is_a_changed_one(folder: Path) -> None:
    listed, out = entries(folder)[:1], folder / "out"
    run_suite(suite(folder, listed, resolution=16, data__alpha="white", data__crop_fraction=0.5), out)
    # Without this setting, the value may be that of the checkpoint's header.
    run_suite(suite(folder, listed, resolution=16, data__crop_fraction=0.5), out, resume=True)
    for setting, lacking in (("resolution", {"data__crop_fraction": 0.5}), ("data.crop_fraction", {"resolution": 16})):
        (first, _) = refused(suite(folder, listed, **lacking), out, resume=True)
        assert f"{setting} was" in first and "is now unset" in first


def test_encoders_of_many_channels_need_no_setting(folder: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for label in range(2):
            (folder / "bands" / split / str(label)).mkdir(parents=True)
            for index in range(count):
                pixels = np.full((16, 16, 5), 100 * label + index, dtype=np.uint8)
                np.save(folder / "bands" / split / str(label) / f"{index}.npy", pixels)
    write_weights(folder / "bands.safetensors", architecture=replace(ARCHITECTURE, channels=5))
    listed = [entries(folder)[0] | {"data": str(folder / "bands")}]
    found = run_suite(suite(folder, listed, checkpoints=[str(folder / "bands.safetensors")]), folder / "out")
    assert found.failed == [] and found.rows[0]["value"] == 100


@pytest.mark.parametrize("name", preset_names("transfer"))
def test_built_in_suites(name: str) -> None:
    planned = plan_entries(load_config(SuiteConfig, name), checks := Checks())
    checks.finish()
    assert planned
    if name == "transfer/vtab-natural":
        assert [entry.name for entry in planned] == [
            "caltech101", "cifar100", "dtd", "flowers102", "pets", "sun397", "svhn",
        ]  # fmt: skip
        for entry in planned:
            config = entry.config
            assert isinstance(config, ProbeConfig) and not config.cached
            assert (config.probe.norm, config.probe.batch_size, config.probe.epochs) == ("batch", 256, 50)
            assert len(config.probe.lr) == 13 and config.data.resize == "direct"
            assert config.data.spec == f"vtab:{entry.name}" and config.resolution is None


def test_ranks_of_processes_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "world_size", lambda: 2)
    assert "torchrun" in refused(suite(folder), folder / "out")[0]
