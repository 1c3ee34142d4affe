"""Loader processes that die: every loader reports them with their image, and never in the middle of other work."""

import atexit
import errno
import faulthandler
import multiprocessing
import multiprocessing.util
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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
    """A source with an image that kills the process that reads it, unless that is the main process."""

    def __init__(self, last: int | None = None, number: int = signal.SIGKILL) -> None:
        super().__init__("set", np.zeros((COUNT, 8, 8), np.uint8), None, None, "train", np.arange(COUNT))
        self.last, self.number = last, number

    def read(self, index: int) -> torch.Tensor:
        if multiprocessing.parent_process() is not None and index == self.last:
            faulthandler.disable()  # otherwise a segmentation fault fills the terminal
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
    # The process has ended, although the traceback still holds the loader.
    assert caught.tb is not None and multiprocessing.active_children() == []


def test_a_process_ends_although_it_has_not_finished_reading() -> None:
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # the alarm would show in the exit status
        atexit._clear()
        atexit.register(multiprocessing.util._exit_function)  # what Python does at exit
        batches = crops(processes=2)
        next(batches)
        atexit._run_exitfuncs()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_process_that_exits_is_reported_too() -> None:
    class Leaving(Deadly):
        def read(self, index: int) -> torch.Tensor:
            os._exit(0)

    with pytest.raises(DeadWorkerError, match=r"\(exit code 0\) at set/train/0, "):
        list(crop_batches(Leaving(), EvalTransform(8), batch_size=2, workers=1))


# --- a process that hangs


def test_a_stopped_process_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHECK_S", 0.05)
    with pytest.raises(DeadWorkerError, match=r"stopped \(SIGSTOP\) at set/train/9, "):
        list(crops(9, number=signal.SIGSTOP, processes=2))
    assert multiprocessing.active_children() == []


def test_a_process_that_is_stopped_and_continued_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHECK_S", 0.1)
    read = Deadly.read

    def paused(self: Deadly, index: int) -> torch.Tensor:
        if multiprocessing.parent_process() is not None and index == 5:
            if os.fork() == 0:
                time.sleep(0.25)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
        return read(self, index)

    monkeypatch.setattr(Deadly, "read", paused)
    assert [batch.end for batch in crops()] == list(range(2, COUNT + 1, 2))


def forever(*_: Any) -> Any:
    time.sleep(60)


def half_a_message(pipe: Any, kind: bytes, parts: Any, watch: Any) -> None:
    workers._write(pipe, workers._HEADER.pack(kind, len(parts[0])), watch)
    workers._write(pipe, parts[0][:5], watch)
    forever()


