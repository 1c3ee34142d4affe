"""What a distributed run does when one of its processes dies or hangs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from mimref.distributed.collectives import barrier
from mimref.distributed.group import lost_ranks_reported
from mimref.errors import ConfigError, LostRankError
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
