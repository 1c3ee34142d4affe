"""Run the parts of the suite, each in a process of its own with a time limit, and judge the results."""

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

import torch

from mimref.benchmarks.measure import device_setting
from mimref.benchmarks.suite.child import Done, work
from mimref.benchmarks.suite.lines import Finding, Found, Part, Task
from mimref.benchmarks.suite.parts import GPU_ONLY, TOTAL_S, gpu_lines, parts_for
from mimref.devices import own_cores, resolve_device, resolve_precision
from mimref.errors import Interrupted, OutputError
from mimref.progress import Listener, Silent
from mimref.training.signals import stop_signal

_START_S = 90.0
"""Seconds that a process may take to import the package."""
Save = Callable[[Sequence[Finding], bool], None]
"""Called after each finding with all findings so far, and with whether they are complete."""


def run_suite(
    device: str = "auto", *, logs: Path | None = None, listener: Listener | None = None, save: Save | None = None
) -> list[Finding]:
    """Measure everything that this device supports; a fault in one part does not stop the others.

    logs: folder for the output of the parts. Raises ConfigError if the device is missing, and Interrupted when
    stopped; `save` has then received everything found before.
    """
    listener, target = listener or Silent(), resolve_device(device)
    # Nothing has been measured on MPS yet, so it uses the sizes of a CPU.
    sizes = "cuda" if target.type == "cuda" else "cpu"
    parts = parts_for(sizes)
    total = sum(len(task.lines) for part in parts for task in part.tasks)
    found: list[Finding] = []
    deadline = time.monotonic() + TOTAL_S[sizes]
    try:
        with stop_signal():
            for part in parts:
                for finding in run_part(part, str(target), deadline, logs):
                    found.append(finding)
                    listener.progress("measurements", len(found), total)
                    if save is not None:
                        save(found, False)
    except Interrupted as interruption:
        raise Interrupted(interruption.signum, f"stopped after {len(found)} of {total} measurements") from None
    found += [Finding(name, line, Found(line.name, None, GPU_ONLY)) for name, line in gpu_lines(sizes)]
    if save is not None:
        save(found, True)
    return found


def machine_facts(device: str) -> dict[str, str]:
    """Describe the machine that is measured, and its other load."""
    target = resolve_device(device)
    setting = device_setting(target, resolve_precision("auto", target))
    busy = os.getloadavg()[0]
    facts = {"device": ", ".join(f"{key} {value}" for key, value in setting.items()), "torch": torch.__version__}
    facts["cores"] = f"{own_cores()}; load {busy:.1f} before the start" + (
        ": other processes computed, and times are longer than on an idle machine" if busy > 0.5 * own_cores() else ""
    )
    return facts


def run_part(part: Part, device: str, deadline: float, logs: Path | None = None) -> Iterator[Finding]:
    """Yield the findings of a part, one per line. A process that dies or hangs loses only its current task.

    deadline: a time of `time.monotonic`. Tasks that have not started by then are faults, too.
    """
    left = list(part.tasks)
    while left and time.monotonic() < deadline:
        child = _Child(left, device, _log_of(part, logs))
        try:
            while left:
                lost = yield from _findings(part, left[0], child, deadline)
                del left[0]
                if lost or time.monotonic() >= deadline:
                    break
        finally:
            child.end()
    for task in left:
        for line in task.lines:
            yield Finding(part.name, line, fault="not begun: all the time was used up")


def _findings(part: Part, task: Task, child: "_Child", deadline: float) -> Generator[Finding, None, bool]:
    """Yield the findings of a task. Returns whether the process is lost."""
    lines = {line.name: line for line in task.lines}
    fault = child.wait_for_start()
    lost = bool(fault)
    limit_s = max(0.0, min(task.limit_s, deadline - time.monotonic()))
    ends = time.monotonic() + limit_s
    while not lost:
        message = child.receive(ends)
        if isinstance(message, Found):
            if message.line in lines:
                yield Finding(part.name, lines.pop(message.line), message)
            continue
        if message is None:
            fault, lost = f"not finished within {limit_s:.0f} s", True
        elif isinstance(message, str):
            fault, lost = message, True
        else:
            fault = message.fault or "nothing was measured"
        break
    for line in lines.values():
        yield Finding(part.name, line, fault=fault)
    return lost


class _Child:
    """The suite's handle on the process that runs some tasks."""

    def __init__(self, tasks: Sequence[Task], device: str, log: str | None) -> None:
        context = _context(device)
        self._pipe, theirs = context.Pipe()
        arguments = (tuple(tasks), device, theirs, log, dict(os.environ))
        self._process = context.Process(target=work, args=arguments)
        with theirs:
            self._process.start()
        self._started = False

    def wait_for_start(self) -> str:
        """Wait until the process has imported the package. Returns why it did not start, or an empty string."""
        if not self._started:
            hello = self.receive(time.monotonic() + _START_S)
            if not isinstance(hello, Done):
                return str(hello or f"its process did not start within {_START_S:.0f} s")
            self._started = True
        return ""

    def receive(self, ends: float) -> Found | Done | str | None:
        """Return the next message, or how the process ended if it did, or None when the time is up."""
        if not wait([self._pipe, self._process.sentinel], max(0.0, ends - time.monotonic())):
            return None
        try:
            if self._pipe.poll():
                message: Found | Done = self._pipe.recv()
                return message
        except (EOFError, OSError):
            pass
        self._process.join()
        return _how_it_ended(self._process.exitcode)

    def end(self) -> None:
        """Kill the process and those that it has started."""
        self._process.kill()
        if self._started and self._process.pid is not None:
            # The process leads a group, which outlives it.
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        self._pipe.close()


def _context(device: str) -> ForkServerContext | SpawnContext:
    """Return a start method: a preloaded fork server saves seconds, but CUDA cannot be used in a forked process."""
    if torch.device(device).type != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mimref.benchmarks.suite.parts"])
    return context


def _how_it_ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its process ended with exit code {code}"
    killed = ", perhaps for lack of memory" if -code == signal.SIGKILL else ""
    return f"its process was ended by signal {-code} ({signal.strsignal(-code)}){killed}"


def _log_of(part: Part, logs: Path | None) -> str | None:
    if logs is None:
        return None
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{logs}: {error.strerror}; choose another --out") from error
    return str(logs / f"{re.sub('[^A-Za-z0-9]+', '-', part.name)}.log")