@pytest.mark.parametrize("stuck", ["at an image", "after its images", "within a message", "before it takes a task"])
def test_a_stalled_process_is_given_up(stuck: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHECK_S", 0.02)
    monkeypatch.setattr(workers, "STALLED_CHECKS", 25)
    if stuck == "at an image":
        monkeypatch.setattr(Deadly, "read", lambda self, index: forever() if index else torch.zeros(3, 8, 8))
    elif stuck == "after its images":
        monkeypatch.setattr(workers, "_packed", forever)
    elif stuck == "within a message":
        send = workers._send
        parent = os.getpid()
        monkeypatch.setattr(workers, "_send", lambda *message: (half_a_message, send)[os.getpid() == parent](*message))
    else:
        # The batches have lists that do not fit into the pipe.
        monkeypatch.setattr(workers, "_serve", forever)
    groups = [CropGroup(1, 8, (0.5, 1.0))]
    started = time.monotonic()
    place = "; check" if stuck.startswith("before") else " at set/train/1, or just after it; check"
    with pytest.raises(DeadWorkerError, match=rf"has done nothing for [0-9.]+ minutes{place}"):
        if stuck.startswith("before"):
            source = ArraySource("set", np.zeros((40000, 1, 1), np.uint8), None, None, "train", np.arange(40000))
            list(view_batches(source, groups, batch_size=40000, seed=0, epochs=range(2), workers=1))
        list(crops())
    assert 0.5 <= time.monotonic() - started < 10
    assert multiprocessing.active_children() == []


# --- how batches travel


def test_no_shared_memory_is_needed(tmp_path: Path) -> None:
    """Docker's /dev/shm is 64 MB; here it is full."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("needs root and unshare")
    (tmp_path / "script.py").write_text(
        "import numpy as np, torch\n"
        "from mimref.data.loader import crop_batches\n"
        "from mimref.data.sources import ArraySource\n"
        "from mimref.data.transforms import EvalTransform\n"
        "images = np.random.default_rng(0).integers(0, 256, (64, 224, 224), np.uint8)\n"
        "source = ArraySource('set', images, None, None, 'train', np.arange(64))\n"
        "ways = [crop_batches(source, EvalTransform(224, 1.0), batch_size=16, workers=n) for n in (0, 2)]\n"
        "for one, other in zip(*ways, strict=True):\n"
        "    assert torch.equal(one.crops, other.crops) and one.crops.shape == (16, 3, 224, 224)\n"
    )
    mount = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero >/dev/shm/full && exec "$@"'
    line = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_batches_arrive_as_they_are() -> None:
    """Tensors of every type and shape, even empty ones, arrive in writable memory."""
    tensors = [torch.arange(6).view(2, 3), torch.empty(0, 3, 8, 8), torch.ones((), dtype=torch.bool)]
    tensors.append(torch.rand(4, 5, dtype=torch.float64).t())
    parts = workers._packed((tensors, [("path", "reason")], 7))
    batch, sizes = pickle.loads(parts[0])
    assert sizes == [memoryview(part).nbytes for part in parts[1:]]
    loaded, bad, number = pickle.loads(batch, buffers=[bytearray(part) for part in parts[1:]])
    assert (bad, number) == ([("path", "reason")], 7)
    for one, other in zip(loaded, tensors, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
        one.zero_()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_task_may_be_longer_than_a_pipe(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process must not wait for room for a task while the loader process waits for room for its batch."""
    monkeypatch.setattr(workers, "CHECK_S", 0.05)
    monkeypatch.setattr(workers, "STALLED_CHECKS", 100)

    class Sums(workers.BatchDataset[torch.Tensor]):
        def __getitem__(self, batch: list[int]) -> torch.Tensor:
            return torch.full((1 << 17,), sum(batch))

    batches = [list(range(start, 30000)) for start in range(5)]
    loaded = list(workers.load(Sums(Deadly()), batches, workers=processes))
    assert [int(each[0]) for each in loaded] == list(map(sum, batches))


def test_too_few_descriptors_for_the_processes() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
    try:
        with pytest.raises(DataError, match=r"cannot start 16 loader processes \(Too many open files\).*--workers 0"):
            list(crops(processes=16))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert multiprocessing.active_children() == []


def test_memory_that_runs_out_is_reported_with_the_image() -> None:
    class Large(Deadly):
        def read(self, index: int) -> torch.Tensor:
            if index == 5:
                raise MemoryError
            return super().read(index)

    with pytest.raises(DeadWorkerError, match=r"ran out of memory at set/train/5, .*; set fewer --workers"):
        list(crop_batches(Large(), EvalTransform(8), batch_size=2, workers=1))


def test_an_error_that_cannot_be_pickled_keeps_its_text() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("text of its own")

    class Broken(Deadly):
        def read(self, index: int) -> torch.Tensor:
            raise Odd(1, 2)

    with pytest.raises(RuntimeError, match="Odd: text of its own") as caught:
        list(crop_batches(Broken(), EvalTransform(8), batch_size=2, workers=1))
    assert "in read" in str(caught.value.__cause__)


def test_processes_end_with_a_main_process_that_is_killed() -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        atexit._clear()
        batches = crops(processes=3)
        next(batches)
        os.write(write, "\n".join(str(each.pid) for each in multiprocessing.active_children()).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    pids = os.read(read, 1000).decode().split()
    os.close(read)
    os.close(write)
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
    assert len(pids) == 3


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
