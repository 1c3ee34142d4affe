"""Loader processes that die: told with their image by every loader, and never in the middle of something else."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from mimref.data import workers
from mimref.data.loader import CropBatch, ViewBatch, crop_batches, view_batches
from mimref.data.sources import ArraySource
from mimref.data.transforms import EvalTransform
from mimref.data.views import CropGroup
from mimref.data.workers import DeadWorkerError, Reading
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import DataError
from mimref.features.encode import extract

COUNT = 24


class Deadly(ArraySource):
    """Images of which one ends the process that reads it, unless that is the main process."""

    def __init__(self, last: int | None = None, number: int = signal.SIGKILL) -> None:
        super().__init__("set", np.zeros((COUNT, 8, 8), np.uint8), None, None, "train", np.arange(COUNT))
        self.last, self.number = last, number

    def read(self, index: int) -> torch.Tensor:
        if get_worker_info() is not None and index == self.last:
            os.kill(os.getpid(), self.number)
            time.sleep(10)
        return super().read(index)


def crops(last: int | None = None, *, number: int = signal.SIGKILL, processes: int = 1) -> Iterator[CropBatch]:
    return crop_batches(Deadly(last, number), EvalTransform(8), batch_size=2, workers=processes)


def views(last: int | None = None, *, processes: int = 1) -> Iterator[ViewBatch]:
    groups = [CropGroup(1, 8, (0.5, 1.0))]
    return view_batches(Deadly(last), groups, batch_size=2, seed=0, epochs=range(1), workers=processes)


def handler() -> object:
    return signal.getsignal(signal.SIGCHLD)


@pytest.fixture(autouse=True)
def torch_handler() -> object:
    """torch installs its own handler with the first loader of a process, for good."""
    assert len(list(crops())) == COUNT // 2
    return handler()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "Killed"), (signal.SIGSEGV, "Segmentation fault")])
def test_every_loader_names_the_image(number: int, name: str) -> None:
    with pytest.raises(DataError) as told:
        list(crops(9, number=number))
    assert str(told.value) == (
        f"a loader process died ({name}) at set/train/9, or just after it; try fewer --workers if memory ran out"
    )
    with pytest.raises(DeadWorkerError, match=r"^a loader process died \(Killed\) at set/train/9, or just after it; "):
        list(views(9, processes=2))


def test_an_evaluation_says_so() -> None:
    encoder = build_encoder(Architecture("custom", 8, width=16, depth=1, num_heads=1, patch_size=4))
    with pytest.raises(DataError, match=r"died \(Killed\) at set/train/5, .* fewer --workers"):
        extract(encoder, Deadly(5), EvalTransform(8), blocks=[1], device=torch.device("cpu"), workers=2)


def test_the_handler_is_put_back(torch_handler: object) -> None:
    assert len(list(views())) == COUNT // 2
    assert handler() is torch_handler
    early = crops()
    next(early)
    assert handler() is not torch_handler
    early.close()  # type: ignore[attr-defined]
    assert handler() is torch_handler
    with pytest.raises(DataError):
        list(crops(3))
    assert handler() is torch_handler
    next(crops(processes=0))
    assert handler() is torch_handler


@pytest.mark.parametrize("first", [0, 1])
def test_loaders_may_end_in_any_order(first: int, torch_handler: object) -> None:
    loaders = [views(), crops()]
    for loader in loaders:
        next(loader)
    watching = handler()
    assert watching is not torch_handler
    loaders.pop(first).close()  # type: ignore[attr-defined]
    assert handler() is watching
    assert len(list(loaders.pop())) == COUNT // 2 - 1
    assert handler() is torch_handler


def test_a_handler_of_someone_else_stays() -> None:
    def other(*_: object) -> None:
        pass

    loader = crops()
    next(loader)
    before = signal.signal(signal.SIGCHLD, other)
    try:
        list(loader)
        assert handler() is other
    finally:
        signal.signal(signal.SIGCHLD, before)
        list(crops())


def test_a_death_waits_for_its_batch(torch_handler: object) -> None:
    """Nothing is raised while the main process writes a file, or evaluates with other loader processes."""
    training = views(int(list(views(processes=0))[3].sample_B[0]))
    next(training)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        pass  # torch's handler would raise here
    assert len(list(crops())) == COUNT // 2
    with pytest.raises(DeadWorkerError, match=r"\(Killed\) at set/train/"):
        list(training)
    assert handler() is torch_handler


def test_outside_the_main_thread_the_image_is_named_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # Python watches in the main thread alone, where torch's own handler would raise.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    found: list[str] = []

    def read() -> None:
        try:
            list(crops(4))
        except DataError as error:
            found.append(str(error))

    try:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGCHLD, before)
    (line,) = found
    assert line.startswith("a loader process died (") and " at set/train/4, or just after it; " in line


def test_other_errors_are_no_dead_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "DYING_S", 0.0)

    class Broken(Deadly):
        def read(self, index: int) -> torch.Tensor:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error") as caught:
        list(crop_batches(Broken(), EvalTransform(8), batch_size=2, workers=1))
    # Although the traceback still holds the loader.
    assert caught.tb is not None and multiprocessing.active_children() == []


def test_a_process_ends_although_it_has_not_finished_reading(tmp_path: Path) -> None:
    script = """
import numpy as np
from mimref.data.loader import crop_batches
from mimref.data.open import ArraySource
from mimref.data.transforms import EvalTransform
images = np.zeros((40, 8, 8), np.uint8)
source = ArraySource("zeros", images, None, None, "train", np.arange(40))
batches = crop_batches(source, EvalTransform(8), batch_size=2, workers=2)
print(next(batches).end)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_a_death_that_was_not_seen_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "DYING_S", 0.0)
    watch = workers._Watch(Reading(Deadly(), 2))
    error = RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly")
    assert watch.death_behind(error) == f"a loader process died ({error})"
    assert watch.death_behind(ConnectionResetError(errno.ECONNRESET, "Connection reset")) is None
