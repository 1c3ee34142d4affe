"""Checked entries from a suite's settings: all mistakes in them are reported together, before anything runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

from mimref.config.base import CommandConfig
from mimref.config.load import flatten, load_config, setting_fields, validated
from mimref.config.presets import preset_names
from mimref.data.open import absolute_spec
from mimref.errors import Checks, ConfigError, UserError, UserErrors
from mimref.evaluation.cluster.config import ClusterConfig
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.lowshot.config import LowshotConfig
from mimref.evaluation.probe.config import ProbeConfig
from mimref.features.config import EvaluationConfig
from mimref.training.folder import absolute_path
from mimref.transfer.finetune.config import FinetuneConfig
from mimref.transfer.suite.config import EntryConfig, SuiteConfig

T = TypeVar("T")
MODELS: dict[str, type[CommandConfig]] = {
    model.command: model for model in (KnnConfig, LowshotConfig, ProbeConfig, ClusterConfig, FinetuneConfig)
}
# Settings that belong to the suite itself and are not passed on to its entries.
_OWN = ("preset", "checkpoints", "entries", "data.spec")


@dataclass(frozen=True)
class Entry:
    """An entry with its checked settings, except the checkpoint."""

    given: EntryConfig
    config: CommandConfig

    @property
    def name(self) -> str:
        """Name in the table, and of the entry's folder."""
        return self.given.name


def ask_for_suite() -> NoReturn:
    """Raise ConfigError with the names of the built-in suites."""
    known = ", ".join(name.partition("/")[2] for name in preset_names(SuiteConfig.command))
    raise ConfigError(f"no suite: pass --suite NAME ({known}) or --suite FILE.toml")


def plan_entries(config: SuiteConfig, checks: Checks) -> list[Entry]:
    """Return the valid entries; mistakes in the others are added to `checks`."""
    if not config.entries and "entries" not in checks.unusable:
        checks.add("suite", ConfigError(f"{config.preset or 'the suite'} has no entries; add [[entries]] tables"))
    if config.data.spec is not None:
        checks.add("suite", ConfigError(f"data.spec = {config.data.spec!r}: omit it; each entry has its own data"))
    entries: list[Entry] = []
    for number, table in enumerate(config.entries, start=1):
        label = f"entry {table.get('name', number)!r}"
        entry = checks.run("suite", partial(labelled_errors, label, partial(_plan_entry, config, table)))
        if entry is not None and any(entry.name == other.name for other in entries):
            checks.add("suite", ConfigError(f"{label}: another entry has the same name; rename one of them"))
        elif entry is not None:
            entries.append(entry)
    return entries


def labelled_errors(label: str, work: Callable[[], T]) -> T:
    """Return what `work` returns; the messages of the UserErrors that it raises get `label` as a prefix."""
    try:
        return work()
    except UserErrors as several:
        raise UserErrors([_labelled(label, error) for error in several.errors]) from several
    except UserError as error:
        raise _labelled(label, error) from error


def _labelled(label: str, error: UserError) -> UserError:
    return type(error)(f"{label}: {error}")


def with_absolute_paths(config: SuiteConfig) -> SuiteConfig:
    """Return the common settings with absolute paths, so that suite.toml means the same wherever it is read."""
    updates: dict[str, Any] = {"checkpoints": list(map(absolute_path, config.checkpoints))}
    if root := config.data.root:
        updates["data"] = config.data.model_copy(update={"root": absolute_path(root)})
    return config.model_copy(update=updates)


def _absolute_entry(entry: EntryConfig) -> EntryConfig:
    settings = flatten(entry.settings)
    if isinstance(root := settings.get("data.root"), str):
        settings["data.root"] = absolute_path(root)
    if isinstance(files := settings.get("split_files"), list):
        settings["split_files"] = [absolute_path(file) if isinstance(file, str) else file for file in files]
    updates: dict[str, Any] = {"data": absolute_spec(entry.data)} | ({"settings": settings} if settings else {})
    if entry.tune_data is not None:
        updates["tune_data"] = absolute_spec(entry.tune_data)
    if entry.preset is not None and entry.preset.endswith(".toml"):
        updates["preset"] = absolute_path(entry.preset)
    return entry.model_copy(update=updates)


def _plan_entry(config: SuiteConfig, table: Mapping[str, Any]) -> Entry:
    entry = _absolute_entry(validated(EntryConfig, table))
    model = MODELS[entry.protocol]
    known = setting_fields(model)
    given = flatten(config.model_dump(exclude_unset=True))
    for key in ("arch", "source"):
        if key in given and key not in known:
            given[f"encoder.{key}"] = given.pop(key)
    common = {key: value for key, value in given.items() if key in known and key not in _OWN}
    # A suite's numbers are comparable only with the preset's exact settings.
    common = {"strict": True} | common if "strict" in known else common
    found = load_config(model, entry.preset, common | flatten(entry.settings) | {"data.spec": entry.data})
    for key in {"checkpoint", "encoder.weights", "data.spec"} & flatten(entry.settings).keys():
        raise ConfigError(f"settings: {key} is set by the suite's checkpoints and the entry's data; leave it out")
    if isinstance(found, EvaluationConfig):
        _check_single(found)
    return Entry(entry, found)


def _check_single(config: EvaluationConfig) -> None:
    """Raise ConfigError or UserErrors for settings that do not give exactly one result."""
    checks, several = Checks(), dict[str, object]()
    if config.blocks == "all" or "," in config.blocks:
        several["blocks"] = config.blocks
    if isinstance(config, KnnConfig):
        several |= {key: values for key in ("k", "tau") if len(values := getattr(config, key)) > 1}
    if isinstance(config, LowshotConfig) and not config.split_files and len(config.shots) > 1:
        several["shots"] = config.shots
    for key, values in several.items():
        checks.add(key, ConfigError(f"{key} = {values}: an entry needs a single result; choose one value"))
    if isinstance(config, ClusterConfig) and "acc" not in config.metrics:
        checks.add("metrics", ConfigError(f"metrics = {config.metrics}: a suite shows acc, which is missing; add it"))
    if config.features is not None:
        checks.add("features", ConfigError("features: a suite evaluates checkpoints; leave it out"))
    checks.finish()
