"""The contents of a run's folder, read for a report."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass as checked

from mimref.config.base import CommandConfig, Section
from mimref.config.load import flatten, setting_fields
from mimref.config.recipe import Derived
from mimref.errors import OutputError
from mimref.evaluation.assess.config import AssessConfig
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.evaluation.cluster.config import ClusterConfig
from mimref.evaluation.config import CompareConfig
from mimref.evaluation.exhibits.contents import Exhibits, first_problem
from mimref.pretraining.config import PretrainConfig
from mimref.refinement.config import RefineConfig
from mimref.reports.assessment import block_rows
from mimref.results import Row
from mimref.transfer.finetune.config import FinetuneConfig
from mimref.transfer.segment.config import SegmentConfig
from mimref.transfer.suite.config import SuiteConfig

RESULTS, LOG, SETTINGS = "results.json", "metrics.jsonl", "config.toml"
_MODELS: Mapping[str, type[CommandConfig]] = {
    model.command: model
    for model in (
        *(RefineConfig, PretrainConfig, CompareConfig, BlocksConfig, AssessConfig, ClusterConfig),
        *(SuiteConfig, FinetuneConfig, SegmentConfig),
    )
}
COMMANDS = (*_MODELS, "robustness")
"""Commands whose runs have a report."""
WITH_IMAGES = ("refine", "pretrain", "compare", "analyze-blocks", "cluster")
"""Commands that write exhibits.json."""
# Command of each stage in the log: nothing else identifies the command of an unfinished run.
_COMMAND_OF_STAGE = {"heads": "refine", "encoder": "refine", "pretrain": "pretrain", "finetune": "finetune"}
MOST_CHARACTERS = 1000
"""Maximum length of a setting's value; suites are long lists."""

LogLine = dict[str, Any]
"""One line of metrics.jsonl: `step`, `epoch`, `stage`, and numbers or lists with one number per head."""


@dataclass(frozen=True)
class Run:
    """A finished or unfinished run, as read from its folder."""

    folder: Path
    command: str
    finished: bool
    config: Mapping[str, Any]
    """Resolved settings, by section."""
    rows: list[Row] = field(default_factory=list)
    log: list[LogLine] = field(default_factory=list)
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of every skipped image."""
    elapsed_s: float | None = None
    version: str = ""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    derived: list[Derived] = field(default_factory=list)
    """Settings that a recipe derived or adapted."""
    exhibits: Exhibits | None = None
    notes: list[str] = field(default_factory=list)
    """Notes on what the folder lacks."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name or str(self.folder)


@checked(frozen=True)
class _BadImage:
    path: str
    reason: str


@checked(frozen=True)
class _Results:
    """Contents of results.json."""

    command: str
    config: dict[str, Any]
    elapsed_s: float
    metrics: list[dict[str, str | int | float | None]]
    version: str = ""
    bad_images: list[_BadImage] = field(default_factory=list)
    versions: dict[str, str | None] = field(default_factory=dict)
    derived: list[Derived] = field(default_factory=list)


_RESULTS = TypeAdapter(_Results)


