"""Rows of results, and their files: results.csv and results.json, which marks a folder as finished."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mimref import __version__
from mimref.config.base import DataConfig
from mimref.errors import OutputError
from mimref.files import check_writable, write_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

Row = dict[str, str | int | float]
"""One result: `metric`, `value` (percent, except Davies-Bouldin) and every setting it was measured with."""

# Packages whose version can change a number.
VERSIONS = ("torch", "timm", "numpy", "scikit-learn", "cyanure", "umap-learn")


class Tabular:
    """A result with rows, which `frame` shows as a table."""

    rows: list[Row]

    @property
    def frame(self) -> "DataFrame":
        """One row per result; missing cells are `pandas.NA`, so that whole numbers stay whole."""
        return frame(self.rows)


@dataclass(frozen=True)
class EvaluationResult(Tabular):
    """The result of an evaluation."""

    rows: list[Row]
    elapsed_s: float
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason for each image that was skipped."""
    data: DataConfig | None = None
    """Settings of the images, completed from the checkpoint's header; None for features computed elsewhere."""


class Finished(NamedTuple):
    """The contents of results.json."""

    rows: list[Row]
    elapsed_s: float
    bad_images: list[tuple[str, str]]
    """Path and reason for each image that was skipped."""


def frame(rows: Sequence[Row]) -> "DataFrame":
    """Return rows as a table with the columns of `columns`: Int64, Float64 or string; object if types are mixed.

    A missing cell is `pandas.NA`; a measured NaN stays NaN.
    """
    # Slow to import.
    import numpy as np
    import pandas as pd

    table: dict[str, object] = {}
    for key in columns(rows):
        values: list[Any] = [row.get(key) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if kinds == {float}:
            missing = np.array([value is None for value in values])
            table[key] = pd.arrays.FloatingArray(np.array(values, dtype=np.float64), missing)
        else:
            dtype: Any = "Int64" if kinds == {int} else pd.StringDtype("python") if kinds == {str} else object
            table[key] = pd.array(values, dtype=dtype)
    return pd.DataFrame(table, columns=columns(rows))


def named(rows: Sequence[Row], model: str, where: Row) -> list[Row]:
    """Return rows with the model's name and the settings `where`, with which it was evaluated."""
    return [{"model": model, "metric": row["metric"], "value": row["value"], **where, **row} for row in rows]


WRITTEN = (
    *("results.csv", "results.md", "exhibits.json", "assignments.csv", "report.html", "gallery.html", "gallery.png"),
    *("comparison.png", "blocks.png", "assessment.png", "segments.png", "robustness.png", "suite.png"),
)
"""Names of files that commands other than trainings write into their output folder, besides results.json."""


def check_folder(out: Path, force: bool, *, unfinished: str = "") -> None:
    """Raise OutputError for a folder that holds results or files of their names (unless `force`), or an unfinished run.

    Also raised for a folder that cannot be written. unfinished: text by which a results.md is known as the page of an
    interrupted command, which may be replaced.
    """
    check_writable(out)
    if (out / "results.json").exists():
        if not force:
            raise OutputError(f"{out}: holds results; choose another --out, or --force to replace them")
    elif (out / "metrics.jsonl").exists():
        # New results would look like those of that run.
        raise OutputError(f"{out}: holds an unfinished run of refine or pretrain; choose another --out")
    elif not force and (found := next((name for name in WRITTEN if _is_kept(out / name, unfinished)), None)):
        raise OutputError(f"{out}: holds {found}, but no results.json; choose another --out, or --force to replace it")


def _is_kept(file: Path, unfinished: str) -> bool:
    if unfinished and file.name == "results.md" and file.is_file():
        with suppress(OSError):
            return unfinished not in file.read_text(encoding="utf-8", errors="replace")
    return os.path.lexists(file)


def remove_earlier(out: Path) -> None:
    """Remove what an earlier command has written into its output folder; its results.json is replaced later.

    Raises OutputError for what cannot be removed.
    """
    for name in WRITTEN:
        try:
            (out / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{out / name}: cannot be removed ({error.strerror}); choose another --out") from error


def write_results(
    out: Path,
    command: str,
    config: Mapping[str, object],
    elapsed_s: float,
    rows: Sequence[Row],
    *,
    bad_images: Sequence[tuple[str, str]] = (),
    derived: Sequence[Mapping[str, object]] = (),
) -> None:
    """Write results.csv (one line per row), then results.json into the folder `out`, each atomically.

    config: the resolved settings. bad_images: path and reason for each skipped image. derived: settings that a recipe
    has derived, each with its rule. JSON keys: command, version, config, elapsed_s, metrics (the rows), bad_images,
    derived (if any) and versions (of packages that can change a number). Values that are not finite become null.
    Raises OutputError if the folder cannot be written.
    """
    write_bytes(out / "results.csv", frame(rows).to_csv(index=False, lineterminator="\n").encode())
    document = {
        "command": command,
        "version": __version__,
        "config": config,
        "elapsed_s": round(elapsed_s, 3),
        "metrics": [{key: _finite(value) for key, value in row.items()} for row in rows],
        "bad_images": [{"path": path, "reason": reason} for path, reason in bad_images],
        **({"derived": derived} if derived else {}),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS},
    }
    write_bytes(out / "results.json", (json.dumps(document, indent=2, default=str, allow_nan=False) + "\n").encode())


def read_results(out: Path, command: str) -> Finished:
    """Return the results of a finished run of `command`.

    Raises OutputError if its results.json is damaged or from another command.
    """
    file = out / "results.json"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            {key: math.nan if value is None else value for key, value in row.items()} for row in document["metrics"]
        ]
        elapsed_s, made_by = float(document["elapsed_s"]), document["command"]
        bad_images = [(str(each["path"]), str(each["reason"])) for each in document.get("bad_images", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{file} cannot be read ({error}); use --force instead of --resume to run again") from error
    if made_by != command:
        raise OutputError(f"{out}: holds results of {made_by}, not of {command}; choose another --out")
    return Finished(rows, elapsed_s, bad_images)


def main_rows(rows: Sequence[Row]) -> list[Row]:
    """Return all rows except details of another row: a single draw, classifier of a grid, class or severity."""
    return [row for row in rows if row.keys().isdisjoint({"split", "classifier", "class", "severity"})]


def columns(rows: Sequence[Row]) -> list[str]:
    """Return every key of the rows: model, metric and value first, the others in order of appearance."""
    keys = dict.fromkeys(key for row in rows for key in row)
    first = dict.fromkeys(key for key in ("model", "metric", "value") if key in keys)
    return list(first | keys)


def _finite(value: str | int | float) -> str | int | float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return None
