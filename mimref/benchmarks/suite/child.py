"""Process of a part: it measures one task after another and reports each result at once."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from mimref.benchmarks.suite.lines import Task
from mimref.errors import UserError


class Done(NamedTuple):
    """End of a task, with what went wrong; the first one reports that the process has started."""

    fault: str = ""


def work(tasks: Sequence[Task], device: str, pipe: Connection, log: str | None, environment: Mapping[str, str]) -> None:
    """Measure all tasks; the output of libraries is appended to the file `log`.

    The process leads its own process group, so that killing the group also ends the processes that it starts. It ends
    when the process at the other end of the pipe does.
    """
    os.setsid()
    threading.Thread(target=_end_when_left, args=(pipe,), daemon=True).start()
    os.environ.clear()  # a fork server keeps that of its first use
    os.environ.update(environment)
    # Loader processes start as in any other command.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    output = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    faulthandler.enable()
    target = torch.device(device)
    if target.type == "cuda" and target.index is not None:
        torch.cuda.set_device(target)  # `cuda` means this GPU from now on
    pipe.send(Done())
    for task in tasks:
        sys.stderr.write(f"--- {', '.join(line.name for line in task.lines)}\n")
        fault = ""
        try:
            for found in task.measure(target.type):
                pipe.send(found)
        except Exception as error:  # a library or driver may raise anything
            traceback.print_exc()
            fault = _in_words(error)
        sys.stderr.flush()
        pipe.send(Done(fault))


def _in_words(error: Exception) -> str:
    """Return the first line of an error, with its type unless it is meant for users."""
    text = next(iter(str(error).strip().splitlines()), "")
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _end_when_left(pipe: Connection) -> None:
    """Kill the process group when the other end of the pipe closes; nothing is ever sent through it."""
    pipe.poll(None)
    os.killpg(0, signal.SIGKILL)
