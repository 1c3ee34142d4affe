"""The feature cache: features are read as they were computed, whatever happens to the process or disk in between."""

import errno
import json
import multiprocessing
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from mimref.cli import run
from mimref.data.decode import BadImage
from mimref.data.sources import ArraySource
from mimref.data.traits import TURNED
from mimref.errors import ConfigError, DataError, OutputError
from mimref.features.cache import partial
from mimref.features.cache.contents import clear, damaged_files, list_entries
from mimref.features.cache.store import FORMAT, Entry, FeatureCache, pass_key
from mimref.features.encode import Batch, Column, gather
from mimref.progress import Listener, Silent

CLS, MEAN, OTHER = Column(2, "cls"), Column(2, "mean"), Column(1, "cls")
IMAGES, BATCH = 23, 4
BAD = {5, 6}


def value(column: Column, index: int) -> list[float]:
    """The feature of an image."""
    return [index + 0.25, 100.0 * column.block + (column.pool == "mean"), -index / 3]


class Notes(Silent):
    """A listener that records notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def cached(tmp_path: Path, listener: Listener | None = None, dtype: str = "fp32") -> FeatureCache:
    return FeatureCache(folder(tmp_path), listener or Silent(), dtype)


class Pass:
    """An encoder pass that records its calls, counts its images, and may be interrupted."""

    def __init__(self, stop_at: int | None = None, error: BaseException | None = None) -> None:
        self.calls: list[tuple[list[Column], int]] = []
        self.images = 0
        self.stop_at, self.error = stop_at, error or KeyboardInterrupt()

    def __call__(self, columns: list[Column], start: int) -> Iterator[Batch]:
        self.calls.append((columns, start))
        for begin in range(start, IMAGES, BATCH):
            end = min(begin + BATCH, IMAGES)
            if self.stop_at is not None and end > self.stop_at:
                raise self.error
            kept = [index for index in range(begin, end) if index not in BAD]
            self.images += end - begin
            arrays = [np.array([value(column, i) for i in kept], dtype=np.float32) for column in columns]
            bad = [(f"{index}.png", "torn") for index in range(begin, end) if index in BAD]
            yield Batch(end, kept, bad, arrays if kept else [])


def spec(**changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "format": FORMAT,
        "weights": "w",
        "architecture": {"depth": 2},
        "data": "d",
        "images": IMAGES,
        "transform": {"image_size": 8},
        "precision": "float32",
    }
    return facts | changes


def folder(tmp_path: Path) -> Path:
    return tmp_path / "features"


def check(stored: Any, columns: list[Column], tolerance: float = 0.0) -> None:
    kept = [index for index in range(IMAGES) if index not in BAD]
    assert stored.indices.tolist() == kept and stored.bad == [("5.png", "torn"), ("6.png", "torn")]
    for column in columns:
        expected = np.array([value(column, index) for index in kept], dtype=np.float32)
        np.testing.assert_allclose(stored.columns[column], expected, rtol=tolerance, atol=0)


def test_a_pass_is_done_once(tmp_path: Path) -> None:
    cache, first, again = cached(tmp_path), Pass(), Pass()
    told: list[tuple[int, int]] = []
    check(cache.columns(spec(), [CLS], first, also=[MEAN], progress=lambda *at: told.append(at)), [CLS])
    assert first.calls == [([CLS, MEAN], 0)] and told[-1] == (IMAGES, IMAGES)
    stored = cache.columns(spec(), [MEAN, CLS], again)
    check(stored, [MEAN, CLS])
    assert again.calls == [] and isinstance(stored.columns[CLS], np.memmap)
    # Missing columns are added; existing ones are kept.
    more = Pass()
    check(cache.columns(spec(), [OTHER, CLS], more, also=[MEAN]), [OTHER, CLS])
    assert more.calls == [([OTHER], 0)]
    check(cache.columns(spec(), [OTHER, CLS, MEAN], again), [OTHER, CLS, MEAN])
    assert again.calls == []


@pytest.mark.parametrize("change", ["weights", "architecture", "data", "images", "transform", "precision", "dtype"])
def test_whatever_changes_the_numbers_changes_the_key(change: str) -> None:
    values: dict[str, Any] = {"architecture": {"depth": 3}, "transform": {"image_size": 9}, "images": 3}
    dtype = "fp16" if change == "dtype" else "fp32"
    changed = spec() if change == "dtype" else spec(**{change: values.get(change, "other")})
    assert pass_key(changed, dtype) != pass_key(spec(), "fp32") == pass_key(json.loads(json.dumps(spec())), "fp32")


def test_half_precision(tmp_path: Path) -> None:
    cache = cached(tmp_path, dtype="fp16")
    stored = cache.columns(spec(), [CLS], Pass())
    assert stored.columns[CLS].dtype == np.float16
    check(stored, [CLS], tolerance=1e-3)

    def too_large(columns: list[Column], start: int) -> Iterator[Batch]:
        yield Batch(IMAGES, [0], [], [np.full((1, 3), 7e4, dtype=np.float32)])

    with pytest.raises(ConfigError, match=r"^features of block-01-cls .*cache.dtype=fp32"):
        cache.columns(spec(), [OTHER], too_large)
    check(cache.columns(spec(), [CLS], Pass()), [CLS], tolerance=1e-3)


def test_no_readable_image(tmp_path: Path) -> None:
    def nothing(columns: list[Column], start: int) -> Iterator[Batch]:
        yield Batch(IMAGES, [], [("0.png", "torn")], [])

    with pytest.raises(DataError, match="no readable image"):
        cached(tmp_path).columns(spec(), [CLS], nothing)
    with pytest.raises(DataError, match="noise: no readable image"):
        gather(nothing([CLS], 0), [CLS], IMAGES, "noise")
    assert list_entries(folder(tmp_path))[0].columns == "unfinished"


# --- interruptions


@pytest.mark.parametrize("stop_at", [1, 4, 7, 22, 23])
def test_an_interrupted_pass_resumes(stop_at: int, tmp_path: Path) -> None:
    listener = Notes()
    cache, first, second = cached(tmp_path, listener), Pass(stop_at), Pass()
    if stop_at < IMAGES:
        with pytest.raises(KeyboardInterrupt):
            cache.columns(spec(), [CLS, MEAN], first)
    check(cache.columns(spec(), [CLS, MEAN], second), [CLS, MEAN])
    assert first.images + second.images == IMAGES or stop_at >= IMAGES
    assert len(listener.notes) == (1 if BATCH <= stop_at < IMAGES else 0)
    assert not (Entry(folder(tmp_path) / pass_key(spec(), "fp32")).folder / "partial").exists()


def _killed(where: Path) -> None:
    partial.SAVE_EVERY_S = 0.0

    def until_killed(columns: list[Column], start: int) -> Iterator[Batch]:
        for number, batch in enumerate(Pass()(columns, start)):
            if number == 3:
                os.kill(os.getpid(), 9)
            yield batch

    FeatureCache(where, Silent()).columns(spec(), [CLS], until_killed)


def test_a_killed_pass_resumes(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(folder(tmp_path),))
    process.start()
    process.join(30)
    assert process.exitcode == -9
    again = Pass()
    check(cached(tmp_path).columns(spec(), [CLS], again), [CLS])
    assert again.calls == [([CLS], 3 * BATCH)]


@pytest.mark.parametrize("damage", ["flip", "cut", "progress", "other columns"])
def test_a_partial_pass_that_does_not_fit_starts_over(damage: str, tmp_path: Path) -> None:
    cache = cached(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.columns(spec(), [CLS], Pass(12))
    left = folder(tmp_path) / pass_key(spec(), "fp32") / "partial"
    data = (left / CLS.name).read_bytes()
    if damage == "flip":
        (left / CLS.name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        (left / CLS.name).write_bytes(data[:-5])
    elif damage == "progress":
        (left / "progress.json").write_text("{")
    again = Pass()
    wanted = [CLS, MEAN] if damage == "other columns" else [CLS]
    check(cache.columns(spec(), wanted, again), wanted)
    assert again.calls == [(wanted, 0)]


def test_another_process_waits_and_reads(tmp_path: Path) -> None:
    entry = Entry(folder(tmp_path) / pass_key(spec(), "fp32"))
    entry.folder.mkdir(parents=True)
    queue: Any = multiprocessing.get_context("fork").Queue()
    listener = Notes()
    listener.note = queue.put  # type: ignore[method-assign]

    def other() -> None:
        run_pass = Pass()
        cached(tmp_path, listener).columns(spec(), [CLS], run_pass)
        queue.put(len(run_pass.calls))

    with FileLock(entry.lock_file):
        process = multiprocessing.get_context("fork").Process(target=other)
        process.start()
        assert "waiting for another process" in queue.get(timeout=30)
        # Meanwhile the holder of the lock finishes the pass.
        FeatureCache(tmp_path / "made", Silent()).columns(spec(), [CLS], Pass())
        shutil.copytree(tmp_path / "made" / entry.folder.name, entry.folder, dirs_exist_ok=True)
    assert queue.get(timeout=30) == 0
    process.join(30)
    assert process.exitcode == 0


# --- damage


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "images", "entry", "not json", "keys"])
def test_damaged_files_are_noticed_and_computed_again(damage: str, tmp_path: Path) -> None:
    listener = Notes()
    cache = cached(tmp_path, listener)
    cache.columns(spec(), [CLS, MEAN], Pass())
    entry = folder(tmp_path) / pass_key(spec(), "fp32")
    name = {"images": "images", "entry": "entry.json", "not json": "entry.json", "keys": "entry.json"}
    file = entry / name.get(damage, CLS.name)
    data = file.read_bytes()
    if damage in ("flip", "images"):
        file.write_bytes(data[:9] + bytes([data[9] ^ 4]) + data[10:])
    elif damage == "gone":
        file.unlink()
    elif damage == "keys":
        file.write_text(json.dumps({"rows": 3, "dtype": "fp32", "columns": {}}))
    else:
        file.write_bytes(b"[1]" if damage == "not json" else data[: len(data) // 2])
    assert [bad for _, bad in damaged_files(folder(tmp_path))] == [[file.name]]
    again = Pass()
    check(cache.columns(spec(), [CLS, MEAN], again), [CLS, MEAN])
    # Only the damaged file is lost, unless the other files depend on it.
    assert again.calls == [([CLS] if damage in ("flip", "cut", "gone") else [CLS, MEAN], 0)]
    assert any(f"damaged ({file.name})" in note for note in listener.notes)
    assert [bad for _, bad in damaged_files(folder(tmp_path))] == [[]]


def test_images_that_have_become_unreadable_replace_the_entry(tmp_path: Path) -> None:
    cache = cached(tmp_path)
    cache.columns(spec(), [CLS], Pass())
    BAD.add(7)
    try:
        stored = cache.columns(spec(), [MEAN], Pass())
        assert 7 not in stored.indices
        again = Pass()
        stored = cache.columns(spec(), [CLS], again)
        assert len(stored.columns[CLS]) == len(stored.indices) == IMAGES - 3 and len(again.calls) == 1
    finally:
        BAD.discard(7)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    listener, run_pass = Notes(), Pass()
    stored = FeatureCache(tmp_path / "file" / "cache", listener).columns(spec(), [CLS], run_pass, also=[MEAN])
    check(stored, [CLS])
    assert len(listener.notes) == 1 and "cannot be written (Not a directory)" in listener.notes[0]
    assert run_pass.calls == [([CLS], 0)]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cached(tmp_path)
    written = partial.PartialPass._write
    count = 0

    def full(self: partial.PartialPass, name: str, data: memoryview) -> None:
        nonlocal count
        count += 1
        if count > 8:  # in the third batch: three files each
            self._files[name].close()
            self._files[name] = _Full(self.folder / name)
        written(self, name, data)

    monkeypatch.setattr(partial.PartialPass, "_write", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        cache.columns(spec(), [CLS], Pass())
    monkeypatch.undo()
    again = Pass()
    check(cache.columns(spec(), [CLS], again), [CLS])
    assert again.calls == [([CLS], 2 * BATCH)]


class _Full:
    """A file on a disk that has room for only one more byte."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, data: memoryview) -> int:
        self.file.write(data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()


def test_too_little_space_is_reported_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda path: usage)
    run_pass = Pass()
    with pytest.raises(OutputError, match=r"features need 0\.0 GB, 0\.0 GB are free; .*--cache"):
        cached(tmp_path).columns(spec(), [CLS], run_pass)
    assert run_pass.images == BATCH


