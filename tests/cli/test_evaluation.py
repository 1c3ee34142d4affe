"""The evaluations from the command line to their files, on a tiny encoder."""

import errno
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mimref.benchmarks import cost, extraction, measure, step, views
from mimref.benchmarks.evaluations import Sizes
from mimref.benchmarks.heads import HeadSizes
from mimref.benchmarks.views import ViewSizes
from mimref.cli import run
from mimref.errors import ConfigError
from mimref.refinement.config import HeadsConfig, RefineConfig
from tests.cli.evaluations import CHEAP, Passes, line
from tests.tiny import REFINE, arguments, results, write_images, write_labelled


def test_knn_of_single_classes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line("knn", folder, "--per-class", "--no-standardize", "--out", str(tmp_path / "out"))) == 0
    rows = results(tmp_path / "out")["metrics"]
    single = [row for row in rows if "class" in row]
    overall = next(row for row in rows if "class" not in row)
    assert [row["images"] for row in single] == [8, 8]
    assert sum(row["value"] for row in single) / 2 == overall["value"]
    assert "per class" in capsys.readouterr().out


def test_lowshot_of_split_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("a/003.png\nb/004.png\n")
    (tmp_path / "two.txt").write_text("a/005.png\nb/006.png\n")
    files = ["--split-file", str(tmp_path / "one.txt"), "--split-file", str(tmp_path / "two.txt")]
    assert run(line("lowshot", folder, *files, "--out", str(tmp_path / "out"))) == 0
    rows = results(tmp_path / "out")["metrics"]
    assert [(row["shots"], row.get("split")) for row in rows] == [(1, None), (1, 0), (1, 1)]
    assert rows[0]["protocol"] == "logistic regression" and rows[0]["splits"] == 2
    (tmp_path / "bad.txt").write_text("a/003.png\nb/999.png\n")
    assert run(line("lowshot", folder, "--split-file", str(tmp_path / "bad.txt"))) == 2
    error = capsys.readouterr().err
    assert "bad.txt, line 2" in error and "'b/999.png'" in error


@pytest.mark.slow
def test_cluster_draws_the_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path / "data", per_class=12, classes=("a", "b", "c"), split="val")
    write_images(data, per_class=2, classes=("a", "b", "c"), split="train")
    figure = tmp_path / "umap.png"
    more = ["--data", str(data), "--classes", "c,a", "--umap", str(figure), "--runs", "2"]
    assert run(line("cluster", folder, *more, "--out", str(tmp_path / "out"))) == 0
    assert figure.read_bytes().startswith(b"\x89PNG") and f"figure in {figure}" in capsys.readouterr().err
    rows = results(tmp_path / "out")["metrics"]
    assert {row["classes"] for row in rows} == {2}
    assert {row["metric"] for row in rows} == {
        "cluster_acc",
        "cluster_nmi",
        "cluster_ami",
        "cluster_ari",
        "silhouette",
        "davies_bouldin",
    }


