"""`mimref transfer`: evaluates every checkpoint on every entry of a suite, one after another, each in its own folder.

`--out` holds the settings in `suite.toml` and, for every entry and model, ENTRY/MODEL/results.json as the entry's own
command writes it. If this file exists, the evaluation is finished, and runs again only with `--force`.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mimref.config.base import CommandConfig, dump_config
from mimref.config.load import flatten
from mimref.data.decode import skipped_line
from mimref.data.open import absolute_spec
from mimref.data.pixels import DECODING
from mimref.distributed.group import world_size
from mimref.encoders.backbones import EncoderArchitecture
from mimref.encoders.checkpoints import choose_architecture, read_checkpoint
from mimref.encoders.published import must_download
from mimref.errors import Checks, ConfigError, LostRankError, OutputError, UserError
from mimref.evaluation.cluster.config import ClusterConfig
from mimref.evaluation.cluster.protocol import evaluate_cluster
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.evaluation.lowshot.config import LowshotConfig
from mimref.evaluation.lowshot.protocol import evaluate_lowshot
from mimref.evaluation.probe.config import ProbeConfig
from mimref.evaluation.probe.protocol import evaluate_probe
from mimref.features.header import resolve_data, with_channels
from mimref.features.inputs import distinct_names
from mimref.features.opening import check_device, open_images
from mimref.files import check_writable, write_bytes
from mimref.locks import folder_lock
from mimref.progress import Listener, Silent
from mimref.results import WRITTEN, EvaluationResult, Row, Tabular, main_rows, named, read_results, write_results
from mimref.training.folder import shown
from mimref.transfer.finetune.config import FinetuneConfig
from mimref.transfer.suite.config import SuiteConfig
from mimref.transfer.suite.plan import Entry, labelled_errors, plan_entries, with_absolute_paths
from mimref.transfer.suite.ranks import summary_rows
from mimref.transfer.suite.tuning import METRIC as FINETUNE_METRIC
from mimref.transfer.suite.tuning import finetune_entry

METRICS = {
    "knn": "knn_top1",
    "lowshot": "lowshot_top1",
    "probe": "probe_top1",
    "cluster": "cluster_acc",
    "finetune": FINETUNE_METRIC,
}
"""Metric that a suite shows for each protocol."""
# On resuming, these settings may differ from those of a finished entry.
_FREE = ("preset", "device", "workers", "data.root", "data.download", "data.max_bad")
_FREE_SECTIONS = ("cache.", "monitor.")
_FREE_OF = {True: ("micro_batch", "activation_checkpointing", "shard"), False: ("batch_size",)}
"""More such settings; keys: whether the entry is a fine-tuning."""
# A checkpoint's header may provide these where they are not set; results.json then records its values.
_RECORDED = tuple(f"data.{name}" for name in DECODING)


@dataclass(frozen=True)
class SuiteResult(Tabular):
    """Result of a suite."""

    rows: list[Row]
    """One row per entry and model, with `entry`; then the averages and ranks."""
    elapsed_s: float
    """Total time of all finished entries, also of those from earlier runs."""
    failed: list[UserError]
    """Reasons why entries have no result, one line each."""
    bad_images: list[tuple[str, str]]
    """Path and reason of every image left out in any entry."""


class _Read(NamedTuple):
    """What is known of a checkpoint before it runs."""

    header: Mapping[str, Any]
    architecture: EncoderArchitecture


@dataclass(frozen=True)
class _Part:
    """One checkpoint on one entry."""

    entry: Entry
    checkpoint: str
    model: str
    folder: Path

    @property
    def config(self) -> CommandConfig:
        config = self.entry.config
        if isinstance(config, FinetuneConfig):
            encoder = config.encoder.model_copy(update={"weights": self.checkpoint})
            return config.model_copy(update={"encoder": encoder})
        return config.model_copy(update={"checkpoint": self.checkpoint})

    @property
    def settings(self) -> dict[str, Any]:
        """Settings for results.json: the command's, and for a fine-tuning also the entry's."""
        settings = self.config.model_dump(mode="json")
        if isinstance(self.entry.config, FinetuneConfig):
            settings |= self.entry.given.model_dump(include={"seeds", "learning_rates", "tune_data"})
        return settings

    @property
    def label(self) -> str:
        return f"entry {self.entry.name!r}, {self.model}"

    @property
    def finished(self) -> bool:
        return (self.folder / "results.json").is_file()


def run_suite(
    config: SuiteConfig,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    listener: Listener | None = None,
    checks: Checks | None = None,
) -> SuiteResult:
    """Evaluate every checkpoint on every entry; write the results of each, and averages and ranks over all.

    An entry that cannot be run, for example because its data is missing or too small, is left out and reported in
    `failed`; the others run. Raises UserError subclasses, one error for all mistakes, for settings, checkpoints and a
    folder that cannot be used, before anything runs. resume: run only what is unfinished; force: run everything again.
    """
    listener, checks = listener or Silent(), checks or Checks()
    if world_size() > 1:
        checks.add("suite", ConfigError("a suite runs in one process; start it without torchrun, or one on each GPU"))
    check_device(config, checks)
    config = with_absolute_paths(config)
    entries = plan_entries(config, checks)
    models = checks.run("checkpoints", lambda: distinct_names(config.checkpoints)) or []
    parts = _parts(entries, config.checkpoints, models, out)
    # Skipped if the suite is unusable: the folder is then not one that the user named.
    checks.run("preset", lambda: _check_folder(out, parts, resume=resume, force=force))
    for part in parts if resume and not force else ():
        if part.finished:
            checks.run("suite", partial(_check_same, part))
    unfinished = [part for part in parts if force or not part.finished]
    finished = {part.checkpoint for part in parts} - {part.checkpoint for part in unfinished}
    read: dict[str, _Read] = {}
    for checkpoint in dict.fromkeys(config.checkpoints):
        if checkpoint not in finished and (checks.passed or not must_download(checkpoint)):
            found = checks.run("checkpoints", partial(_read_checkpoint, checkpoint, config, listener))
            if found is not None:
                read[checkpoint] = found
    checks.finish()
    listed = [entry.given.model_dump(exclude_unset=True, exclude_none=True) for entry in entries]
    config = config.model_copy(update={"entries": listed})
    with folder_lock(out):
        _check_folder(out, parts, resume=resume, force=force)
        _prepare(out, config, unfinished if force else [])
        failed = _run_parts(unfinished, read, listener)
        result = _finish(out, config, parts, models, failed)
    if result.bad_images:
        listener.warn(skipped_line(result.bad_images))
    return result


def _parts(entries: Sequence[Entry], checkpoints: Sequence[str], models: Sequence[str], out: Path) -> list[_Part]:
    """Return one part per entry and checkpoint, entry by entry."""
    # A model's name may be a path.
    folders = [re.sub(r"[^\w.+-]+", "-", model).strip("-.") for model in models]
    if len(set(folders)) < len(folders) or "" in folders:
        folders = [f"{number}-{name}" for number, name in enumerate(folders, start=1)]
    parts: list[_Part] = []
    for entry in entries:
        place = out / entry.name
        # An encoder's name depends on the others, which may have been added or renamed since it was measured.
        earlier = _finished_folders(place)
        for checkpoint, model, folder in zip(checkpoints, models, folders, strict=bool(models)):
            parts.append(_Part(entry, checkpoint, model, earlier.get(os.path.realpath(checkpoint), place / folder)))
    return parts


def _finished_folders(place: Path) -> dict[str, Path]:
    """Return the folders of an entry's finished evaluations, by the real path of their checkpoint."""
    found: dict[str, Path] = {}
    for file in sorted(place.glob("*/results.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            settings = flatten(json.loads(file.read_text(encoding="utf-8"))["config"])
            found[os.path.realpath(settings.get("checkpoint") or settings["encoder.weights"])] = file.parent
    return found


def _check_folder(out: Path, parts: Sequence[_Part], *, resume: bool, force: bool) -> None:
    """Raise OutputError for a folder that must not be used: without a suite in it, nothing there may be replaced."""
    if resume and force:
        raise OutputError("--resume continues a suite and --force starts it over: choose one")
    check_writable(out)
    suite = (out / "suite.toml").is_file()
    if resume and not suite:
        raise OutputError(f"{out}: holds no suite to resume; name its folder with --out, or omit --resume to start one")
    if suite and not (resume or force):
        raise OutputError(f"{out}: holds a suite; --resume runs what is missing, --force starts over")
    ours = [*(out / name for name in ("results.json", "metrics.jsonl", *WRITTEN)), *(part.folder for part in parts)]
    if not suite and (found := next(filter(os.path.lexists, ours), None)):
        raise OutputError(f"{out}: already holds {found.relative_to(out)}, and no suite; choose another --out")


def _check_same(part: _Part) -> None:
    """Raise ConfigError if a finished entry was measured with other settings, OutputError if they cannot be read."""
    file = part.folder / "results.json"
    try:
        then = flatten(json.loads(file.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{file} cannot be read ({error}); remove it, and --resume runs this entry again") from error
    is_finetuning = isinstance(part.entry.config, FinetuneConfig)
    free = (*_FREE, *_FREE_OF[is_finetuning])
    recorded = () if is_finetuning else _RECORDED
    for key, now in flatten(part.settings).items():
        if key not in then or key in free or key.startswith(_FREE_SECTIONS) or (now is None and key in recorded):
            continue
        if _meaning(key, then[key]) != _meaning(key, now):
            raise ConfigError(
                f"{part.label}: {key} was {shown(then[key])} and is now {shown(now)}; restore it, remove {part.folder} "
                "to run it again, or choose another --out"
            )


def _meaning(key: str, value: Any) -> Any:
    """Return the value of a setting, for paths in a form that equals any other way to write them."""
    if key in ("checkpoint", "encoder.weights") and value is not None:
        return os.path.realpath(value)
    if key in ("data.spec", "tune_data") and value is not None:
        return absolute_spec(value)
    return list(map(os.path.realpath, value)) if key == "split_files" else value


def _read_checkpoint(checkpoint: str, config: SuiteConfig, listener: Listener) -> _Read:
    """Raise CheckpointError or ConfigError for a file without an encoder of the expected architecture."""
    found = read_checkpoint(checkpoint, config.encoder, progress=listener.progress)
    return _Read(found.header, choose_architecture(found, config.arch, config.source, config.resolution))


def _prepare(out: Path, config: SuiteConfig, replaced: Sequence[_Part]) -> None:
    """Remove what is replaced, suite.toml first, so that remains never look finished; then write suite.toml."""
    for name in ("suite.toml", "results.json", *WRITTEN) if replaced else ():
        (out / name).unlink(missing_ok=True)
    for part in replaced:
        shutil.rmtree(part.folder, ignore_errors=True)
    write_bytes(out / "suite.toml", dump_config(config, defaults=False).encode())


def _run_parts(parts: Sequence[_Part], read: Mapping[str, _Read], listener: Listener) -> list[UserError]:
    """Run the parts, and return the errors of those that could not be run."""
    failed: list[UserError] = []
    missing: dict[str, UserError] = {}
    first: dict[str, _Part] = {}
    for part in parts:
        first.setdefault(part.entry.name, part)
    for name, part in first.items():
        try:
            labelled_errors(f"entry {name!r}", partial(_check_data, part.entry, read[part.checkpoint], listener))
        except UserError as error:
            missing[name] = error
            failed.append(error)
            listener.note(f"{error}; the others run")
    for part in (part for part in parts if part.entry.name not in missing):
        try:
            labelled_errors(part.label, partial(_run_part, part, listener))
        except (OutputError, LostRankError):
            raise
        except UserError as error:
            failed.append(error)
            listener.note(f"{error}; the others run")
    return failed


def _check_data(entry: Entry, read: _Read, listener: Listener) -> None:
    """Raise UserError subclasses for missing images, before the first entry runs.

    read: the first encoder to be measured, which may need images of other channels than three.
    """
    checks, data = Checks(), with_channels(resolve_data(entry.config.data, read.header), read.architecture)
    for spec in filter(None, (entry.given.data, entry.given.tune_data)):
        open_images(data.model_copy(update={"spec": spec}), listener.progress, checks)
    checks.finish()


def _run_part(part: _Part, listener: Listener) -> None:
    """Evaluate one checkpoint on one entry, and write the results to its folder."""
    result = _measure(part, listener)
    row = _main_row(part, result.rows)
    settings = part.settings if result.data is None else part.settings | {"data": result.data.model_dump(mode="json")}
    command, bad = part.config.command, result.bad_images
    write_results(part.folder, command, settings, result.elapsed_s, result.rows, bad_images=bad)
    shutil.rmtree(part.folder / "state", ignore_errors=True)
    listener.note(f"{part.entry.name}: {row['metric']} {float(row['value']):.1f} of {part.model}")


def _measure(part: _Part, listener: Listener) -> EvaluationResult:
    config = part.config
    if isinstance(config, KnnConfig):
        return evaluate_knn(config, listener=listener)
    if isinstance(config, LowshotConfig):
        return evaluate_lowshot(config, listener=listener)
    if isinstance(config, ClusterConfig):
        return evaluate_cluster(config, listener=listener)[0]
    if isinstance(config, ProbeConfig):
        return evaluate_probe(config, state=part.folder / "state" / "probe.pt", listener=listener)
    assert isinstance(config, FinetuneConfig)
    return finetune_entry(config, part.entry.given, part.folder, listener)


def _main_row(part: _Part, rows: Sequence[Row]) -> Row:
    """Return the one row that the suite shows."""
    attentive = isinstance(part.config, ProbeConfig) and part.config.probe.kind == "attentive"
    metric = "attentive_top1" if attentive else METRICS[part.entry.given.protocol]
    found = [row for row in main_rows(rows) if row["metric"] == metric]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} results of {metric}: an entry needs a single one, such as of one number of shots"
        )
    return found[0]


def _finish(
    out: Path, config: SuiteConfig, parts: Sequence[_Part], models: Sequence[str], failed: list[UserError]
) -> SuiteResult:
    """Collect the results of all finished entries, write them as the suite's results, and return them."""
    rows, elapsed_s, bad = list[Row](), 0.0, set[tuple[str, str]]()
    values: dict[str, dict[str, float]] = {}
    for part in (part for part in parts if part.finished):
        found = read_results(part.folder, part.entry.given.protocol)
        row = _main_row(part, found.rows) | {"model": part.model}
        rows += named([row], part.model, {"entry": part.entry.name, "data": part.entry.given.data})
        values.setdefault(part.entry.name, {})[part.model] = float(row["value"])
        elapsed_s += found.elapsed_s
        bad.update(found.bad_images)
    rows += summary_rows(values, models)
    write_results(out, config.command, config.model_dump(mode="json"), elapsed_s, rows, bad_images=sorted(bad))
    return SuiteResult(rows, elapsed_s, failed, sorted(bad))
