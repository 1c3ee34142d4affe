"""A run's output folder: who may write into it, its saved state, and stopping on a signal.

A folder is finished when it holds results.json, unfinished when it holds state/ or a log without results.
"""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mimref.config import RunConfig, dump_config
from mimref.errors import ConfigError, Interrupted, OutputError
from mimref.files import atomic_write, write_bytes
from mimref.recipes import load_config

_OUR_FILES = ("encoder.safetensors", "config.toml", "metrics.jsonl", "results.json", "results.csv", "heads.pt")
# Settings that do not change what is trained.
_MAY_CHANGE = {"preset", "device", "workers", "monitor", "evaluate"}


@dataclass(frozen=True)
class RunFolder:
    """The output folder of a training run."""

    path: Path

    @property
    def finished(self) -> bool:
        """Whether a run has written its results here."""
        return (self.path / "results.json").is_file()

    @property
    def unfinished(self) -> bool:
        """Whether a run was started here and not finished."""
        return not self.finished and any((self.path / name).exists() for name in ("state", "metrics.jsonl"))

    @property
    def _state_file(self) -> Path:
        return self.path / "state" / "state.pt"

    def check(self, *, resume: bool, force: bool) -> None:
        """Raise OutputError when a run must not start here. Writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file; give --out a folder")
        if resume:
            if not self.unfinished:
                raise OutputError(f"{self.path}: holds no run to resume; leave out --resume to start one")
        elif self.finished and not force:
            raise OutputError(f"{self.path}: holds a finished run; give another --out, or --force to replace it")
        elif self.unfinished and not force:
            raise OutputError(f"{self.path}: holds an unfinished run; --resume continues it, --force replaces it")

    def prepare(self, config: RunConfig, *, resume: bool, force: bool) -> None:
        """Make the folder ready and write config.toml, or compare it with the settings of the run to resume.

        `force` removes an earlier run's own files and nothing else. Raises OutputError when the folder cannot be
        written, ConfigError when a setting that shapes training has changed since.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if force and not resume:
                for name in _OUR_FILES:
                    (self.path / name).unlink(missing_ok=True)
                shutil.rmtree(self.path / "state", ignore_errors=True)
            (self.path / "state").mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}); give another --out") from error
        if resume and (self.path / "config.toml").is_file():
            self._compare(config)
        else:
            write_bytes(self.path / "config.toml", dump_config(config).encode())

    def _compare(self, config: RunConfig) -> None:
        saved = load_config(type(config), str(self.path / "config.toml"))
        then, now = (_flat(each.model_dump(exclude=_MAY_CHANGE)) for each in (saved, config))
        for key in then:
            if then[key] != now[key]:
                raise ConfigError(
                    f"cannot resume {self.path} with another {key}: it was {then[key]!r} and is now {now[key]!r}"
                )

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the training state atomically; the previous one stays whole until the new one is."""
        with atomic_write(self._state_file) as stream:
            torch.save(state, stream)

    def load_state(self) -> dict[str, Any] | None:
        """The saved state on the CPU, or None when the run had saved none. Raises ConfigError when it is damaged."""
        if not self._state_file.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self._state_file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ConfigError(f"{self._state_file}: damaged state; --force starts the run anew") from error
        return state

    def drop_state(self) -> None:
        """Remove the state of a finished run."""
        shutil.rmtree(self.path / "state", ignore_errors=True)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class StopSignal:
    """Remembers SIGTERM or Ctrl-C until the training loop can save."""

    def __init__(self) -> None:
        self.number: int | None = None

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            # A second signal does not wait for the step to end.
            raise Interrupted(number, "stopped at once; the last saved state is kept")
        self.number = number

    def raise_if_received(self, message: str) -> None:
        """Raise Interrupted with the exit code of the signal, once the caller has saved what it can."""
        if self.number is not None:
            raise Interrupted(self.number, message)


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catch SIGTERM and Ctrl-C for the duration of a training run (main thread only)."""
    stop = StopSignal()
    previous = {number: signal.signal(number, stop._receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