def test_cluster_without_a_report_has_its_files(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(line("cluster", folder, "--clusters", "3", "--runs", "2", "--no-report", "--out", str(out))) == 0
    written = {path.name for path in out.iterdir()}
    assert {"assignments.csv", "gallery.html", "gallery.png"} <= written
    assert not {"report.html", "exhibits.json"} & written
    assert (out / "gallery.html").read_text().count("data:image/") >= 1


@pytest.mark.parametrize("broken", ["import", "fit", "disk"])
def test_a_figure_that_fails_costs_no_scores(
    broken: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        # What numba says to an unknown user.
        raise RuntimeError("cannot cache function 'rdist': no locator available for file")

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    module = SimpleNamespace(
        UMAP=fail if broken == "fit" else lambda **_: SimpleNamespace(fit_transform=lambda x: x[:, :2])
    )
    monkeypatch.setitem(sys.modules, "umap", None if broken == "import" else module)
    if broken == "disk":
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    figure, out = tmp_path / "umap.png", tmp_path / "out"
    more = ["--split", "val", "--runs", "2", "--umap", str(figure), "--out", str(out)]
    assert run(line("cluster", folder, *more)) == 0
    told = capsys.readouterr()
    (warning,) = [line for line in told.err.splitlines() if "warning" in line and str(figure) in line]
    said = {"import": "umap", "fit": "no locator available", "disk": "No space left"}[broken]
    assert f"no figure in {figure}" in warning and said in warning and "Traceback" not in told.err
    assert "k-means ACC" in told.out and (out / "results.csv").exists() and not figure.exists()


def test_results_are_written_before_they_are_printed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing may read what is printed."""

    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("rich.console.Console.print", closed)
    with pytest.raises(SystemExit):  # as Typer ends then
        run(line("knn", folder, "--quiet", "--out", str(tmp_path / "out")))
    assert results(tmp_path / "out")["metrics"][0]["metric"] == "knn_top1"


def test_decoders_that_fail_cost_no_other_scores(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"epochs": 2, "warmup_epochs": 0, "batch_size": 16, "decoder.width": 16, "decoder.num_heads": 2, "lr": 1e30}
    options = [part for key, value in sets.items() for part in ("--set", f"reconstruction.{key}={value}")]
    assert run(line("analyze-blocks", folder, *options, "--reconstruction", "--out", str(tmp_path / "out"))) == 0
    assert "no reconstruction loss of base.safetensors: the reconstruction loss" in capsys.readouterr().err
    metrics = {row["metric"] for row in results(tmp_path / "out")["metrics"]}
    assert "block_knn_top1" in metrics and "block_reconstruction" not in metrics


def test_analyze_blocks_of_two_encoders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(line("analyze-blocks", folder, str(folder / "refined.safetensors"), "--out", str(out))) == 0
    printed = capsys.readouterr().out
    assert "base.safetensors" in printed and "refined.safetensors" in printed and "--heads" in printed
    assert (out / "blocks.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(out / "results.csv")
    for model in ("base.safetensors", "refined.safetensors"):
        part = table[(table.model == model) & (table.metric == "block_knn_top1")]
        assert list(part.block) == [1, 2, 3, 4]
    assert run(line("analyze-blocks", folder, str(folder / "base.safetensors"))) == 2
    error = capsys.readouterr().err
    assert "base.safetensors" in error and error.count("\n") == 1


def test_assess_writes_what_it_prints(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    both = line("assess", folder, str(folder / "refined.safetensors"), "--blocks", "all", "--out", str(out))
    assert run(both) == 0
    printed = capsys.readouterr()
    assert "block 4" in printed.out and "of 8: neighbour consistency" in printed.out
    assert (out / "assessment.png").read_bytes().startswith(b"\x89PNG") and "assessment.png" in printed.err
    ranks = [row["value"] for row in results(out)["metrics"] if row["metric"] == "assessed_rank"]
    assert len(ranks) == 8 and min(ranks) == 1
    refined = str(folder / "refined.safetensors")
    bars = line("assess", folder, refined, "--blocks", "last4", "--out", str(tmp_path / "bars"))
    assert run(bars) == 0 and (tmp_path / "bars/assessment.png").is_file()
    unlabelled = line("assess", folder, "--data", str(folder / "unlabelled"), "--out", str(tmp_path / "one"))
    assert run(unlabelled) == 0 and "k-NN" not in capsys.readouterr().out.splitlines()[-3]
    assert not (tmp_path / "one/assessment.png").exists()


def test_analyze_blocks_with_decoders_and_without_labels(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"epochs": 1, "warmup_epochs": 0, "batch_size": 16, "decoder.width": 16, "decoder.num_heads": 2}
    options = [part for key, value in sets.items() for part in ("--set", f"reconstruction.{key}={value}")]
    more = ["--data", str(folder / "unlabelled"), "--reconstruction", "--out", str(tmp_path / "out")]
    assert run(line("analyze-blocks", folder, *options, *more)) == 0
    rows = results(tmp_path / "out")["metrics"]
    assert [row["block"] for row in rows if row["metric"] == "block_reconstruction"] == [1, 2, 3, 4]
    assert not [row for row in rows if row["metric"] == "block_knn_top1"]
    assert "reconstruction.batch_size is 16" in capsys.readouterr().err


def test_compare(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = Passes(monkeypatch)
    out = tmp_path / "out"
    more = ["--protocols", "knn,lowshot,cluster,probe", "--splits", "2", "--shots", "1", "--runs", "2"]
    sets = ["--set", "probe.epochs=2", "--set", "probe.batch_size=16", "--out", str(out)]
    assert run(line("compare", folder, str(folder / "refined.safetensors"), *more, *sets)) == 0
    assert passes.images == 2 * 64
    printed = capsys.readouterr().out
    assert "linear probe top-1" in printed and "k-means ACC" in printed
    metrics = results(out)["metrics"]
    shown = [row for row in metrics if not {"split", "classifier"} & row.keys()]
    assert [(row["model"], row["metric"]) for row in shown[:2]] == [
        ("base.safetensors", "knn_top1"),
        ("base.safetensors", "lowshot_top1"),
    ]
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "results.md").read_text().splitlines()
    assert text[0] == "| | base.safetensors | refined.safetensors |" and text[2].startswith("| k-NN top-1 |")
    # The same numbers as the commands alone.
    assert run(line("knn", folder, "--out", str(tmp_path / "knn"))) == 0
    assert results(tmp_path / "knn")["metrics"][0]["value"] == shown[0]["value"]


# --- probes


def test_an_interrupted_probe_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mimref.training.job.SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("mimref.training.job.SAVE_COST", 0.0)
    out, other = tmp_path / "out", tmp_path / "other"
    sets = ["--epochs", "3", "--batch-size", "16", "--quiet"]
    assert run(line("probe", folder, *sets, "--out", str(other))) == 0
    from mimref.reports import terminal

    def stop(self: terminal.Terminal, label: str, done: int, total: int) -> None:
        if (label, done) == ("linear probes", 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(terminal.Terminal, "progress", stop)
        assert run(line("probe", folder, *sets, "--out", str(out))) == 130
    assert (out / "state" / "probe.pt").is_file()
    capsys.readouterr()
    assert run(line("probe", folder, *sets, "--out", str(out))) == 2
    error = capsys.readouterr().err
    assert str(out) in error and "--resume" in error and "--force" in error
    assert run(line("probe", folder, *sets, "--out", str(out), "--resume")) == 0
    assert results(out)["metrics"] == results(other)["metrics"]
    assert not (out / "state" / "probe.pt").exists()
    assert run(line("probe", folder, "--resume")) == 2
    assert "--out" in capsys.readouterr().err


MISTAKES = {
    "knn --k 49": ("--k 49", "48"),
    "knn --blocks 5": ("block 5", "1 to 4"),
    "lowshot --shots 25": ("class a", "24", "25"),
    "cluster --metrics acc,nmj": ("'nmj'",),
    "cluster --classes a,z": ("'z'",),
    "cluster --umap figure.jpg": ("--umap figure.jpg", ".png"),
    "probe --cached --select best": ("--select best:", "'val-split'"),
    "probe --kind attention": ("--kind attention", "'attentive'"),
    "probe --kind attentive --set probe.queries=5": ("probe.queries 5", "width 32"),
    "probe --kind attentive --resolution 8": ("1 patch token", "--resolution"),
    "probe --set probe.queries=4": ("probe.queries", "probe.kind = 'attentive'"),
    "compare quickstart --protocols probe --set probe.kind=attentive": ("probe.kind = 'attentive'", "mimref probe"),
    "compare nowhere.pth": ("nowhere.pth",),
    "extract --out x.csv": ("--out x.csv", ".npz", ".parquet"),
    "analyze-blocks --k 50": ("--k 50", "48"),
    "analyze-blocks --reconstruction --resolution 8": ("8 pixels",),
    "compare quickstart --metrics nmj": ("'nmj'",),
    "compare quickstart --shots 1000": ("1000",),
    "compare quickstart --set k=50": ("k 50", "48"),
    "cluster --split train --set data.train_limit=12 --umap a.png": ("12 images", "15"),
    "lowshot --split-file nowhere.txt": ("nowhere.txt",),
    "lowshot --split-file there.txt --shots 5": ("shots", "split files"),
    "lowshot --split-file there.txt --splits 5": ("splits", "split files"),
    "probe --set blocks=3": ("blocks", "probe.blocks"),
    "probe --set pool=mean": ("pool", "no effect"),
    "search --query train/a/000.png --set features=a.npz,b.npz": ("features", "no effect"),
    "extract --out a.npz --set features=a.npz,b.npz": ("features", "no effect"),
    "compare quickstart --protocols probe --set probe.select=val-split --set data.train_limit=2": ("val-split",),
    "knn --out there.png/results": ("there.png", "--out"),
    "cluster --umap there.png": ("--umap there.png", "--force"),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_found_before_the_encoder_runs(
    words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.png").touch()
    Path("there.txt").write_text("a/000.png\n")
    passes = Passes(monkeypatch)
    command, *options = words.split()
    assert run(line(command, folder, *options)) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in MISTAKES[words]) and error.count("\n") == 1 and passes.images == 0, error


@pytest.mark.parametrize("command", ["lowshot", "compare"])
def test_without_cyanure_no_encoder_runs(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cyanure.estimators", None)
    passes = Passes(monkeypatch)
    others = ["quickstart"] if command == "compare" else []
    assert run(line(command, folder, *others)) == 2
    error = capsys.readouterr().err
    assert "cyanure" in error and error.count("\n") == 1 and passes.images == 0, error


def test_results_hold_the_images_left_out(folder: Path, tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data")
    (data / "val" / "a" / "003.png").write_bytes(b"nothing")
    assert run(line("knn", folder, "--data", str(data), "--out", str(tmp_path / "out"))) == 0
    (bad,) = json.loads((tmp_path / "out" / "results.json").read_text())["bad_images"]
    assert bad["path"].endswith("val/a/003.png")
    # From the cache as well; and more than are allowed are refused, cached or not.
    assert run(line("knn", folder, "--data", str(data), "--out", str(tmp_path / "again"))) == 0
    assert results(tmp_path / "again")["bad_images"] == [bad]
    assert run(line("knn", folder, "--data", str(data), "--set", "data.max_bad=0")) == 2


def test_inputs_are_named_apart(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "encoder.safetensors").write_bytes((folder / "base.safetensors").read_bytes())
    files = [str(tmp_path / name / "encoder.safetensors") for name in ("one", "two")]
    assert run(["compare", *files, "--protocols", "knn", *CHEAP, "--out", str(tmp_path / "out")]) == 0
    assert [row["model"] for row in results(tmp_path / "out")["metrics"]] == files


@pytest.mark.slow
def test_knn_of_two_processes(folder: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    outs = []
    for number, start in enumerate(([sys.executable], torchrun)):
        out = tmp_path / str(number)
        command = line("knn", folder, "--k", "1,10", "--out", str(out))
        done = subprocess.run([*start, "-m", "mimref", *command], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        outs.append((results(out)["metrics"], done.stdout.count("k-NN top-1")))
    assert outs[0] == outs[1] and outs[0][1] == 2


def test_the_benchmark_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"knn_train": 300, "knn_test": 50, "knn_width": 8, "knn_classes": 3, "kmeans_images": 60, "kmeans_width": 4}
    small |= {"kmeans_classes": 3, "kmeans_runs": 2, "probe_batch": 8, "probe_width": 4, "probe_steps": 1, "repeats": 1}
    monkeypatch.setattr("mimref.benchmarks.evaluations.Sizes", partial(Sizes, **small))
    assert run(["benchmark", "eval", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "knn sweep ratio" in printed and "probe speedup" in printed
    rows = {row["metric"]: row for row in results(tmp_path / "out")["metrics"]}
    sweep = rows["benchmark_knn_sweep_ratio"]
    assert sweep["value"] == pytest.approx(sweep["ten_s"] / sweep["one_s"]) and sweep["train"] == 300


def test_the_views_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"width": 60, "height": 48, "global_size": 16, "local_views": 1, "local_size": 8, "images": 2, "repeats": 1}
    for module in (views, extraction):
        monkeypatch.setattr(module, "ViewSizes", partial(ViewSizes, **small))
    monkeypatch.setattr("mimref.benchmarks.views.library_ways", lambda *_: ({}, ["not compared with X: pip install x"]))
    assert run(["benchmark", "views", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "mimref, worker's part" in printed.out and "timm: uint8 crops" in printed.out
    assert "not compared with X: pip install x" in printed.err.splitlines()
    metrics = {row["metric"] for row in results(tmp_path / "out")["metrics"]}
    assert metrics == {"benchmark_views", "benchmark_extraction"}


@pytest.mark.parametrize(
    ("options", "preset", "weights"),
    [
        (["--set", "encoder.arch=vit_h14"], "refine/mae_h14", None),
        (["--set", "encoder.arch=vit_l16", "--set", "encoder.source=d2v2"], "refine/d2v2_l16", None),
        (["--set", "encoder.weights=mae_b16"], None, "mae_b16"),
        (["--preset", "recipe"], None, "quickstart"),
        ([], "refine/quickstart", "quickstart"),
    ],
)
def test_benchmarks_choose_the_preset_as_refine_does(
    options: list[str],
    preset: str | None,
    weights: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: list[RefineConfig] = []

    def fitted(config: RefineConfig, *, read_data: bool) -> None:
        found.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr("mimref.benchmarks.stage.fitted", fitted)
    for command in ("step", "cost", "memory"):
        assert run(["benchmark", command, *options]) == 2
        assert "far enough" in capsys.readouterr().err
    assert {(config.preset, config.encoder.weights) for config in found} == {(preset, weights)}


def test_step_and_cost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = HeadSizes(heads=2, embed_dim=8, images=(2,), views=2, config=HeadsConfig(projector_hidden=8))
    monkeypatch.setattr(HeadSizes, "for_device", lambda device: sizes)
    monkeypatch.setattr(measure, "_MATMUL_SIZE", {"cpu": 64})
    for module, name in ((step, "benchmark_step"), (cost, "benchmark_cost")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), steps=1))
        # Counting takes seconds, and is tested in `test_benchmarks_step.py`. So few FLOPs are affordable at any load.
        monkeypatch.setattr(module, "model_flops", lambda *_: 10**6)
    settings = REFINE | {"encoder.weights": folder / "base.safetensors", "data.spec": folder / "data"}
    sets = [part for part in arguments("x", tmp_path, settings)[1:-2]]
    for command in ("step", "cost"):
        out = tmp_path / command
        assert run(["benchmark", command, *sets, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("measured on: ") and "stage 2" in printed
        assert (out / "results.md").read_text().startswith(f"`mimref benchmark {command}`")
        assert results(out)["metrics"]
    assert "device-hours" in printed
    assert run(["benchmark", "step", "--micro-batch", "900"]) == 2
    error = capsys.readouterr().err
    assert "--micro-batch 900" in error and "128" in error


@pytest.mark.parametrize("images", [1, 2])
def test_compare_checks_the_validation_classes_first(
    images: int, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", per_class=8, split="train")
    write_images(data, per_class=images, classes=("a", "b")[: 3 - images], split="val")
    passes = Passes(monkeypatch)
    assert run(line("compare", folder, "quickstart", "--data", str(data), "--set", "k=3", "--shots", "1")) == 2
    error = capsys.readouterr().err
    assert ("2 clusters" in error) == (images == 1) and ("class a" in error) == (images == 2)
    assert error.count("\n") == 1 and passes.images == 0


@pytest.mark.parametrize(
    "options", [["--pool", "mean"], ["--data", "digits"], ["--set", "encoder.num_heads=2"], ["--resolution", "8"]]
)
def test_features_in_files_are_used_as_they_are(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / name) for name in ("train.npz", "val.npz")]
    for file in files:
        np.savez(file, x=np.eye(4, dtype=np.float32), y=np.arange(4) % 2)
    words = ["knn", "--features", *files, "--k", "1", "--device", "cpu"]
    assert run(words) == 0
    capsys.readouterr()
    assert run([*words, *options]) == 2
    error = capsys.readouterr().err
    assert "no effect" in error and "--features" in error and error.count("\n") == 1
