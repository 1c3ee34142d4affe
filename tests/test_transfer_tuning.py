"""Fine-tuning entries: the chosen learning rate, the mean over seeds, and what a killed suite runs again."""

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mimref.config.load import load_config
from mimref.data.readers.vtab import VTAB_1K_NAMES
from mimref.errors import Checks, ConfigError, DivergenceError
from mimref.progress import Silent
from mimref.transfer.finetune.config import FinetuneConfig
from mimref.transfer.finetune.plan import make_plan
from mimref.transfer.finetune.run import finetune
from mimref.transfer.suite import tuning
from mimref.transfer.suite.config import SuiteConfig
from mimref.transfer.suite.plan import plan_entries
from mimref.transfer.suite.run import SuiteResult, run_suite
from tests.tiny import Killed, Watcher, results, write_images, write_labelled, write_weights

SETTINGS = {"batch_size": 16, "finetune": {"epochs": 2, "warmup_epochs": 0}, "augment": {"rand_augment": "none"}}


def suite(folder: Path, **changes: Any) -> SuiteConfig:
    entry = {
        "name": "tuned",
        "data": str(folder / "data"),
        "tune_data": str(folder / "tune"),
        "protocol": "finetune",
        "seeds": 2,
        "learning_rates": [1e-3, 1e-2, 1e-1],
        "settings": SETTINGS,
    }
    values = {"checkpoints": [str(folder / "base.safetensors")], "device": "cpu", "workers": 0, "seed": 4}
    return load_config(SuiteConfig, None, values | {"entries": [entry | changes]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_weights(tmp_path / "base.safetensors")
    for name in ("data", "tune"):
        write_labelled(tmp_path / name)
    return tmp_path


def test_the_best_rate_on_the_tuning_data_is_run_on_the_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {1e-3: [50.0, 60.0], 1e-2: [80.0, 70.0], 1e-1: [75.0, 75.0]}  # the second and third have equal means
    asked: list[tuple[str, float, int]] = []

    def fake(config: FinetuneConfig, out: Path, **_: Any) -> SimpleNamespace:
        data, lr, seed = Path(config.data.spec or "").name, config.finetune.lr, config.seed
        asked.append((data, lr, seed))
        last = scores[lr][seed - 4] if data == "tune" else 90.0 + seed
        rows = [{"metric": "finetune_top1", "value": last, "selected": "last epoch"}]
        rows += [{"metric": "finetune_top1", "value": 99.0, "selected": "best epoch"}]
        return SimpleNamespace(
            rows=[*rows, {"metric": "finetune_top5", "value": 99.0, "selected": "last epoch"}],
            elapsed_s=1.0,
            bad_images=[],
        )

    monkeypatch.setattr(tuning, "finetune", fake)
    found = run_suite(suite(folder), folder / "out")
    tuned = [("tune", lr, seed) for lr in (1e-3, 1e-2, 1e-1) for seed in (4, 5)]
    assert asked == [*tuned, ("data", 1e-2, 4), ("data", 1e-2, 5)]
    (row,) = (row for row in found.rows if row.get("entry") == "tuned")
    assert (row["metric"], row["value"], row["lr"], row["seeds"]) == ("finetune_top1", 94.5, 1e-2, 2)
    assert row["std"] == pytest.approx(statistics.stdev([94.0, 95.0])) and found.elapsed_s == 8.0
    rates = [
        row for row in results(folder / "out" / "tuned" / "base.safetensors")["metrics"] if row["metric"] == "tune_top1"
    ]
    assert [(row["lr"], row["value"]) for row in rates] == [(lr, sum(each) / 2) for lr, each in scores.items()]


def score(result: SuiteResult) -> float:
    (row,) = (row for row in result.rows if row.get("entry") == "tuned")
    return float(row["value"])


def test_a_killed_fine_tuning_continues_and_nothing_runs_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = suite(folder, learning_rates=[1e-3, 1e-2], seeds=1)
    whole = run_suite(config, folder / "whole")
    steps: list[int] = []
    finished: list[float] = []

    def counted(config: FinetuneConfig, out: Path, **options: Any) -> Any:
        done = (out / "results.json").exists()
        found = finetune(config, out, **options)
        finished.extend([] if done else [config.finetune.lr])
        return found

    def kill(label: str, done: int) -> None:
        if label == "fine-tuning":
            steps.append(done)
            if len(steps) == 9:  # during the second run
                raise Killed

    monkeypatch.setattr(tuning, "finetune", counted)
    with pytest.raises(Killed):
        run_suite(config, folder / "out", listener=Watcher(kill))
    assert finished == [1e-3]
    found = run_suite(config, folder / "out", resume=True)
    assert found.failed == [] and len(finished) == 3 and score(found) == score(whole)
    place = folder / "out" / "tuned" / "base.safetensors"
    assert list(place.rglob("*.safetensors")) == [] and not list(place.rglob("*.pt"))
    best = finished[2]
    assert results(place / "final" / "seed4")["config"]["finetune"]["lr"] == best
    # The score equals that of the command run alone.
    alone = load_config(
        FinetuneConfig,
        None,
        {"encoder.weights": str(folder / "base.safetensors"), "data.spec": str(folder / "data"), "batch_size": 16,
         "finetune.epochs": 2, "finetune.warmup_epochs": 0, "finetune.lr": best, "augment.rand_augment": "none",
         "seed": 4, "device": "cpu", "workers": 0},
    )  # fmt: skip
    rows = finetune(alone, folder / "alone").rows
    (last,) = (row["value"] for row in rows if row["metric"] == "finetune_top1" and row["selected"] == "last epoch")
    assert score(found) == last


def refused(config: SuiteConfig) -> str:
    plan_entries(config, checks := Checks())
    with pytest.raises(ConfigError) as caught:
        checks.finish()
    return str(caught.value)


def test_mistakes(folder: Path) -> None:
    assert "need each other" in refused(suite(folder, tune_data="none"))
    assert "need each other" in refused(suite(folder, learning_rates=[]))
    settings = {"encoder": {"weights": "x"}}
    assert "encoder.weights" in refused(suite(folder, settings=settings))
    message = refused(suite(folder, protocol="knn", settings={}))
    assert "'tuned'" in message and "finetune" in message and "knn" in message
    found = run_suite(suite(folder, tune_data=str(folder / "gone")), folder / "out")
    assert len(found.failed) == 1 and "gone" in str(found.failed[0]) and found.rows == []


def test_a_rate_that_diverges_is_not_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(config: FinetuneConfig, out: Path, **options: Any) -> Any:
        if config.finetune.lr == 1e-1 or (config.finetune.lr == 1e-2 and config.seed == 5):
            raise DivergenceError("the loss is not finite")
        return finetune(config, out, **options)

    monkeypatch.setattr(tuning, "finetune", diverging)
    found = run_suite(suite(folder), folder / "out")
    assert found.failed == []
    rows = results(folder / "out" / "tuned" / "base.safetensors")["metrics"]
    assert [row["lr"] for row in rows if row["metric"] == "finetune_top1"] == [1e-3]
    tuned = {row["lr"]: row["value"] for row in rows if row["metric"] == "tune_top1"}
    assert tuned.keys() == {1e-3, 1e-2, 1e-1} and tuned[1e-2] == tuned[1e-1] == 0 and tuned[1e-3] > 0


def test_finished_runs_of_an_unfinished_entry_are_not_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(config: FinetuneConfig, out: Path, **options: Any) -> Any:
        if out.parent.name == "final":
            raise Killed
        return finetune(config, out, **options)

    config = suite(folder, learning_rates=[1e-3, 1e-2], seeds=1)
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "finetune", failing)
        with pytest.raises(Killed):
            run_suite(config, folder / "out")
    write_labelled(folder / "other")
    other = suite(folder, learning_rates=[1e-3, 1e-2], seeds=1, tune_data=str(folder / "other"))
    (error,) = run_suite(other, folder / "out", resume=True).failed
    assert "data.spec" in str(error) and "lr0.001" in str(error)
    assert run_suite(config, folder / "out", resume=True).failed == []


def test_a_changed_batch_size_is_another_fine_tuning(folder: Path) -> None:
    config = suite(folder, seeds=1)
    entry = {key: value for key, value in config.entries[0].items() if key not in ("learning_rates", "tune_data")}
    config = config.model_copy(update={"entries": [entry]})
    run_suite(config, folder / "out")
    changed = entry | {"settings": SETTINGS | {"batch_size": 12}}
    with pytest.raises(ConfigError, match="batch_size was 16 and is now 12"):
        run_suite(config.model_copy(update={"entries": [changed]}), folder / "out", resume=True)


def test_without_rates_the_recipe_chooses_one(folder: Path) -> None:
    listed = suite(folder, seeds=1).entries[0]
    entry = {key: value for key, value in listed.items() if key not in ("learning_rates", "tune_data")}
    entry["settings"] = {"finetune": {"epochs": 1, "warmup_epochs": 0}}
    config = suite(folder).model_copy(update={"entries": [entry]})
    run_suite(config, folder / "out")
    (planned,) = plan_entries(config, checks := Checks())
    assert isinstance(planned.config, FinetuneConfig)
    encoder = planned.config.encoder.model_copy(update={"weights": config.checkpoints[0]})
    lr = make_plan(planned.config.model_copy(update={"encoder": encoder}), Silent(), checks).config.finetune.lr
    place = folder / "out" / "tuned" / "base.safetensors"
    assert lr != FinetuneConfig().finetune.lr and results(place)["metrics"][0]["lr"] == lr
    assert results(place / "final" / "seed4")["config"]["finetune"]["lr"] == lr


def test_vtab_1k_is_the_published_procedure() -> None:
    planned = plan_entries(load_config(SuiteConfig, "vtab-1k", {"data.root": "/x"}), checks := Checks())
    checks.finish()
    assert [entry.name for entry in planned] == list(VTAB_1K_NAMES)
    for entry in planned:
        given, config = entry.given, entry.config
        assert (given.data, given.tune_data) == (f"vtab1k:{entry.name}", f"vtab1k:{entry.name}/tune")
        assert isinstance(config, FinetuneConfig) and given.seeds == 5
        # The rates are for batches of 64 images, the settings for 256.
        real = [lr * config.batch_size / 256 for lr in given.learning_rates]
        assert real == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-4]) and config.batch_size == 64
        schedule = config.finetune
        assert (schedule.epochs, schedule.warmup_epochs, schedule.weight_decay) == (50, 5, 0.05)
        assert (schedule.layer_decay, config.data.resize, config.data.root) == (0.75, "direct", "/x")
        assert (config.augment.flip, config.augment.erase, config.augment.rand_augment) == (0, 0, None)


def test_classes_without_training_images_are_kept_where_that_is_published(folder: Path) -> None:
    place = folder / "vtab" / "svhn"
    labels = {"train800": [0, 3] * 8, "val200": [1, 0, 3, 5]}
    for name, numbers in labels.items():
        write_images(place / "images", per_class=len(numbers), classes=(name,))
        lines = [f"images/{name}/{index:03}.png {label}" for index, label in enumerate(numbers)]
        (place / f"{name}.txt").write_text("\n".join(lines))
    settings = {"encoder.weights": str(folder / "base.safetensors"), "data.spec": "vtab1k:svhn/tune", "batch_size": 8,
                "data.root": str(folder / "vtab"), "finetune.epochs": 1, "finetune.warmup_epochs": 0,
                "device": "cpu"}  # fmt: skip
    config = load_config(FinetuneConfig, None, settings)
    plan = make_plan(config, Silent(), Checks())
    assert plan.classes == ["0", "1", "2", "3", "4", "5"]
    assert np.array_equal(plan.labels, labels["train800"]) and np.array_equal(plan.val_labels, labels["val200"])
    rows = finetune(config, folder / "out").rows
    assert all(row["value"] in (0, 25, 50, 75, 100) for row in rows if row["metric"] == "finetune_top1")
