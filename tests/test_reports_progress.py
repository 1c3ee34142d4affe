"""Progress: plain lines, bars, and what a quiet terminal prints."""

import errno
import io

import pytest
from rich.console import Console

from mimref.reports import progress
from mimref.reports.progress import show_progress
from mimref.reports.terminal import Terminal


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, _environ={"TERM": "xterm"})


def output(target: Console) -> str:
    return target.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_progress_in_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    target = console(terminal=False)
    with show_progress("lowshot", target) as display:
        for done in range(10, 41):
            now[0] += 1.0
            display.update(done, 40)
        display.log("path[0] done")
    assert output(target).splitlines() == [
        "lowshot: 19/40, 1.0/s, 0:00:21 left",
        "lowshot: 29/40, 1.0/s, 0:00:11 left",
        "lowshot: 39/40, 1.0/s, 0:00:01 left",
        "lowshot: 40/40, 1.0/s",
        "path[0] done",
    ]


def test_progress_as_a_bar() -> None:
    target = console(terminal=True)
    with show_progress("clusters", target) as display:
        display.update(3, 10)
        display.log("[bold] stays text")
        display.update(10, 10)
    assert "10/10" in output(target) and "[bold] stays text" in output(target)


def test_a_quiet_terminal_prints_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet, expected in ((True, "warning: b\n"), (False, "a\nwarning: b\nclusters: 1/1\n")):
        with Terminal(quiet) as terminal:
            terminal.note("a")
            terminal.warn("b")
            terminal.progress("clusters", 1, 1)
        assert capsys.readouterr() == ("", expected)


def test_a_terminal_that_is_closed_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def __init__(self, error: OSError) -> None:
            super().__init__()
            self.error = error

        def write(self, text: str) -> int:
            raise self.error

        def flush(self) -> None:
            raise self.error

    # A pipe without a reader, a terminal that is gone, a full disk.
    for number in (errno.EPIPE, errno.EIO, errno.ENOSPC):
        monkeypatch.setattr("sys.stderr", Closed(OSError(number, "gone")))
        with Terminal(quiet=False) as terminal:
            for done in range(3):
                terminal.progress("one", done + 1, 3)
                terminal.note("a line")
                terminal.progress("two", done + 1, 3)
                terminal.warn("a line")
