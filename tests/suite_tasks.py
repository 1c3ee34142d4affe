"""Tasks of a benchmark suite that succeed or fail; processes import them by name."""

import os
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from mimref.benchmarks.suite.lines import Found, Line, Measure, Part, Task, Threshold
from mimref.errors import ConfigError


def value(_device: str, *, line: str, value: float) -> Iterator[Found]:
    yield Found(line, value, "with care", {"device": _device})


def raising(_device: str, *, line: str) -> Iterator[Found]:
    yield from ()
    raise ValueError(f"no {line}\nat all")


def refusing(_device: str) -> Iterator[Found]:
    yield from ()
    raise ConfigError("out of memory with 1 image; 0 fit")


def out_of_memory(_device: str) -> Iterator[Found]:
    yield from ()
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def silent(_device: str) -> Iterator[Found]:
    yield from ()


def lacking(_device: str, *, line: str) -> Iterator[Found]:
    yield Found(line, None, "faiss is not installed")


def crashing(_device: str, *, first: str, number: int) -> Iterator[Found]:
    yield Found(first, 1.0)
    os.kill(os.getpid(), number)
    time.sleep(60)


def exiting(_device: str) -> Iterator[Found]:
    yield from ()
    os._exit(3)


def hanging(_device: str, *, pids: str, then: int = 0) -> Iterator[Found]:
    """Hang, with a child process; the file `pids` names both. then: a signal that ends the first one at once."""
    yield from ()
    other = subprocess.Popen(["sleep", "600"])
    Path(pids).write_text(f"{os.getpid()} {other.pid}")
    os.kill(os.getpid(), then)
    time.sleep(600)


def printing(_device: str, *, line: str) -> Iterator[Found]:
    print("said in Python", flush=True)
    os.write(2, b"said in C\n")
    yield Found(line, 1.0)


def stopping(_device: str, *, parent: int, number: int) -> Iterator[Found]:
    """Stop the suite as its user would."""
    yield from ()
    os.kill(parent, number)
    time.sleep(600)


def task(name: str, measure: Measure, *more: str, threshold: Threshold | None = None, limit_s: float = 30) -> Task:
    return Task((Line(name, "s", threshold), *(Line(other, "s") for other in more)), measure, limit_s)


def good(name: str, found: float = 1.0, threshold: Threshold | None = None) -> Task:
    return task(name, partial(value, line=name, value=found), threshold=threshold)


def part(*tasks: Task, name: str = "a part") -> Part:
    return Part(name, tasks)
