"""How long a training will take, from a few of its real steps."""

import itertools
import time

import torch

from mimref.training.run import Stage

STEPS, MOST_S = 10, 20.0
"""Steps that count, at most, and the time after which no further one starts."""


def step_seconds(stage: Stage) -> float:
    """Mean seconds of a step, with the reading of its images; the first step, which starts everything, does not count.

    The stage is trained by these steps: it is of no further use.
    """
    batches = stage.batches()
    started, done = 0.0, -1
    for batch in itertools.islice(batches, STEPS + 1):
        stage.update(batch)
        stage.step += 1
        if stage.device.type == "cuda":
            torch.cuda.synchronize(stage.device)
        done += 1
        now = time.monotonic()
        started = started or now
        if now - started > MOST_S:
            break
    del batches  # ends the loader processes
    return (time.monotonic() - started) / max(1, done)


def duration(seconds: float) -> str:
    """As people say it: `40 s`, `25 min`, `3.2 h`, `2.1 days`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
