"""What a run reports during training: metrics.jsonl for programs, skipped images for people."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mimref.config.run import TrainingConfig
from mimref.data.decode import BadImages, skipped_line
from mimref.distributed.collectives import gather_lists
from mimref.distributed.group import own_rank
from mimref.errors import OutputError
from mimref.files import write_bytes
from mimref.progress import Listener, Silent, optional
from mimref.training.trackers import Tracker, open_tracker, scalars

# The main measures of a check come first; those in `_DETAILS` are left out of the line for people.
_MAIN = {
    "knn_top1": "k-NN top-1",
    "neighbour_consistency": "neighbour consistency",
    "effective_rank": "effective rank",
    "feature_variance": "feature variance",
}
_DETAILS = {"rankme", "lidar", "alpha_req", "correlation_rank", "uniformity", "view_retrieval", "hubness"}


def readable(values: Mapping[str, float]) -> str:
    """Format a monitor's main values as one line for people; metrics.jsonl contains all values."""
    others = sorted(values.keys() - _MAIN.keys() - _DETAILS, reverse=True)
    labels = _MAIN | {name: name.replace("_", " ") for name in others}
    return ", ".join(f"{label} {values[name]:.4g}" for name, label in labels.items() if name in values)


class MetricsLog:
    """metrics.jsonl: one JSON object per line, appended and flushed. `trackers` receive the same numbers."""

    def __init__(
        self,
        path: Path | None,
        *,
        keep_lines: int = 0,
        trackers: Mapping[str, Tracker] | None = None,
        listener: Listener | None = None,
    ) -> None:
        """Open the log and truncate it to `keep_lines` lines: a resumed run writes the later ones again.

        Without a path, as on ranks other than 0, nothing is written. A tracker that fails is reported and dropped.
        """
        self._path, self._trackers, self._listener = path, dict(trackers or {}), listener or Silent()
        self.lines = 0
        """Number of lines; saved states record it."""
        if path is not None:
            kept = path.read_bytes().splitlines(keepends=True)[:keep_lines] if keep_lines and path.is_file() else []
            self.lines = len(kept)
            write_bytes(path, b"".join(kept))

    def write(self, values: Mapping[str, object]) -> None:
        """Append one line. Raises OutputError when the disk is full."""
        if self._path is None:
            return
        try:
            with self._path.open("a") as stream:
                stream.write(json.dumps(values) + "\n")
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); free some space and --resume"
            raise OutputError(f"{self._path}: {reason}") from error
        self.lines += 1
        step = values.get("step")
        self._tell(lambda tracker: tracker.log(scalars(values), step if isinstance(step, int) else 0))

    def close(self) -> None:
        """Close the trackers, which flushes them."""
        self._tell(lambda tracker: tracker.close())

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            del self._trackers[name]
            with optional(f"no more metrics for {name}", self._listener):
                what(tracker)
                self._trackers[name] = tracker


def open_log(config: TrainingConfig, out: Path, state: Mapping[str, Any] | None, listener: Listener) -> MetricsLog:
    """Open the log of the run in `out`, truncated to the lines in `state` (None: a new log). Only rank 0 writes."""
    if own_rank() > 0:
        return MetricsLog(None)
    lines, step = (state["log_lines"], state["step"]) if state else (0, 0)
    trackers: dict[str, Tracker] = {}
    for name in config.monitor.trackers:
        with optional(f"no metrics for {name}", listener):
            trackers[name] = open_tracker(name, out, config.model_dump(mode="json"), first_step=step)
    return MetricsLog(out / "metrics.jsonl", keep_lines=lines, trackers=trackers, listener=listener)


class SkippedImages:
    """Images that a run skips because they cannot be read; warns early on, and again at the end if there are more."""

    def __init__(self, max_bad: int, listener: Listener) -> None:
        self._bad, self._listener = BadImages(max_bad), listener
        self._evaluated: dict[str, str] = {}
        self._reported = 0

    @property
    def items(self) -> list[tuple[str, str]]:
        """Path and reason for each image, sorted by path."""
        return sorted({**dict(self._bad.items), **self._evaluated}.items())

    def add(self, images: Iterable[tuple[str, str]]) -> None:
        """Record images by path and reason. Raises DataError if there are more than `data.max_bad`."""
        self._bad.add_all(images)

    def add_evaluated(self, images: Iterable[tuple[str, str]]) -> None:
        """Record images that an evaluation has skipped and already counted against `data.max_bad`."""
        self._evaluated |= dict(images)

    def gather(self) -> None:
        """Exchange the images between all ranks. Raises DataError if training images exceed `data.max_bad`."""
        self._bad.add_all(gather_lists(self._bad.items))
        self._evaluated |= dict(gather_lists(list(self._evaluated.items())))

    def state(self) -> dict[str, list[tuple[str, str]]]:
        """Return what a resumed run needs."""
        return {"trained": self._bad.items, "evaluated": list(self._evaluated.items())}

    def load_state(self, state: Mapping[str, list[tuple[str, str]]] | list[tuple[str, str]]) -> None:
        """Continue from a state; older versions saved one list."""
        saved = state if isinstance(state, Mapping) else {"trained": state, "evaluated": []}
        self._bad.add_all(saved["trained"])
        self._evaluated |= dict(saved["evaluated"])

    def report(self, *, once: bool = False) -> None:
        """Warn about all images if there are more than in the last warning. once: only if there was no warning yet."""
        items = self.items
        if len(items) <= self._reported or (once and self._reported):
            return
        self._reported = len(items)
        self._listener.warn(skipped_line(items))
