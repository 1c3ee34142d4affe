"""The process of a part: it measures one task after another, and reports what it finds as soon as it has it."""

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

from mimref.benchmarks.suite.lines import Task
from mimref.errors import UserError


class Done(NamedTuple):
    """The end of a task, and what went wrong; the first one says that the process has started."""

    fault: str = ""


def work(tasks: Sequence[Task], device: str, pipe: Connection, log: str | None, environment: Mapping[str, str]) -> None:
    """Measure all tasks; what libraries print goes to the end of the file `log`.

    The process leads a group of its own, so that whoever ends it ends its processes, too. It ends with the process at
    the other end of the pipe.
    """
    os.setsid()
    threading.Thread(target=_end_when_left, args=(pipe,), daemon=True).start()
    os.environ.clear()  # a fork server's is that of its first use
    os.environ.update(environment)
    # Loader processes start as those of any command do.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    output = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    faulthandler.enable()
    pipe.send(Done())
    for task in tasks:
        sys.stderr.write(f"--- {', '.join(line.name for line in task.lines)}\n")
        fault = ""
        try:
            for found in task.measure(device):
                pipe.send(found)
        except Exception as error:  # of any library or driver
            traceback.print_exc()
            fault = _in_words(error)
        sys.stderr.flush()
        pipe.send(Done(fault))


def _in_words(error: Exception) -> str:
    """The first line of an error, with its type where it is not meant for users."""
    text = next(iter(str(error).strip().splitlines()), "")
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _end_when_left(pipe: Connection) -> None:
    """Wait for the other end of the pipe to close; nothing ever comes through it."""
    pipe.poll(None)
    os.killpg(0, signal.SIGKILL)