# --- the command


def test_the_cache_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = folder(tmp_path)
    cache = FeatureCache(where, Silent())
    about = {"model": "mine", "data": "digits", "split": "val"}
    cache.columns(spec(), [CLS, MEAN], Pass(), about=about)
    cache.columns(spec(weights="x"), [CLS], Pass(), about=about | {"model": "other"})
    entries = list_entries(where)
    assert {(entry.model, entry.data, entry.rows, entry.columns) for entry in entries} == {
        ("mine", "digits val", 21, "2 x fp32"),
        ("other", "digits val", 21, "1 x fp32"),
    }
    assert all(entry.bytes > 21 * 12 for entry in entries)
    assert run(["cache", "list", "--cache", str(where)]) == 0
    printed = capsys.readouterr().out
    assert "mine" in printed and "other" in printed and str(where) in printed.replace("\n", "")
    assert run(["cache", "verify", "--cache", str(where)]) == 0
    assert "2 cached passes" in capsys.readouterr().out
    key = pass_key(spec(), "fp32")
    (where / key / CLS.name).write_bytes(b"")
    assert run(["cache", "verify", "--cache", str(where)]) == 2
    assert f"damaged: {key}/{CLS.name}" in capsys.readouterr().err
    assert run(["cache", "clear", "nothing", "--cache", str(where)]) == 2
    assert "cache entry 'nothing' is not in" in capsys.readouterr().err
    with FileLock(Entry(where / key).lock_file):
        assert run(["cache", "clear", key[:6], "--cache", str(where)]) == 0
        assert f"{key} is in use" in capsys.readouterr().err
    assert clear(where, [key[:6]])[1] == [] and [entry.model for entry in list_entries(where)] == ["other"]
    assert run(["cache", "clear", "--cache", str(where)]) == 0
    assert not list(where.iterdir()) and list_entries(where / "nowhere") == []


