"""Rows of results, and the files results.csv and results.json, which mark a folder as finished."""

import csv
import io
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

from mimref import __version__
from mimref.errors import OutputError
from mimref.files import write_bytes

Row = dict[str, str | int | float]
"""One result: `metric`, `value` (percent, but for Davies-Bouldin) and every setting it was measured with."""


# Packages whose version can change a number.
VERSIONS = ("torch", "timm", "numpy", "scikit-learn", "cyanure", "umap-learn")
# Keys of rows that are one part of another row's measurement: a draw, one classifier of a grid, one class.
DETAILS = frozenset(["split", "classifier", "class"])


def check_folder(out: Path, force: bool) -> None:
    """Raise OutputError for a folder that holds results, unless they are to be replaced, or a run under way.

    Also for one that cannot be made or written, as far as can be seen: what was measured is not to be lost for it.
    """
    try:
        there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror}; give another --out") from error
    if not there.is_dir():
        raise OutputError(f"{out}: {there} is a file; give another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: {there} cannot be written; give another --out")
    if (out / "results.json").exists():
        if not force:
            raise OutputError(f"{out}: holds results; give another --out, or --force to replace them")
    elif (out / "metrics.jsonl").exists():
        # Results would pass for those of that run.
        raise OutputError(f"{out}: holds an unfinished run of refine or pretrain; give another --out")


def write_results(
    out: Path,
    command: str,
    config: Mapping[str, object],
    elapsed_s: float,
    rows: Sequence[Row],
    *,
    bad_images: Sequence[tuple[str, str]] = (),
) -> None:
    """Write results.csv (one line per row) and then results.json into the folder `out`, each in one step.

    config: the resolved settings. bad_images: path and reason of every image left out. JSON keys: command, version,
    config, elapsed_s, metrics (the rows), bad_images and versions (of the packages that can change a number). Values
    that are not finite become null, which JSON can hold. Raises OutputError when the folder cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(out / "results.csv", text.getvalue().encode())
    document = {
        "command": command,
        "version": __version__,
        "config": config,
        "elapsed_s": round(elapsed_s, 3),
        "metrics": [{key: _finite(value) for key, value in row.items()} for row in rows],
        "bad_images": [{"path": path, "reason": reason} for path, reason in bad_images],
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS},
    }
    write_bytes(out / "results.json", (json.dumps(document, indent=2, default=str, allow_nan=False) + "\n").encode())


def read_results(out: Path, command: str) -> tuple[list[Row], float]:
    """The rows and the elapsed seconds of a finished run of `command`.

    Raises OutputError when its results.json is damaged, or of another command.
    """
    file = out / "results.json"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        rows = [{key: _from_json(value) for key, value in row.items()} for row in document["metrics"]]
        elapsed_s, made_by = float(document["elapsed_s"]), document["command"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{file} cannot be read ({error}); --force runs again") from error
    if made_by != command:
        raise OutputError(f"{out}: holds results of {made_by}, not of {command}; give another --out")
    return rows, elapsed_s


def main_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows that stand for a setting as a whole: all but those marked as a detail of one (see `DETAILS`)."""
    return [row for row in rows if DETAILS.isdisjoint(row)]


def columns(rows: Sequence[Row]) -> list[str]:
    """Every key of the rows: model, metric and value first, the others as they appear."""
    keys = dict.fromkeys(key for row in rows for key in row)
    first = [key for key in ("model", "metric", "value") if key in keys]
    return first + [key for key in keys if key not in first]


def _finite(value: str | int | float) -> str | int | float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: str | int | float | None) -> str | int | float:
    return math.nan if value is None else value


def _version(package: str) -> str | None:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return None
