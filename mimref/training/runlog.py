"""What a run tells while it goes on: metrics.jsonl for machines, a listener for people."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from mimref.errors import OutputError
from mimref.files import atomic_write


class Listener(Protocol):
    """Receives a run's progress; the command line shows it, a script may ignore it."""

    def progress(self, label: str, done: int, total: int) -> None:
        """`done` of `total` steps or images of the work named `label`."""

    def note(self, message: str) -> None:
        """One line worth reading."""

    def warn(self, message: str) -> None:
        """One line that asks for attention."""


class Silent:
    """A listener that ignores everything."""

    def progress(self, label: str, done: int, total: int) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass


class MetricsLog:
    """metrics.jsonl: one JSON object per line, appended and flushed."""

    def __init__(self, path: Path, *, keep_steps: int) -> None:
        """Open the log; lines of steps after `keep_steps` are cut off (a resumed run writes them again)."""
        kept = []
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= keep_steps:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # a line cut off by a crash
        self._path = path
        with atomic_write(path) as stream:
            stream.write("".join(line + "\n" for line in kept).encode())

    def write(self, values: Mapping[str, object]) -> None:
        """Append one line. Raises OutputError when the disk is full."""
        try:
            with self._path.open("a") as stream:
                stream.write(json.dumps(values) + "\n")
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written ({error.strerror})") from error
