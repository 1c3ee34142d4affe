"""The documented SLURM script, with stand-ins for SLURM's commands: stopped and requeued, a run ends the same."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.tiny import REFINE, arguments, tensors, write_labelled, write_weights

SCRIPT = Path(__file__).parents[1] / "docs" / "slurm.sh"
# Runs the tasks of two nodes on this machine; a signal goes to both.
SRUN = """#!/bin/bash
"$@" & first=$!
"$@" & second=$!
trap 'kill -TERM $first $second' TERM
wait $first; wait $first; code=$?
wait $second; wait $second
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" > "$REQUEUED"; else echo localhost; fi
"""
# Pauses in its ninth step for long enough to be signalled there.
SLOW = """
import os, sys, time
from mimref.cli import run
from mimref.refinement.stages import Stage

update, count = Stage.update, 0

def slow(self, batch):
    global count
    count += 1
    if count == 9 and "SLOW" in os.environ:
        open(os.environ["SLOW"], "w").close()
        time.sleep(8)
    update(self, batch)

Stage.update = slow
sys.exit(run(sys.argv[1:]))
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return int(taken.getsockname()[1])


def submit(folder: Path, out: Path, *, slow: bool) -> subprocess.Popen[str]:
    settings = REFINE | {"encoder.weights": folder / "base.safetensors", "data.spec": folder / "data"}
    command = " ".join(f"'{word}'" for word in arguments("refine", out, settings)).replace(f"'{out}'", '"$OUT"')
    script = SCRIPT.read_text()
    for old, new in (
        ("torchrun", f"{sys.executable} -m torch.distributed.run"),
        ("--nproc-per-node 8", "--nproc-per-node 1"),
        ("29500", str(free_port())),
        (
            '-m mimref refine --arch vit_l16 --source mae --data /data/imagenet --out "$OUT"',
            f"{folder / 'script.py'} {command}",
        ),
    ):
        assert old in script, old
        script = script.replace(old, new)
    (folder / "job.sh").write_text(script)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "OUT": str(out),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"SLURM_NNODES": "2", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "here"}
    environment |= {"REQUEUED": str(folder / "requeued"), "PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= {"SLOW": str(folder / "slow")} if slow else {}
    return subprocess.Popen(
        ["bash", str(folder / "job.sh")], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    write_weights(tmp_path / "base.safetensors")
    write_labelled(tmp_path / "data")
    (tmp_path / "script.py").write_text(SLOW)
    (tmp_path / "bin").mkdir()
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    whole = submit(tmp_path, tmp_path / "whole", slow=False)
    assert whole.wait(300) == 0, whole.communicate()[1]
    assert not (tmp_path / "requeued").exists()

    job = submit(tmp_path, tmp_path / "stopped", slow=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "slow").exists():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[1]
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=120)
    assert (tmp_path / "requeued").read_text() == "77\n"
    assert "saved at step 1 of 12 (stage 2: encoder and heads)" in errors
    assert sorted((tmp_path / "stopped" / "state").glob("step*.pt"))
    assert not (tmp_path / "stopped" / "results.json").exists()

    again = submit(tmp_path, tmp_path / "stopped", slow=False)
    assert again.wait(300) == 0, again.communicate()[1]
    found, expected = tensors(tmp_path / "stopped"), tensors(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("stopped", "whole")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) > 3
    assert json.loads((tmp_path / "stopped" / "results.json").read_text())["command"] == "refine"
