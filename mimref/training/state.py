"""A run's output folder: who may write into it, its saved state, and stopping on a signal.

A folder is finished when it holds results.json, unfinished when it holds state/ or a log without results.
"""

import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from mimref.config import RefineConfig, RunConfig, dump_config
from mimref.data.sources import ImageSource
from mimref.errors import ConfigError, DataError, Interrupted, OutputError
from mimref.files import atomic_write, write_bytes
from mimref.recipes import load_config
from mimref.training.runlog import Listener

# results.json first: once it is gone, what is left of a replaced run cannot pass for a finished one.
_OUR_FILES = ("results.json", "results.csv", "encoder.safetensors", "config.toml", "metrics.jsonl", "heads.pt")
# Settings, and sections ending in a dot, that do not change what is trained.
_MAY_CHANGE = (
    "preset",
    "device",
    "workers",
    "micro_batch",
    "activation_checkpointing",
    "compile",
    "monitor.",
    "evaluate.",
    "data.max_bad",
    "data.download",
)

C = TypeVar("C", bound=RunConfig)


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
        """Raise OutputError when a run must not start or go on here. Writes nothing."""
        if resume and force:
            raise OutputError("--resume continues a run and --force replaces it: give one of them")
        try:
            occupied = self.path.exists()
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}; give another --out") from error
        if occupied and not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file; give --out a folder")
        if resume:
            if not self.unfinished and not self.finished:
                raise OutputError(f"{self.path}: holds no run to resume; leave out --resume to start one")
        elif not force:
            self._check_free()

    def _check_free(self) -> None:
        if self.finished:
            raise OutputError(f"{self.path}: holds a finished run; give another --out, or --force to replace it")
        if self.unfinished:
            raise OutputError(f"{self.path}: holds an unfinished run; --resume continues it, --force replaces it")
        for name in _OUR_FILES:
            if (self.path / name).exists():
                raise OutputError(f"{self.path}: already holds {name}; give another --out, or --force to replace it")

    def prepare(self, config: RunConfig, *, resume: bool, force: bool) -> None:
        """Make the folder ready and write config.toml; compare it first with the settings of the run to resume.

        `force` removes an earlier run's own files and nothing else. Raises OutputError when the folder cannot be
        written, ConfigError when a setting that shapes training has changed since.
        """
        if resume and (self.path / "config.toml").is_file():
            self._compare(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if force:
                for name in _OUR_FILES:
                    (self.path / name).unlink(missing_ok=True)
                if (self.path / "state").is_dir():
                    shutil.rmtree(self.path / "state")
            (self.path / "state").mkdir(exist_ok=True)
            self._remove_halves()
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}); give another --out") from error
        write_bytes(self.path / "config.toml", dump_config(config).encode())

    def _remove_halves(self) -> None:
        """Files whose writing a kill has cut short; a state may be gigabytes."""
        for name in (*_OUR_FILES, "state/state.pt"):
            file = self.path / name
            for half in file.parent.glob(f".{file.name}.*.tmp"):
                half.unlink()

    def _compare(self, config: RunConfig) -> None:
        saved = load_config(type(config), str(self.path / "config.toml"))
        then, now = (_flat(each.model_dump()) for each in (saved, config))
        for key in then:
            if then[key] != now[key] and not any(
                key == free or (free.endswith(".") and key.startswith(free)) for free in _MAY_CHANGE
            ):
                raise ConfigError(
                    f"cannot resume {self.path} with another {key}: it was {_shown(then[key])} and is now "
                    f"{_shown(now[key])}; leave it as it was, or start anew in another --out"
                )

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the training state atomically; the previous one stays whole until the new one is."""
        with atomic_write(self._state_file) as stream:
            torch.save(state, stream)

    def load_state(self) -> dict[str, Any] | None:
        """The saved state on the CPU, or None when the run had saved none. Raises OutputError when it is damaged."""
        if not self._state_file.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self._state_file, map_location="cpu", weights_only=True)
            _ = state["step"]  # every state has one
        except Exception as error:
            raise OutputError(f"{self._state_file}: damaged state; --force starts the run anew") from error
        return state

    def drop_state(self) -> None:
        """Remove the state of a finished run."""
        shutil.rmtree(self.path / "state", ignore_errors=True)


def images_of(source: ImageSource) -> tuple[int, str]:
    """What a state keeps of the images, for `check_images`."""
    return len(source), source.fingerprint


def check_images(state: Mapping[str, Any], source: ImageSource, listener: Listener) -> None:
    """Compare the images with those a run was started with.

    Raises DataError when there are more or fewer, since order and schedules follow their number; warns of other ones.
    """
    count, fingerprint = state["images"]
    if count != len(source):
        raise DataError(
            f"cannot resume with {len(source)} images, the run was started with {count}; "
            "bring the others back, or start anew in another --out"
        )
    if fingerprint != source.fingerprint:
        listener.warn("image files have changed since the run was started; it goes on with them as they are now")


def reloadable(config: C) -> C:
    """The settings with absolute paths, so that config.toml means the same wherever it is read from."""
    data = config.data
    names = {"spec": data.spec, "root": data.root}
    updates: dict[str, Any] = {
        "data": data.model_copy(update={key: _absolute(name) for key, name in names.items()}),
        "encoder": config.encoder.model_copy(update={"weights": _absolute(config.encoder.weights)}),
    }
    if isinstance(config, RefineConfig):
        updates["heads_from"] = _absolute(config.heads_from)
    return config.model_copy(update=updates)


def _absolute(name: str | None) -> str | None:
    """The path of an existing file or folder; what is neither, or a word with a meaning of its own, as it is."""
    if name is None or name in ("quickstart", "digits", "fashion-mnist"):
        return name
    path = os.path.abspath(os.path.expanduser(name))
    return path if os.path.exists(path) else name


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _shown(value: object) -> str:
    return "unset" if value is None else repr(value)


class StopSignal:
    """What SIGTERM and Ctrl-C do to a run: training is told, so that it can save; any other work ends at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While this lasts, the first signal is only remembered, in `number`; a second one still stops at once."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """The signal handler."""
        if self._deferred and self.number is None:
            self.number = number
            return
        raise Interrupted(number, "stopped at once; --resume continues from the last saved state")

    def raise_if_received(self, message: str) -> None:
        """Raise Interrupted with the exit code of the signal, once the caller has saved what it can."""
        if self.number is not None:
            raise Interrupted(self.number, message)


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catch SIGTERM and Ctrl-C for the duration of a run. Outside the main thread Python cannot: nothing is caught."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, stop.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            with suppress(TypeError):  # a handler that was not installed from Python cannot be put back
                signal.signal(number, handler)
