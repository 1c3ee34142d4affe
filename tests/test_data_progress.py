"""The first scan of many images reports its progress; short scans, and later starts, report nothing."""

import tarfile
import threading
import time
from pathlib import Path

import pytest

from mimref import locks
from mimref.config.base import DataConfig
from mimref.data.index import cache as index_cache
from mimref.data.open import open_source
from mimref.data.readers.folder import listing_key
from mimref.encoders.published import PublishedWeights, fetch
from mimref.evaluation.knn.config import KnnConfig
from mimref.features.inputs import EncoderInputs
from mimref.locks import one_at_a_time
from mimref.pretraining.run import pretrain
from mimref.progress import Silent
from mimref.refinement.plan import make_plan
from tests.tiny import Killed, Watcher, pretrain_config, refine_config, write_images, write_labelled, write_weights

Reports = list[tuple[str, int, int]]
FOLDERS, SHARDS = "listing images, folder by folder", "listing images, shard by shard"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", per_class=2, classes=("a", "b", "c"))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every scan count as a long one."""
    monkeypatch.setattr(index_cache, "LONG_SCAN_S", -1.0)


def reports(spec: object) -> Reports:
    heard: Reports = []
    open_source(DataConfig(spec=str(spec)), "train", progress=lambda *values: heard.append(values))
    return heard


def test_shards(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as shard:
            shard.add(images / name, name)
    spec = f"wds:{tmp_path}/*.tar"
    assert reports(spec) == []
    monkeypatch.setattr(index_cache, "LONG_SCAN_S", -1.0)
    assert reports(spec) == [(SHARDS, 1, 3), (SHARDS, 2, 3), (SHARDS, 3, 3)]
    monkeypatch.setattr(index_cache, "CLOCK_TICK_NS", 0)
    reports(spec)
    assert reports(spec) == []


def test_folders(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (images / "b/deeper").mkdir()
    assert reports(images) == []
    monkeypatch.setattr(index_cache, "LONG_SCAN_S", -1.0)
    # The folder itself first, then its subfolders as they are found.
    assert reports(images) == [(FOLDERS, done, total) for done, total in ((1, 4), (2, 4), (3, 5), (4, 5), (5, 5))]
    monkeypatch.setattr(index_cache, "CLOCK_TICK_NS", 0)
    reports(images)
    assert reports(images) == []


def test_every_command_reports_it(tmp_path: Path, slow: None) -> None:
    data, weights = write_labelled(tmp_path / "data"), write_weights(tmp_path / "base.safetensors")
    heard: list[str] = []

    class Listener(Silent):
        def progress(self, label: str, done: int, total: int) -> None:
            heard.append(label)

    make_plan(refine_config(weights, data), Listener().progress)
    assert heard.count(FOLDERS) == 3
    config = KnnConfig(checkpoint=str(weights), data=DataConfig(spec=str(data)), device="cpu")
    EncoderInputs(config, config.checkpoint, Listener()).source("train")
    assert heard.count(FOLDERS) == 6

    def stop(label: str, _: int) -> None:
        if label == FOLDERS:
            raise Killed

    with pytest.raises(Killed):
        pretrain(pretrain_config(data), tmp_path / "out", listener=Watcher(stop))


def test_waiting_for_another_process_is_reported(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "WAITING_S", 0.05)
    weights = PublishedWeights("maws_b16", (tmp_path / "published.pth").as_uri(), "maws")
    (tmp_path / "published.pth").write_bytes(b"weights")
    held = [index_cache._file("folder", listing_key(str(images))), weights.file]
    holding = threading.Event()

    def hold() -> None:
        with one_at_a_time(held[0]), one_at_a_time(held[1]):
            holding.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    heard: Reports = reports(images)
    assert len(heard) > 1 and set(heard) == {("waiting for another process to list the images", 0, 1)}
    thread.join()
    holding.clear()
    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    labels: list[str] = []
    fetch(weights, lambda label, done, total: labels.append(label))
    assert labels[0] == "waiting for another process to download maws_b16"
    thread.join()
