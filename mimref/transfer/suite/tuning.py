"""Fine-tuning entries: choose the learning rate on held-out images, then take the mean over seeds (VTAB-1K)."""

from pathlib import Path
from typing import Any

from mimref.config.base import DataConfig
from mimref.config.load import load_config
from mimref.errors import Checks, DivergenceError
from mimref.evaluation.metrics import spread
from mimref.progress import Listener, Silent
from mimref.results import EvaluationResult, Row, main_rows
from mimref.training.folder import RunFolder, check_same, with_absolute_paths
from mimref.training.run import TrainingResult
from mimref.transfer.finetune.config import FinetuneConfig
from mimref.transfer.finetune.plan import make_plan
from mimref.transfer.finetune.run import finetune
from mimref.transfer.suite.config import EntryConfig

METRIC = "finetune_top1"


def finetune_entry(config: FinetuneConfig, entry: EntryConfig, folder: Path, listener: Listener) -> EvaluationResult:
    """Fine-tune with every learning rate and seed on `tune_data`, then with the best rate and every seed on the data.

    Scores are those of the last epoch; of equally good rates, the first is chosen; one that diverges scores 0. Each run
    has its own folder below `folder`, where it can be resumed; its weights are deleted once it is finished. Rows:
    `finetune_top1`, the mean over the seeds, with `lr`; then `tune_top1` of every rate.
    """
    rows, elapsed_s, bad = list[Row](), 0.0, list[tuple[str, str]]()

    def mean_score(metric: str, place: str, rate: float | None, data: DataConfig) -> Row:
        """Return mean and standard deviation over the seeds, in percent, of runs in `place`.

        rate: the learning rate; None: that of the settings, or the one that a recipe derives.
        """
        nonlocal elapsed_s
        scores = []
        changes: dict[str, Any] = {"data": data}
        if rate is not None:
            changes["finetune"] = config.finetune.model_copy(update={"lr": rate})
        chosen = "" if rate is None else f" with finetune.lr {rate:g}"
        for seed in range(config.seed, config.seed + entry.seeds):
            changed = config.model_copy(update={"seed": seed, **changes})
            listener.note(f"{entry.name}: {metric}{chosen}, seed {seed}")
            run = _run(changed, folder / place / f"seed{seed}", listener)
            scores.append(_last_score(run))
            elapsed_s += run.elapsed_s
            bad.extend(run.bad_images)
        mean, std = spread(scores)
        return {"metric": metric, "value": mean, "mean": mean, "std": std, "seeds": len(scores)}

    for rate in entry.learning_rates:
        tune_data = config.data.model_copy(update={"spec": entry.tune_data})
        try:
            found = mean_score("tune_top1", f"lr{rate:g}", rate, tune_data)
        except DivergenceError as error:
            listener.note(f"{entry.name}: finetune.lr {rate:g} counts as 0: {error}")
            found = {"metric": "tune_top1", "value": 0.0}
        rows.append(found | {"lr": rate})
    lr = float(max(rows, key=lambda row: float(row["value"]))["lr"]) if rows else None
    best = mean_score(METRIC, "final", lr, config.data)
    if lr is None:
        settings = folder / "final" / f"seed{config.seed}" / "config.toml"
        lr = load_config(FinetuneConfig, str(settings)).finetune.lr
    return EvaluationResult([best | {"lr": lr}, *rows], elapsed_s, list(dict.fromkeys(bad)))


def _run(config: FinetuneConfig, out: Path, listener: Listener) -> TrainingResult:
    """Start or continue a run, or read a finished one; delete its weights."""
    run = RunFolder(out)
    if run.finished:
        then = load_config(FinetuneConfig, str(out / "config.toml"))
        now = with_absolute_paths(make_plan(config, Silent(), Checks()).config)
        check_same(then, now, f"cannot use the finished run in {out}")
    result = finetune(config, out, resume=run.finished or run.unfinished, listener=listener)
    for weights in out.glob("*.safetensors"):
        weights.unlink()
    return result


def _last_score(result: TrainingResult) -> float:
    """Return the accuracy after the last epoch."""
    (row,) = (row for row in main_rows(result.rows) if (row["metric"], row["selected"]) == (METRIC, "last epoch"))
    return float(row["value"])
