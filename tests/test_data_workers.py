"""Loader processes that die: reported with their image by every loader, and never in the middle of something else."""

import atexit
import errno
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from mimref.data import workers
from mimref.data.loader import CropBatch, ViewBatch, crop_batches, view_batches
from mimref.data.sources import ArraySource
from mimref.data.transforms import EvalTransform
from mimref.data.views import CropGroup
from mimref.data.workers import DeadWorkerError
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import DataError
from mimref.features.encode import Column, PassSettings, extract

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


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "Killed"), (signal.SIGSEGV, "Segmentation fault")])
def test_every_loader_names_the_image(number: int, name: str) -> None:
    with pytest.raises(DeadWorkerError, match=rf"\({name}\) at set/train/9, .* fewer --workers") as caught:
        list(crops(9, number=number))
    assert "\n" not in str(caught.value)
    with pytest.raises(DeadWorkerError, match=r"\(Killed\) at set/train/9, "):
        list(views(9, processes=2))


def test_an_evaluation_names_it() -> None:
    encoder = build_encoder(Architecture("custom", 8, width=16, depth=1, num_heads=1, patch_size=4))
    with pytest.raises(DataError, match=r"\(Killed\) at set/train/5, .* fewer --workers"):
        extract(encoder, Deadly(5), PassSettings(EvalTransform(8), torch.device("cpu"), workers=1), [Column(1, "cls")])


def test_a_death_waits_for_its_batch() -> None:
    """Nothing is raised while the main process writes a file, or evaluates with other loader processes."""
    training = views(int(list(views(processes=0))[3].sample_B[0]))
    next(training)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        pass  # torch's handler would raise here
    assert len(list(crops())) == COUNT // 2
    with pytest.raises(DeadWorkerError, match=r"\(Killed\) at set/train/"):
        list(training)


def test_outside_the_main_thread_the_image_is_named_too() -> None:
    found: list[str] = []

    def read() -> None:
        try:
            list(crops(4))
        except DataError as error:
            found.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert len(found) == 1 and "(Killed) at set/train/4, " in found[0]


def test_other_errors_are_not_dead_workers() -> None:
    class Broken(Deadly):
        def read(self, index: int) -> torch.Tensor:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error") as caught:
        list(crop_batches(Broken(), EvalTransform(8), batch_size=2, workers=1))
    # Although the traceback still holds the loader.
    assert caught.tb is not None and multiprocessing.active_children() == []


def test_a_process_ends_although_it_has_not_finished_reading() -> None:
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # which would be the exit status
        atexit._clear()
        atexit.register(multiprocessing.util._exit_function)  # what Python does at exit
        batches = crops(processes=2)
        next(batches)
        atexit._run_exitfuncs()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_death_of_unknown_cause_is_reported_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "DYING_S", 0.0)
    processes: Any = []
    error = RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly")
    assert workers._death_behind(error, processes, {}) == f"a loader process died ({error})"
    reset = ConnectionResetError(errno.ECONNRESET, "Connection reset")
    assert workers._death_behind(reset, processes, {}) is None