def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    width, batch, images = 1024, 64, 64 * 400

    def large(columns: list[Column], start: int) -> Iterator[Batch]:
        rows = np.ones((batch, width), dtype=np.float32)
        for begin in range(start, images, batch):
            yield Batch(begin + batch, list(range(begin, begin + batch)), [], [rows])

    # The memory of the process depends on what its allocator kept from earlier tests; numpy reports to tracemalloc.
    tracemalloc.start()
    try:
        stored = cached(tmp_path).columns(spec(images=images), [CLS], large)
        assert stored.columns[CLS].nbytes == images * width * 4  # 105 MB
        assert stored.columns[CLS][-1].sum() == width
        assert tracemalloc.get_traced_memory()[1] < 20e6, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


class Images(ArraySource):
    """A source whose images `BAD` cannot be read until they are mended."""

    def __init__(self) -> None:
        pixels = np.zeros((IMAGES, 2, 2), np.uint8)
        super().__init__("images", pixels, None, None, "val", np.arange(IMAGES))
        self.mended: set[int] = set()

    def read(self, index: int) -> torch.Tensor:
        if index in BAD and index not in self.mended:
            raise BadImage(self.path(index), "permission denied")
        return super().read(index)

    def path(self, index: int) -> str:
        return f"{index}.png"


