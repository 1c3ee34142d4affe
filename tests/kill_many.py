"""Kill a run with SIGKILL again and again, resume it each time, and compare it with an uninterrupted one.

    OMP_NUM_THREADS=1 python tests/kill_many.py FOLDER --kills 20 --seed 0

runs a short quickstart in FOLDER/whole and FOLDER/killed and prints what it did. A kill takes about 15 seconds, most of
them for the imports of the next start. The moments of the kills are drawn by the seed: while the program starts,
anywhere in training, and while a state is being written.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

QUICKSTART = {
    "batch_size": 64,
    "data.train_limit": 320,
    "heads.queue_size": 320,
    "heads_stage.epochs": 4,
    "encoder_stage.epochs": 10,
    "monitor.log_every": 1,
    "evaluate.enabled": "false",
}
PHASES = ("start", "training", "saving")
POLL_S = 0.0005


class Killer:
    """Decides when an attempt is killed: once per attempt, in a phase and at a moment drawn by the seed."""

    def __init__(self, out: Path, seed: int, *, start_s: float, training_s: float, phases: Sequence[str]) -> None:
        """start_s: how long the program takes until it trains. training_s: the longest it may train before a kill."""
        self.out, self.phases = out, phases
        self.start_s, self.training_s = start_s, training_s
        self._random = random.Random(seed)

    def kill(self, process: subprocess.Popen[str]) -> str | None:
        """Wait for the moment and kill. Returns what was hit, or None if the process ended before."""
        phase = self._random.choice(self.phases)
        share = self._random.random()
        log = _identity(self.out / "metrics.jsonl")
        if phase == "start":
            reached = _wait(process, lambda: False, share * self.start_s)
        elif phase == "training":
            # A run creates a new log when it begins to train.
            reached = _wait(process, lambda: _identity(self.out / "metrics.jsonl") != log)
            reached = reached and _wait(process, lambda: False, share * self.training_s)
        else:
            reached = True
            for _ in range(1 + int(2 * share)):
                reached = reached and _wait(process, lambda: not self._half()) and _wait(process, self._half)
            reached = reached and _wait(process, lambda: False, self._random.random() * 0.02)
        if not reached:
            return None
        process.kill()
        process.wait()
        left = sorted(str(file.relative_to(self.out)) for file in self.out.rglob("*") if "state" in file.parts)
        return f"{phase}, {_lines(self.out)} lines logged, {', '.join(left) or 'no state'}"

    def _half(self) -> bool:
        """Return whether a state is being written."""
        return any(name.endswith(".tmp") for name in _names(self.out / "state"))


def run_killed(line: Sequence[str], killer: Killer, kills: int) -> int:
    """Run a command line until it has finished, killing it up to `kills` times. Returns the number of kills."""
    done = 0
    while True:
        begun = any((killer.out / name).exists() for name in ("config.toml", "metrics.jsonl", "results.json"))
        started = time.monotonic()
        process = start([*line, "--resume"] if begun else line)
        hit = killer.kill(process) if done < kills else None
        if hit is None:
            output = process.communicate()[0]
            if process.returncode != 0:
                raise RuntimeError(f"exit code {process.returncode}\n{output}")
            say(f"finished by itself after {done} kills")
            return done
        done += 1
        say(f"kill {done} after {time.monotonic() - started:.1f} s: {hit}")


def start(line: Sequence[str]) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mimref", *line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def differences(out: Path, other: Path) -> list[str]:
    """Return what differs between two runs: names of tensors, and the log."""
    found, expected = (load_file(folder / "encoder.safetensors") for folder in (out, other))
    names = sorted(found.keys() | expected.keys())
    differing = [name for name in names if name not in found or name not in expected]
    differing += [name for name in names if name not in differing and not torch.equal(found[name], expected[name])]
    if (out / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes():
        differing.append("metrics.jsonl")
    return differing


def _wait(process: subprocess.Popen[str], happened: Callable[[], bool], timeout_s: float | None = None) -> bool:
    """Wait until something has happened or the time is up. Returns False if the process ends before."""
    end = None if timeout_s is None else time.monotonic() + timeout_s
    while not happened() and (end is None or time.monotonic() < end):
        if process.poll() is not None:
            return False
        time.sleep(POLL_S)
    return True


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _identity(file: Path) -> int | None:
    return file.stat().st_ino if file.exists() else None


def _lines(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def say(line: str) -> None:
    """Print a line at once, for readers who follow a log."""
    print(line, flush=True)


def main() -> None:
    """Run as the module's docstring describes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sets = [part for key, value in QUICKSTART.items() for part in ("--set", f"{key}={value}")]
    whole, killed = given.folder / "whole", given.folder / "killed"

    began = time.monotonic()
    process = start(["refine", *sets, "--out", str(whole)])
    _wait(process, (whole / "metrics.jsonl").exists)
    start_s = time.monotonic() - began
    output = process.communicate()[0]
    if process.returncode != 0:
        raise SystemExit(output)
    total_s = time.monotonic() - began
    say(f"uninterrupted: {total_s:.1f} s, of which {start_s:.1f} s to start; {_lines(whole)} lines logged")

    # Two of three kills fall in training; together they must not take longer than it does.
    killer = Killer(
        killed, given.seed, start_s=start_s, training_s=2 * (total_s - start_s) / given.kills, phases=PHASES
    )
    done = run_killed(["refine", *sets, "--out", str(killed)], killer, given.kills)
    differing = differences(killed, whole)
    say(f"{done} kills; " + (f"different: {', '.join(differing)}" if differing else "weights and log bit-identical"))
    if differing or done < given.kills:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
