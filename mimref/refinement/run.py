"""Refine an encoder: train the heads on the frozen encoder, then encoder and heads together."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mimref.distributed.collectives import agree
from mimref.distributed.group import end_group, own_rank
from mimref.encoders.checkpoints import save_encoder
from mimref.errors import ConfigError, DataError
from mimref.evaluation.compare import before_after, labelled_splits
from mimref.features.encode import PassSettings
from mimref.features.header import data_record
from mimref.progress import Listener, Silent
from mimref.refinement.config import RefineConfig
from mimref.refinement.plan import header_of, make_plan
from mimref.refinement.shared import Refinement
from mimref.refinement.stages import EncoderStage, HeadsStage
from mimref.refinement.sweep import rank_heads
from mimref.results import Row, Tabular, read_results, write_results
from mimref.training.checkpoint import check_images, check_ranks
from mimref.training.folder import RunFolder, reloadable
from mimref.training.job import train
from mimref.training.log import MetricsLog, open_log
from mimref.training.signals import StopSignal, stop_signal
from mimref.training.trackers import check_trackers


@dataclass(frozen=True)
class RefineResult(Tabular):
    """What a refinement produced."""

    out: Path
    rows: list[Row]
    """The before/after table, or a heads-only run's ranking of heads; empty without labels."""
    elapsed_s: float
    """Of training."""


def refine(
    config: RefineConfig, out: Path, *, resume: bool = False, force: bool = False, listener: Listener | None = None
) -> RefineResult:
    """Run the stages that `config` asks for and write the refined encoder, its log and the results into `out`.

    resume: continue the unfinished run in `out`; of a finished one, return its results. force: replace what a run has
    left in `out`. Raises UserError subclasses for settings, images, weights or folders that do not fit, before anything
    is written; DivergenceError when the loss is no longer finite; Interrupted after saving when a signal arrives.
    In a process group every rank calls this with the same arguments; rank 0 alone writes, and evaluates at the end,
    when it has left the group. The other ranks' results have no rows.
    """
    listener = listener if listener and own_rank() == 0 else Silent()
    folder = RunFolder(out)
    if folder.holds_result(resume=resume, force=force):
        found = read_results(out, config.command)
        folder.drop_state()  # of a run killed just before it did so itself
        return RefineResult(out, *found)
    check_trackers(config.monitor.trackers)
    with stop_signal() as stop, folder.locked(resume=resume, force=force):
        plan = make_plan(config, listener.progress)
        config = reloadable(plan.config)
        state = folder.load_state(listener) if resume else None
        check_ranks(state, plan.source)
        if state:
            check_images(state, plan.source, listener)
        for notice in plan.checkpoint.notices(plan.architecture):
            listener.note(notice)
        for warning in plan.warnings:
            listener.warn(warning)
        run = Refinement(plan, listener)
        if config.heads_from is not None and state is None:
            run.load_heads(Path(config.heads_from))
        folder.prepare(config, resume=resume, force=force)
        with closing(open_log(config, out, state)) as log:
            _train(run, folder, log, stop, state)
        agree(0)
        if not end_group():
            return RefineResult(out, [], run.elapsed_s)
        # Written before the evaluation, which may fail or be interrupted, and again with its results.
        _write_encoder(run, config, out, [])
        rows = _evaluate(run, listener)
        _write_encoder(run, config, out, rows)
        run.skipped.tell_all()
        write_results(
            out, config.command, config.model_dump(mode="json"), run.elapsed_s, rows, bad_images=run.skipped.items
        )
        folder.drop_state()
    return RefineResult(out, rows, run.elapsed_s)


def _train(run: Refinement, folder: RunFolder, log: MetricsLog, stop: StopSignal, state: dict[str, Any] | None) -> None:
    """Both stages, or the part of them that is left."""
    every = run.config.monitor.log_every
    if run.plan.heads_steps and (state is None or state["stage"] == "heads"):
        heads_stage = HeadsStage(run, folder, log)
        if state:
            heads_stage.resume(state)
            state.clear()  # as large as the run itself
        train(heads_stage, heads_stage.batches(), stop, run.listener, log_every=every)
        if own_rank() == 0:
            run.save_heads(folder.path / "heads.pt")
        state = None
        del heads_stage  # and with it the moments of its optimizer
    if run.plan.encoder_steps:
        encoder_stage = EncoderStage(run, folder, log)
        if state:
            encoder_stage.resume(state)
            state.clear()
        encoder_stage.start_watch()
        train(encoder_stage, encoder_stage.batches(), stop, run.listener, log_every=every)


def _evaluate(run: Refinement, listener: Listener) -> list[Row]:
    """The rows of the result. What cannot be evaluated is told and left out: the training is not to be lost for it."""
    try:
        if run.config.stage == "heads":
            return _rank_heads(run, listener)
        return _compare(run, listener) if run.config.evaluate.enabled else []
    except (ConfigError, DataError) as error:
        listener.warn(f"no results table: {error}")
        return []


def _rank_heads(run: Refinement, listener: Listener) -> list[Row]:
    rows = rank_heads(
        run.encoder,
        run.heads,
        run.monitor,
        blocks=run.plan.blocks,
        temperature=run.plan.temperature,
        pool=run.config.heads.pool,
        nn_accuracy=run.nn_accuracy,
    )
    if not rows:
        listener.note(f"no ranking of the heads: {run.plan.source.name} has no labelled validation images")
    return rows


def _compare(run: Refinement, listener: Listener) -> list[Row]:
    config = run.config
    try:
        images = labelled_splits(config.data)
    except DataError as error:
        listener.note(f"no before/after table: {error}")
        return []
    encoders = ((name, make()) for name, make in (("base", run.base_encoder), ("refined", run.result_encoder)))
    reading = PassSettings(
        run.plan.transform, run.device, run.precision, workers=config.workers, max_bad=config.data.max_bad
    )
    rows, bad = before_after(config, images, encoders, reading, listener.progress)
    run.skipped.add_evaluated(bad)
    return rows


def _write_encoder(run: Refinement, config: RefineConfig, out: Path, rows: list[Row]) -> None:
    header = {
        **header_of(run.plan),
        "preset": config.preset,
        "data": data_record(config.data),
        "transform": run.plan.transform.to_dict(),
        "metrics": [row for row in rows if row.get("model") == "refined"],
    }
    with torch.no_grad():
        save_encoder(out / "encoder.safetensors", run.result_encoder(), header)
