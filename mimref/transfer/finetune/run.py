"""Fine-tuning of an encoder on labels: on all training images, or once per split of a few."""

from pathlib import Path

from mimref.distributed.collectives import barrier
from mimref.distributed.group import own_rank
from mimref.encoders.classifier import Classifier, save_classifier
from mimref.errors import Checks
from mimref.evaluation.metrics import spread
from mimref.features.header import data_record
from mimref.progress import Listener
from mimref.results import Row
from mimref.training.run import TrainingResult, TrainingRun
from mimref.transfer.finetune.config import FinetuneConfig
from mimref.transfer.finetune.plan import Plan, make_plan
from mimref.transfer.finetune.training import Epoch, FineTuning


def finetune(
    config: FinetuneConfig,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    listener: Listener | None = None,
    checks: Checks | None = None,
) -> TrainingResult:
    """Train an encoder and a linear classifier on labels, and write them, with log and results, to `out`.

    The validation images are classified every `monitor.validate_every_epochs` epochs and at the end. The last epoch's
    classifier is written as `encoder.safetensors`, which other commands read as an encoder; with several splits, as one
    `splitN.safetensors` each. resume: continue the unfinished run in `out`, or return the results of a finished one.
    force: replace an earlier run. checks: mistakes found before. Raises UserError subclasses for settings, images or
    folders that do not fit, one error for all mistakes; Interrupted after saving on a signal.
    In a process group every rank calls this with the same arguments, and only rank 0 writes.
    """
    run = TrainingRun(config, out, listener, resume=resume, force=force, shard=config.shard)
    checks = checks or Checks()
    if (found := run.finished(checks)) is not None:
        return TrainingResult(out, *found)
    plan = make_plan(config, run.listener, checks)
    history: list[list[Epoch]] = [[] for _ in plan.splits]
    with run.locked():
        state = run.load_state(plan.train)
        with run.writing(plan.config, plan.derived, state, plan.checkpoint):
            for split in range(state["split"] if state else 0, len(plan.splits)):
                job = FineTuning(run, plan, split, history)
                run.train(job, state)
                classifier = job.final_result()
                if own_rank() == 0:
                    _write(run, job, classifier, out)
                barrier()
        rows = score_rows(plan, history)
        for line in plan.val.peculiarities("validation images"):
            run.listener.warn(line)
        if run.leave_group():
            run.finish(rows)
    return TrainingResult(out, rows, run.elapsed_s, run.skipped.items)


def _write(run: TrainingRun, job: FineTuning, classifier: Classifier, out: Path) -> None:
    plan = job.plan
    name = "encoder" if len(plan.splits) == 1 else f"split{job.split + 1}"
    header = {
        "source": plan.config.encoder.source,
        "licence": plan.checkpoint.licence,
        "preset": run.config.preset,
        "data": data_record(run.config.data),
        "transform": plan.transform.to_dict(),
        "metrics": score_rows(plan, [job.history[job.split]]),
    }
    header = {key: value for key, value in header.items() if value is not None}
    save_classifier(out / f"{name}.safetensors", classifier, plan.classes, header)


def score_rows(plan: Plan, history: list[list[Epoch]]) -> list[Row]:
    """Return the accuracy after the last and after the best epoch; with several splits, the mean, then each split's.

    The best epoch is chosen on the images on which it is measured, as in published tables.
    """
    rows: list[Row] = []
    shots: Row = {} if plan.config.shots is None else {"shots": plan.config.shots}
    for selected in ("last epoch", "best epoch"):
        chosen = [epochs[-1] if selected == "last epoch" else max(epochs, key=_top1) for epochs in history]
        for name in ("top1", "top5"):
            scores = [epoch[name] for epoch in chosen if name in epoch]
            if not scores:
                continue
            common: Row = {"metric": f"finetune_{name}", "selected": selected, **shots}
            if len(history) == 1:
                rows.append({**common, "value": scores[0], "epoch": int(chosen[0]["epoch"])})
                continue
            mean, std = spread(scores)
            rows.append({**common, "value": mean, "mean": mean, "std": std, "splits": len(scores)})
            for split, (epoch, score) in enumerate(zip(chosen, scores, strict=True), 1):
                rows.append({**common, "value": score, "split": split, "epoch": int(epoch["epoch"])})
    return rows


def _top1(epoch: Epoch) -> float:
    return epoch["top1"]
