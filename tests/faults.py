"""A run to disturb: its inputs, its command line, and its uninterrupted result."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from mimref.cli import run
from mimref.config.load import load_config
from mimref.refinement.config import RefineConfig
from tests.tiny import REFINE, Killed, arguments, write_labelled, write_weights


@dataclass(frozen=True)
class TinyRun:
    """A refinement with 8 steps of stage 1 and 12 of stage 2, 4 per epoch."""

    weights: Path
    data: Path
    whole: Path
    """The folder of the uninterrupted run."""
    config: RefineConfig
    """Its settings."""

    def line(self, out: Path, **changes: Any) -> list[str]:
        """Return the command line of this run in another folder; `changes` are named like `encoder_stage__epochs`."""
        return _line(self.weights, self.data, out, **changes)


def make_tiny_run(folder: Path) -> TinyRun:
    """Make weights and images in `folder`, and run there once."""
    weights, data, whole = write_weights(folder / "base.safetensors"), write_labelled(folder / "data"), folder / "whole"
    assert run(_line(weights, data, whole)) == 0
    return TinyRun(weights, data, whole, load_config(RefineConfig, str(whole / "config.toml")))


def _line(weights: Path, data: Path, out: Path, **changes: Any) -> list[str]:
    settings = REFINE | {"monitor.knn_every_epochs": 0, "encoder.weights": weights, "data.spec": data}
    return arguments("refine", out, settings | {key.replace("__", "."): value for key, value in changes.items()})


class Mortal:
    """Counts the calls of all functions that it wraps, and raises Killed after `kill_after` of them; None: never."""

    def __init__(self, kill_after: int | None) -> None:
        self.calls, self.kill_after = 0, kill_after

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if self.calls == self.kill_after:
                raise Killed
            self.calls += 1
            return function(*args, **options)

        return call


def write_damaged(folder: Path) -> None:
    """Write image files to `folder`; four of them are not images."""
    write_labelled(folder)
    for name in ("train/a/003", "train/a/020", "train/b/011", "val/b/002"):
        (folder / f"{name}.png").write_bytes(b"no image")


def states(path: Path) -> list[str]:
    """Return the names of the states in a run's folder, oldest first."""
    return sorted(file.name for file in (path / "state").iterdir() if file.name != "origin.json")


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the last line on standard error."""
    return capsys.readouterr().err.splitlines()[-1]
