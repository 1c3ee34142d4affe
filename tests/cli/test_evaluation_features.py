"""Features of evaluations: one pass of a tiny encoder serves them all, from the cache or from files."""

import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mimref.cli import run
from tests.cli.evaluations import CHEAP, Passes, line
from tests.tiny import results, write_images, write_labelled

COMMANDS = [
    ["knn", "--blocks", "last4", "--pool", "cls+mean", "--final-norm"],
    ["lowshot", "--splits", "2"],
    ["cluster", "--runs", "2"],
    ["analyze-blocks"],
    ["probe", "--cached", "--epochs", "2"],
    ["extract", "--blocks", "all", "--out", "features.npz"],
]


@pytest.mark.parametrize("first", [0, 2, 5])
def test_one_pass_of_the_encoder_serves_all(
    first: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    passes = Passes(monkeypatch)
    commands = COMMANDS[first:] + COMMANDS[:first]
    for command in commands:
        assert run(line(command[0], folder, *command[1:])) == 0, capsys.readouterr().err
    assert passes.images == 48 + 16
    # Train and validation images of the first command that needs both; whatever is stored builds no network.
    assert passes.built == 1 if commands[0][0] in ("knn", "lowshot", "analyze-blocks", "probe") else passes.built <= 2


def test_off_and_small_caches_store_what_was_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    for _ in range(2):
        assert run(line("knn", folder, "--cache", "off", "--quiet")) == 0
    assert passes.images == 2 * 64 and not Path(os.environ["MIMREF_CACHE"], "features").exists()
    small = ["--cache", str(tmp_path / "here"), "--set", "cache.keep_gb=0", "--quiet"]
    assert run(line("knn", folder, *small)) == 0 and passes.images == 3 * 64
    assert run(line("lowshot", folder, "--splits", "1", *small)) == 0 and passes.images == 3 * 64
    assert run(line("analyze-blocks", folder, *small)) == 0 and passes.images == 4 * 64
    names = {path.name for path in (tmp_path / "here").glob("*/block*")}
    assert names == {f"block-{block:02d}-cls" for block in range(1, 5)}


def test_cached_features_give_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    for where in ("a", "a", "off"):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        cache = where if where == "off" else str(tmp_path / "cache")
        assert run(line("knn", folder, "--k", "1,5", "--blocks", "all", "--cache", cache, "--out", str(out))) == 0
    found = [results(out)["metrics"] for out in sorted(tmp_path.glob("out-*"))]
    assert len(found) == 3 and found[0] == found[1] == found[2]


def test_a_changed_image_is_noticed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_labelled(tmp_path / "data")
    passes = Passes(monkeypatch)
    for _ in range(2):
        assert run(line("knn", folder, "--data", str(data), "--quiet")) == 0
        assert passes.images == 64
    write_images(tmp_path / "other", per_class=1, split="train")
    (tmp_path / "other" / "train" / "a" / "000.png").replace(data / "train" / "a" / "000.png")
    assert run(line("knn", folder, "--data", str(data), "--quiet")) == 0
    assert passes.images == 64 + 48


# --- features in files


def test_extract_and_evaluate_the_arrays(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        file = str(tmp_path / f"{split}.npz")
        assert run(line("extract", folder, "--split", split, "--blocks", "all", "--out", file, "--quiet")) == 0
    with np.load(tmp_path / "val.npz") as file:
        assert file.files == ["x", "y", "class_names", "paths"]
        assert file["class_names"].tolist() == ["a", "b"]
        assert file["x"].shape == (16, 4, 32) and file["x"].dtype == np.float32
        assert file["y"].tolist() == [0] * 8 + [1] * 8 and file["paths"][0].endswith("data/val/a/000.png")
    files = ["--features", str(tmp_path / "train.npz"), str(tmp_path / "val.npz")]
    outs = []
    for number, given in enumerate((files, [str(folder / "base.safetensors"), *CHEAP])):
        for command in (["knn", "--blocks", "all"], ["lowshot", "--splits", "2"], ["cluster", "--runs", "2"]):
            out = tmp_path / f"{command[0]}{number}"
            assert run([*command, *given, "--out", str(out), "--quiet"]) == 0, capsys.readouterr().err
            outs.append([row["value"] for row in results(out)["metrics"]])
    assert outs[:3] == outs[3:]
    assert run(["knn", "--per-class", *files, "--out", str(tmp_path / "named"), "--quiet"]) == 0
    assert [row.get("class") for row in results(tmp_path / "named")["metrics"]][1:3] == ["a", "b"]
    assert run(["probe", "--cached", *files, "--epochs", "2", "--quiet"]) == 0
    assert run(["knn", str(folder / "base.safetensors"), *files]) == 2
    assert "--features" in capsys.readouterr().err


def test_extract_unlabelled_images_as_a_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "features.parquet"
    more = ["--data", str(folder / "unlabelled"), "--out", str(out), "--pool", "mean"]
    assert run(line("extract", folder, *more)) == 0
    assert "features 48 x 32 in" in capsys.readouterr().err
    table = pd.read_parquet(out)
    assert list(table.columns) == ["path", "split", "x"] and len(table) == 48 and len(table.x[0]) == 32
    assert run(line("extract", folder, *more)) == 2
    error = capsys.readouterr().err
    assert "features.parquet" in error and "--force" in error
    assert run(line("extract", folder, *more, "--force", "--blocks", "2,3")) == 0
    assert list(pd.read_parquet(out).columns) == ["path", "split", "block_2", "block_3"]


@pytest.mark.parametrize("ending", ["parquet", "lance"])
def test_tables_for_vector_databases(
    ending: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All images, in batches: the numbers of the arrays, as fixed-size lists."""
    if ending == "lance":
        pytest.importorskip("lance", reason="pylance is not installed: .lance is not tested")
    arrays, out = tmp_path / "all.npz", tmp_path / f"all.{ending}"
    more = ["--split", "all", "--blocks", "2,4", "--quiet"]
    assert run(line("extract", folder, *more, "--out", str(arrays))) == 0
    monkeypatch.setattr("mimref.features.extraction.BATCH_ELEMENTS", 64 * 7)
    assert run(line("extract", folder, *more, "--out", str(out))) == 0, capsys.readouterr().err
    table = read_table(out)
    vector = pa.list_(pa.float32(), 32)
    assert table.schema.names == ["path", "split", "label", "class", "block_2", "block_4"]
    assert table.schema.field("label").type == pa.int64()
    for name in ("block_2", "block_4"):
        found = table.schema.field(name).type
        assert (found.list_size, found.value_type) == (vector.list_size, vector.value_type)
    with np.load(arrays) as file:
        assert file.files == ["x", "y", "class_names", "splits", "paths"]
        for number, name in enumerate(("block_2", "block_4")):
            assert np.array_equal(np.stack(table[name].to_pylist()).astype(np.float32), file["x"][:, number])
        assert table["path"].to_pylist() == file["paths"].tolist()
        assert table["split"].to_pylist() == file["splits"].tolist() == ["train"] * 48 + ["val"] * 16
        assert table["label"].to_pylist() == file["y"].tolist()
    assert [{"a": 0, "b": 1}[name] for name in table["class"].to_pylist()] == table["label"].to_pylist()
    assert run(line("extract", folder, *more, "--out", str(out))) == 2
    assert "--force" in capsys.readouterr().err
    assert run(line("extract", folder, "--quiet", "--out", str(out), "--force")) == 0
    assert read_table(out).schema.names[-1] == "x" and len(read_table(out)) == 16
    assert {path.name for path in tmp_path.iterdir()} == {"all.npz", out.name}


def read_table(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        return pq.read_table(path)
    import lance

    return lance.dataset(path).to_table()


def test_lance_is_refused_where_it_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lance", ModuleType("lance"))
    (tmp_path / "mine.lance").mkdir()
    assert run(line("extract", folder, "--out", str(tmp_path / "mine.lance"), "--force")) == 2
    assert "mine.lance" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lance", None)
    assert run(line("extract", folder, "--out", str(tmp_path / "x.lance"))) == 2
    error = capsys.readouterr().err
    assert "mimref[lance]" in error and error.count("\n") == 1


def test_features_in_odd_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, x, y = tmp_path / "good.npz", np.ones((4, 3), np.float32), np.array([0, 1, 0, 1])
    np.savez(good, x=x, y=y)
    (tmp_path / "text.npz").write_text("x")
    np.savez(tmp_path / "nokey.npz", x=x)
    np.savez(tmp_path / "rows.npz", x=x, y=y[:2])
    np.savez(tmp_path / "type.npz", x=x, y=y / 2)
    np.savez(tmp_path / "nan.npz", x=np.full((4, 3), np.nan, np.float32), y=y)
    np.savez(tmp_path / "one.npz", x=x, y=y * 0)
    np.savez(tmp_path / "lacks.npz", x=x, y=y + 1)
    np.save(tmp_path / "plain.npy", x)
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-30])
    flipped = bytearray(good.read_bytes())
    flipped[flipped.index(b"\x00\x00\x80?") + 2] ^= 1  # in the first 1.0 of x
    (tmp_path / "flipped.npz").write_bytes(flipped)
    messages = {
        "missing.npz": ".npz",
        "text.npz": ".npz",
        "cut.npz": ".npz",
        "flipped.npz": "CRC-32",
        "nokey.npz": "y (labels)",
        "plain.npy": "x (features)",
        "rows.npz": "(2,)",
        "type.npz": "float64",
        "nan.npz": "image 0",
        "lacks.npz": "class 2",
    }
    for name, message in messages.items():
        assert run(["knn", "--features", str(good), str(tmp_path / name), "--k", "1"]) == 2
        error = capsys.readouterr().err
        named = name in error or error.startswith("mimref: error: test: ")
        assert named and message in error and error.count("\n") == 1, error
    assert run(["knn", "--features", str(tmp_path / "one.npz"), str(good), "--k", "1"]) == 2
    assert "class 0" in capsys.readouterr().err


def test_a_damaged_cache_is_reported_and_computed_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--cache", str(tmp_path / "cache"), "--out"]
    assert run(line("knn", folder, *cache, str(tmp_path / "a"))) == 0
    for file in (tmp_path / "cache").glob("*/block-04-cls"):
        file.write_bytes(b"\0" * file.stat().st_size)
    capsys.readouterr()
    assert run(line("knn", folder, *cache, str(tmp_path / "b"))) == 0
    assert "block-04-cls" in capsys.readouterr().err
    assert results(tmp_path / "a")["metrics"] == results(tmp_path / "b")["metrics"]
