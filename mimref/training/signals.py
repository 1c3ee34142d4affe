"""SIGTERM and Ctrl-C during training: save first, then stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Literal

from mimref.errors import Interrupted

_Mode = Literal["at once", "deferred", "waiting"]


class StopSignal:
    """The response of a run to SIGTERM and Ctrl-C: training saves first; any other work stops at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.raised: Interrupted | None = None
        """The exception that stopped the work at once."""
        self.ignored = False
        """Whether signals are ignored: once the work is saved, they would only disturb the clean-up."""
        self._mode: _Mode = "at once"

    def deferred(self) -> AbstractContextManager[None]:
        """Inside the block, the first signal is stored in `number`; a second one still stops at once."""
        return self._in("deferred")

    def waiting(self) -> AbstractContextManager[None]:
        """Like `deferred`, but the first signal also ends the wait by raising Interrupted."""
        return self._in("waiting")

    @contextmanager
    def _in(self, mode: _Mode) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = before

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """Handle a signal."""
        if self.ignored:
            return
        if self._mode != "at once" and self.number is None:
            self.number = number
            if self._mode == "waiting":
                raise Interrupted(number, "stopped while waiting")
            return
        self.raised = Interrupted(number, "stopped at once; --resume continues from the last saved state")
        raise self.raised


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catch SIGTERM and Ctrl-C during a run. Outside the main thread, where Python cannot do so, catch nothing."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, stop.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    except Exception as error:
        # When interrupted while writing, torch raises an error of its own instead.
        if stop.raised is not None:
            raise stop.raised from error
        raise
    finally:
        for number, handler in previous.items():
            with suppress(TypeError):  # a handler that was not installed from Python cannot be restored
                signal.signal(number, handler)
