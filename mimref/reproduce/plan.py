"""Derive the runs of a suite from its settings: equal ones run once, and what they share is trained once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimref.config.base import ReadingConfig, dump_config
from mimref.config.load import load_config
from mimref.devices import own_cores, resolve_device
from mimref.errors import Checks, ConfigError
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.evaluation.blocks.statistics import blocks_text
from mimref.evaluation.compare import labelled_splits
from mimref.features.config import CacheConfig
from mimref.progress import LabelledProgress
from mimref.refinement.config import RefineConfig
from mimref.refinement.plan import Plan, make_plan
from mimref.reproduce.config import AblationsConfig, refine_settings
from mimref.reproduce.table1 import Line, table_lines
from mimref.training.folder import check_same, with_absolute_paths

DEFAULT = "default"


@dataclass(frozen=True)
class Run:
    """One refinement, or the k-NN curve of one encoder over its blocks: a process with its own folder."""

    name: str
    config: RefineConfig | BlocksConfig
    out: Path
    """The suite's folder."""
    needs: tuple[str, Path] | None = None
    """Another run, and the file that it must have written before this one starts."""

    @property
    def folder(self) -> Path:
        return self.out / "runs" / self.name

    @property
    def settings(self) -> Path:
        """The file from which its process reads its settings."""
        return self.out / "settings" / f"{self.name}.toml"

    @property
    def log(self) -> Path:
        """The file with the output of its process."""
        return self.out / "logs" / f"{self.name}.txt"

    @property
    def finished(self) -> bool:
        return (self.folder / "results.json").is_file()


@dataclass(frozen=True)
class Suite:
    """Everything that a suite runs."""

    plan: Plan
    """Plan of the default refinement."""
    lines: list[Line]
    """Lines of the requested tables."""
    names: list[str]
    """Name of every line, whose runs are NAME-seedS."""
    seeds: list[int]
    refinements: list[Run]
    curves: list[Run]
    """k-NN curves of the base, then of the default refinement with every seed."""

    @property
    def runs(self) -> list[Run]:
        """All runs, in the order in which they start."""
        return [*self.refinements, *self.curves]


def run_name(name: str, seed: int) -> str:
    """Return the name of a line's run with this seed."""
    return f"{name}-seed{seed}"


def make_suite(
    config: AblationsConfig, out: Path, progress: LabelledProgress | None = None, checks: Checks | None = None
) -> Suite:
    """Check the default refinement as `mimref refine` does, and plan the runs of the tables. Writes nothing.

    Raises UserError subclasses, one error for all mistakes.
    """
    checks = checks or Checks()
    plan = make_plan(config, progress, checks)
    checks.run("data.spec", lambda: labelled_splits(plan.config.data, plan.source))
    if (last := max(plan.blocks)) != plan.architecture.depth:
        wrong = f"heads.blocks ends at block {last}; the tables' heads end at the last one, {plan.architecture.depth}"
        checks.add("heads.blocks", ConfigError(wrong))
    checks.finish()
    lines = table_lines(plan.config, plan.architecture.depth, plan.blocks)
    default = _default(plan, out)
    named, configs = {dump_config(default): DEFAULT}, {DEFAULT: default}
    names = []
    for line in lines:
        changed = _changed(default, line.changes)
        names.append(named.setdefault(dump_config(changed), line.name))
        configs[names[-1]] = changed
    # Names do not depend on which tables are requested.
    chosen = [(line, name) for line, name in zip(lines, names, strict=True) if line.table in config.tables]
    wanted = dict.fromkeys([DEFAULT, *(name for line, name in chosen if not line.missing)])
    refinements = [_refinement(name, configs[name], default, seed, out) for name in wanted for seed in config.seeds]
    return Suite(
        plan, [line for line, _ in chosen], [name for _, name in chosen], config.seeds, refinements,
        _curves(plan, default, config.seeds, out),
    )  # fmt: skip


def runs_of(suite: Suite, config: AblationsConfig) -> list[Run]:
    """Return the runs of a suite that the tables and seeds in `config` need."""
    names = {
        DEFAULT,
        *(name for line, name in zip(suite.lines, suite.names, strict=True) if line.table in config.tables),
    }
    wanted = {run_name(name, seed) for name in names for seed in config.seeds}
    base = suite.curves[0]
    return [run for run in suite.runs if run is base or run.name.removeprefix("blocks-") in wanted]