def test_images_that_can_be_read_again_are_used(tmp_path: Path) -> None:
    cache, images, told = cached(tmp_path, Notes()), Images(), Pass()
    cache.columns(spec(), [CLS], told, source=images)
    cache.columns(spec(), [CLS], told, source=images)
    assert len(told.calls) == 1  # still unreadable
    images.mended = {max(BAD)}
    cache.columns(spec(), [CLS], told, source=images)
    assert told.calls == [([CLS], 0)] * 2
    assert any("can be read now" in line for line in cache.listener.notes)  # type: ignore[attr-defined]


@pytest.mark.parametrize("mended", [False, True])
def test_a_resumed_pass_tries_unreadable_images_again(mended: bool, tmp_path: Path) -> None:
    cache, images, again = cached(tmp_path), Images(), Pass()
    after = max(BAD) // BATCH * BATCH + BATCH
    with pytest.raises(KeyboardInterrupt):
        cache.columns(spec(), [CLS], Pass(after), source=images)
    images.mended = {max(BAD)} if mended else set()
    cache.columns(spec(), [CLS], again, source=images)
    assert again.calls == [([CLS], 0 if mended else after)]


def test_columns_whose_rows_no_longer_match_are_computed_again(tmp_path: Path) -> None:
    cache, everything = cached(tmp_path), Pass()

    def fewer(columns: list[Column], start: int) -> Iterator[Batch]:
        for batch in Pass()(columns, start):
            kept = [row for row, index in enumerate(batch.indices) if index]
            yield batch._replace(
                indices=batch.indices[1:] if 0 in batch.indices else batch.indices,
                columns=[values[kept] for values in batch.columns],
            )

    cache.columns(spec(), [CLS], everything)
    found = cache.columns(spec(), [CLS, MEAN], fewer)
    assert len(found) == len(found.matrix([CLS])) == len(found.matrix([MEAN])) and 0 not in found.indices


def test_traits_of_an_interrupted_pass_are_kept(tmp_path: Path) -> None:
    def run_pass(stop: int | None) -> Callable[[list[Column], int], Iterator[Batch]]:
        return lambda columns, start: (
            batch._replace(traits=[TURNED] * len(batch.indices)) for batch in Pass(stop)(columns, start)
        )

    images = Images()
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path).columns(spec(), [CLS], run_pass(2 * BATCH), source=Images())
    cached(tmp_path).columns(spec(), [CLS], run_pass(None), source=images)
    (line,) = images.peculiarities()
    resumed = len([index for index in range(2 * BATCH) if index not in BAD])
    assert line.startswith(f"{resumed} of {resumed} images")  # the pass records the others as it reads them
