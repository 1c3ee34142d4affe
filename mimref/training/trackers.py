"""TensorBoard and Weights & Biases as optional trackers of the metrics."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mimref.errors import ConfigError


class _TensorBoard:
    def __init__(self, out: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run logs the steps after the saved state again.
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project="mimref", name=out.name, dir=str(out), config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


Tracker = _TensorBoard | _WandB
"""Receives the numbers of a log line and the step in the whole run; `close` flushes."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a tracker is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"monitor.trackers {name!r} is not installed: pip install 'mimref[{name}]'")


def open_tracker(name: str, out: Path, config: Mapping[str, Any], *, first_step: int) -> Tracker:
    """Open a tracker of `monitor.trackers`; call `check_trackers` first. Raises whatever its library raises."""
    return _TensorBoard(out, first_step) if name == "tensorboard" else _WandB(out, config)


def scalars(values: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of a log line as `stage/name`; values per head become `stage/name/head_1`, ..."""
    stage = values.get("stage", "run")
    flat: dict[str, float] = {}
    for name, value in values.items():
        if name in ("stage", "step"):
            continue
        if isinstance(value, list):
            flat |= {f"{stage}/{name}/head_{head}": float(each) for head, each in enumerate(value, start=1)}
        elif isinstance(value, int | float):
            flat[f"{stage}/{name}"] = float(value)
    return flat