def _default(plan: Plan, out: Path) -> RefineConfig:
    """Return the settings that the process of the default refinement receives."""
    config = with_absolute_paths(refine_settings(plan.config))
    heads = config.heads.model_copy(update={"blocks": blocks_text(plan.blocks)})
    # The report's images are not needed for dozens of runs.
    evaluate = config.evaluate.model_copy(update={"exhibits": False})
    # On a CPU each run has a core of its own.
    one_core = config.workers is None and resolve_device(config.device).type == "cpu"
    workers = 1 if one_core and not plan.source.in_memory else config.workers
    return config.model_copy(update={"heads": heads, "evaluate": evaluate, "workers": workers})


def _changed(config: RefineConfig, changes: Mapping[str, Any]) -> RefineConfig:
    for key, value in changes.items():
        section, _, name = key.partition(".")
        update = {section: getattr(config, section).model_copy(update={name: value})}
        config = config.model_copy(update=update)
    return config


def _refinement(name: str, config: RefineConfig, default: RefineConfig, seed: int, out: Path) -> Run:
    """Plan a run; if its stage 1 equals the default's, it starts from the default's heads, with the same result."""
    config, needs = config.model_copy(update={"seed": seed}), None
    if name != DEFAULT and same_heads(config, default):
        first = Run(run_name(DEFAULT, seed), default, out)
        needs = first.name, first.folder / "heads.pt"
        config = config.model_copy(update={"stage": "encoder", "heads_from": str(first.folder.absolute())})
    return Run(run_name(name, seed), config, out, needs)


def same_heads(config: RefineConfig, default: RefineConfig) -> bool:
    """Return whether two refinements with the same seed share stage 1, as only settings of stage 2 differ."""
    loss = config.loss.model_copy(update={"schedule": default.loss.schedule})
    of_heads = {"loss": loss, "encoder_stage": default.encoder_stage, "seed": default.seed}
    return config.heads_stage.epochs > 0 and config.model_copy(update=of_heads) == default


def _curves(plan: Plan, default: RefineConfig, seeds: list[int], out: Path) -> list[Run]:
    encoder, evaluate = default.encoder, default.evaluate
    reading = ReadingConfig(**{name: getattr(encoder, name) for name in ReadingConfig.model_fields})
    common = BlocksConfig(
        data=default.data,
        device=default.device,
        precision=default.precision,
        workers=default.workers,
        cache=CacheConfig(folder="off"),
        k=min(evaluate.knn_k, len(plan.source)),
        tau=evaluate.knn_tau,
    )
    base = common.model_copy(
        update={
            "checkpoints": [encoder.weights or str(plan.checkpoint.path)],
            "encoder": reading,
            "arch": None if encoder.arch == "custom" else encoder.arch,
            "source": encoder.source,
            "resolution": encoder.image_size,
        }
    )
    curves = [Run("blocks-base", base, out)]
    for seed in seeds:
        refined = Run(run_name(DEFAULT, seed), default, out)
        needs = refined.name, refined.folder / "results.json"
        config = common.model_copy(update={"checkpoints": [str(refined.folder.absolute())]})
        curves.append(Run(f"blocks-{refined.name}", config, out, needs))
    return curves


def check_earlier(suite: Suite) -> None:
    """Raise ConfigError if an earlier run in the folder, which would be kept, had other settings."""
    for run in suite.refinements:
        if isinstance(run.config, RefineConfig) and run.settings.is_file():
            then = load_config(RefineConfig, str(run.settings))
            # The folder may have been moved.
            moved = {"heads_from": run.config.heads_from} if then.heads_from and run.config.heads_from else {}
            wrong = f"run {run.name} in {run.out} cannot be kept"
            check_same(then.model_copy(update=moved), run.config, wrong, evaluated=True)


def free_cores() -> int:
    """Return the number of cores that were idle over the last minute, at least 1."""
    try:
        busy = int(os.getloadavg()[0])
    except OSError:
        busy = 0
    return max(1, own_cores() - busy)