def read_run(folder: Path) -> Run:
    """Read a finished run, or the settings and the log so far of an unfinished one.

    Raises OutputError, which names the file, for a folder without a run, a damaged file, or a command without a report.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder; pass the output folder of a run")
    if (folder / RESULTS).is_file():
        return _finished(folder)
    if (folder / LOG).is_file():
        return _unfinished(folder)
    raise OutputError(f"{folder}: holds neither {RESULTS} nor {LOG}; pass the output folder of a run")


def newest_run(below: Path) -> Path:
    """Return the folder in `below` with the newest results that have a report. Raises OutputError if there is none."""
    files = sorted(below.glob(f"*/{RESULTS}"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    found = next(filter(_may_have_report, files), None)
    if found is None:
        raise OutputError(f"{below}: holds no finished run of {', '.join(COMMANDS)}; pass the output folder of a run")
    return found.parent


def _may_have_report(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_bytes())["command"] in COMMANDS)
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return True  # damaged: `read_run` reports how


def _finished(folder: Path) -> Run:
    file = folder / RESULTS
    try:
        # pydantic's own parser rejects halves of surrogate pairs, which paths may contain.
        found = _RESULTS.validate_python(json.loads(file.read_bytes()))
        if any("metric" not in row or isinstance(row.get("value", ""), str) for row in found.metrics):
            raise ValueError("a row of metrics without a metric or a value")
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{file}: damaged ({first_problem(error)}); run the command again") from error
    if found.command not in COMMANDS:
        raise OutputError(f"{file}: results of {found.command!r}; reports show those of {', '.join(COMMANDS)}")
    exhibits = Exhibits.read(folder)
    notes = (
        []
        if exhibits or found.command not in WITH_IMAGES
        else ["The folder holds no images (exhibits.json): maps and galleries are not shown."]
    )
    log = _read_log(folder / LOG, finished=True)[0] if (folder / LOG).is_file() else []
    rows = [{key: math.nan if value is None else value for key, value in row.items()} for row in found.metrics]
    if found.command == AssessConfig.command:
        rows = block_rows(rows) or rows
    bad = [(each.path, each.reason) for each in found.bad_images]
    return Run(
        *(folder, found.command, True, found.config, rows, log, bad, found.elapsed_s, found.version, found.versions),
        *(found.derived, exhibits, notes),
    )


def _unfinished(folder: Path) -> Run:
    from mimref.config.presets import read_preset

    log, cut = _read_log(folder / LOG, finished=False)
    stages = [str(line.get("stage", "")) for line in log]
    command = next((_COMMAND_OF_STAGE[stage] for stage in stages if stage in _COMMAND_OF_STAGE), None)
    if command is None:
        raise OutputError(f"{folder / LOG}: holds no training log so far; wait for one, or pass another run's folder")
    config = read_preset(folder / SETTINGS, command) if (folder / SETTINGS).is_file() else {}
    notes = ["The run is not finished: these are its measurements so far."]
    if cut:
        notes.append(f"The last line of {LOG} is incomplete, and left out.")
    return Run(folder, command, False, config, log=log, notes=notes)


def _read_log(file: Path, *, finished: bool) -> tuple[list[LogLine], bool]:
    """Return the lines, and whether an incomplete last line, which the run may be writing, is left out."""
    lines: list[LogLine] = []
    try:
        content = file.read_bytes()
    except OSError as error:
        raise OutputError(f"{file}: cannot be read ({error.strerror})") from error
    *whole, rest = content.split(b"\n")
    if rest and finished:
        raise OutputError(f"{file}: damaged (line {len(whole) + 1} is incomplete); remove the file to do without it")
    for number, line in enumerate(whole, start=1):
        try:
            values = json.loads(line)
            epoch = values.get("epoch") if isinstance(values, dict) else None
            if not isinstance(epoch, int | float) or not math.isfinite(epoch):
                raise ValueError("no epoch")
        except (ValueError, RecursionError) as error:
            reason = f"line {number}: {first_problem(error)}"
            raise OutputError(f"{file}: damaged ({reason}); remove the file to do without it") from error
        lines.append(values)
    return lines, bool(rest)


# --- settings


@dataclass(frozen=True)
class Setting:
    """One setting of a run."""

    key: str
    value: str
    default: str
    changed: bool


def settings(run: Run) -> list[Setting]:
    """Return every setting by its dotted key, with its default; required settings have none and count as changed."""
    defaults: dict[str, Any] = {}
    for key, known in setting_fields(_model(run.command)).items():
        if not known.is_required():
            value = known.get_default(call_default_factory=True)
            # A section's default may differ from the defaults of its own fields, which come later.
            defaults = flatten({key: value.model_dump(mode="json") if isinstance(value, Section) else value}) | defaults
    found = []
    for key, value in flatten(run.config).items():
        default = defaults.get(key)
        default = list(default) if isinstance(default, tuple) else default
        changed = key not in defaults or value != default
        found.append(Setting(key, _shown(value), _shown(default) if key in defaults else "", changed))
    return found


def _model(command: str) -> type[CommandConfig]:
    if command in _MODELS:
        return _MODELS[command]
    from mimref.transfer.robustness.config import RobustnessConfig  # imports torchvision

    return RobustnessConfig


def _shown(value: object) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def setting(run: Run, key: str) -> Any:
    """Return the value of a dotted key; None if the run does not have it."""
    value: Any = run.config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def checkpoints(run: Run) -> Sequence[str]:
    """Return the weights that a run read."""
    named = (setting(run, key) for key in ("encoder.weights", "base", "refined", "checkpoint", "checkpoints"))
    return [str(each) for value in named if value for each in (value if isinstance(value, list) else [value])]
