"""What a distributed run does when one of its processes dies or hangs."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from mimref.distributed.collectives import barrier
from mimref.distributed.group import lost_ranks_reported, process_group
from mimref.errors import ConfigError, LostRankError, UserError
from tests.ranks import start_processes
from tests.tiny import REFINE, arguments, results, tensors, write_labelled, write_weights


def die() -> None:
    os._exit(3)


def hang() -> None:
    time.sleep(40)


def wait_for_the_other(rank: int, folder: str, other: Callable[[], None], timeout_s: float) -> None:
    from mimref.distributed import group as distributed

    distributed.TIMEOUT = timedelta(seconds=timeout_s)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=distributed.TIMEOUT
    )
    barrier()
    if rank == 1:
        other()
    started = time.monotonic()
    try:
        with lost_ranks_reported("go on"):
            barrier()
    except LostRankError as error:
        Path(folder, "message").write_text(f"{time.monotonic() - started:.1f} {error}")


@pytest.mark.parametrize(("other", "told"), [(die, "has died"), (hang, "has not answered for ")])
def test_the_others_stop_with_a_clear_line(other: Callable[[], None], told: str, tmp_path: Path) -> None:
    timeout_s = 5.0 if other is hang else 60.0
    ranks = start_processes(wait_for_the_other, [(rank, str(tmp_path), other, timeout_s) for rank in range(2)])
    ranks[0].join(60)
    alive = ranks[0].is_alive()
    for process in ranks:
        process.kill()
    assert not alive
    seconds, _, message = (tmp_path / "message").read_text().partition(" ")
    assert message.startswith(f"another process of this run {told}")
    assert float(seconds) < 30


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match=r"^gloo$"), lost_ranks_reported("go on"):
        raise RuntimeError("gloo")  # there is no other process here


def test_small_shared_memory_is_not_a_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimref.distributed.group.world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"/dev/shm; .* --shm-size"), lost_ranks_reported("go on"):
        raise RuntimeError(
            "NCCL error in: ProcessGroupNCCL.cpp:268, unhandled system error\nLast error:\n"
            "Error while creating shared memory segment /dev/shm/nccl-8kmwB3 (size 9637888), error: No space "
            "left on device"
        )


NCCL_ERROR = "NCCL error in: ProcessGroupNCCL.cpp:3690, {what} (run with NCCL_DEBUG=INFO for details)\n{last}"


@pytest.mark.parametrize(
    ("what", "last", "error", "told"),
    [
        (
            "invalid usage, NCCL version 2.28.9",
            "Last error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 50000",
            ConfigError,
            "^NCCL failed: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 50000;.*NCCL_DEBUG=INFO",
        ),
        (
            "unhandled cuda error, NCCL version 2.28.9",
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
            ConfigError,
            "^NCCL failed: Cuda failure 2 'out of memory';",
        ),
        ("unhandled system error", "Connection closed by remote peer", LostRankError, "has died"),
        ("remote process exited or there was a network error", "", LostRankError, "has died"),
        ("NCCL communicator was aborted on rank 0", "", LostRankError, "has died"),
        ("Watchdog caught collective operation timeout", "", LostRankError, "has not answered for 10 minutes"),
    ],
)
def test_errors_of_nccl(
    monkeypatch: pytest.MonkeyPatch, what: str, last: str, error: type[UserError], told: str
) -> None:
    monkeypatch.setattr("mimref.distributed.group.world_size", lambda: 2)
    with pytest.raises(error, match=told), lost_ranks_reported("go on"):
        raise RuntimeError(NCCL_ERROR.format(what=what, last=last))


def test_processes_that_do_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])  # nobody listens there
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "1", "WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mimref.distributed.group.TIMEOUT", timedelta(seconds=1))
    with pytest.raises(LostRankError, match=f"do not find each other at 127.0.0.1:{port} "), process_group("cpu"):
        pass
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(LostRankError, match=r"at \(MASTER_ADDR is not set\):"), process_group("cpu"):
        pass


GPU_SCRIPT = """
import atexit
import sys
import torch
from mimref import __main__
from mimref.distributed import group

def command(_):
    try:
        with group.process_group("cuda"):
            {failure}
    except KeyError:
        return 2
    return 0

def join(_):
    group.dist.init_process_group("gloo", store=group.dist.HashStore(), rank=0, world_size=1)

torch.cuda.device_count, torch.cuda.set_device = lambda: 1, lambda _: None
__main__.run, group._join = command, join
group.dist.destroy_process_group = lambda: print("waits for the others", flush=True)  # as NCCL's does
atexit.register(lambda: print("Python has ended", flush=True))
__main__.main()
"""


@pytest.mark.parametrize(
    ("failure", "code", "output", "trace"),
    [
        ("pass", 0, ["waits for the others", "Python has ended"], False),
        ("raise KeyError", 2, [], False),
        ("raise ValueError('odd')", 1, [], True),
    ],
)
def test_a_process_that_fails_on_its_gpu_ends_at_once(failure: str, code: int, output: list[str], trace: bool) -> None:
    environment = os.environ | {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    line = [sys.executable, "-c", GPU_SCRIPT.format(failure=failure)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stdout.splitlines()) == (code, output), done.stderr
    assert ("ValueError: odd" in done.stderr) == trace


# Rank 1 kills itself once, after its 7th update.
SCRIPT = """
import os, sys
from mimref.cli import run
from mimref.refinement.stages import Stage

update, count = Stage.update, 0

def dying(self, batch):
    global count
    count += 1
    if count == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    update(self, batch)

Stage.update = dying
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_goes_on(tmp_path: Path) -> None:
    weights, data = write_weights(tmp_path / "base.safetensors"), write_labelled(tmp_path / "data")
    settings = REFINE | {"encoder.weights": weights, "data.spec": data}
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    for restarts in ("1", "0"):
        out = tmp_path / f"restarts {restarts}"
        line = [*torchrun, "--max-restarts", restarts, str(tmp_path / "script.py"), *arguments("refine", out, settings)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)
        if restarts == "1":
            assert done.returncode == 0, done.stderr
            assert results(out)["metrics"] == [] and all(w.isfinite().all() for w in tensors(out).values())
        else:
            assert done.returncode != 0 and (out / "state").is_dir()
