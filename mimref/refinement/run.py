"""Refine an encoder: train the heads on the frozen encoder, then encoder and heads together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mimref.data.views import Photometric
from mimref.devices import keep_freed_memory, resolve_device, resolve_precision
from mimref.distributed.group import own_rank, world_size
from mimref.encoders.checkpoints import save_encoder
from mimref.encoders.parameters import freeze_untrained
from mimref.encoders.vit import Encoder
from mimref.errors import ConfigError, DataError
from mimref.evaluation.compare import before_after, labelled_splits
from mimref.evaluation.monitor import KnnMonitor
from mimref.features.encode import PassSettings
from mimref.features.header import data_record
from mimref.progress import Listener
from mimref.refinement.alignment import Queue
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import Heads
from mimref.refinement.memory import choose_micro_batch
from mimref.refinement.method import Method
from mimref.refinement.plan import Plan, base_encoder, header_of, make_plan
from mimref.refinement.reuse import load_heads, save_heads
from mimref.refinement.stages import EncoderStage, HeadsStage
from mimref.refinement.sweep import rank_heads
from mimref.results import Row, Tabular
from mimref.training.run import TrainingRun


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
    """Run the stages that `config` asks for, and write the refined encoder, its log and the results into `out`.

    resume: continue the unfinished run in `out`; of a finished one, return its results. force: replace the files of an
    earlier run in `out`. Raises UserError subclasses for settings, images, weights or folders that do not fit, before
    anything is written; DivergenceError when the loss is no longer finite; Interrupted after saving on a signal.
    In a process group every rank calls this with the same arguments. Rank 0 alone writes, leaves the group at the end
    and evaluates; the other ranks' results have no rows.
    """
    run = TrainingRun(config, out, listener)
    if (found := run.finished(resume=resume, force=force)) is not None:
        return RefineResult(out, *found)
    with run.locked(resume=resume, force=force):
        plan = make_plan(config, run.listener.progress)
        state = run.load_state(plan.source, resume=resume)
        for notice in plan.checkpoint.notices(plan.architecture):
            run.listener.note(notice)
        for warning in (*plan.warnings, *plan.source.notices):
            run.listener.warn(warning)
        method = build_method(plan, run.listener)
        monitor = _monitor(plan, method, run.listener)
        if plan.config.heads_from is not None and state is None:
            load_heads(Path(plan.config.heads_from), plan, method, run.listener)
        with run.writing(plan.config, state, resume=resume, force=force):
            refined, nn_accuracy = _train(run, plan, method, monitor, state)
        if not run.leave_group():
            return RefineResult(out, [], run.elapsed_s)
        # Written before the evaluation, which may fail or be interrupted, and again with its results.
        _write_encoder(run, plan, refined, [])
        rows = _evaluate(run, plan, method, monitor, refined, nn_accuracy)
        _write_encoder(run, plan, refined, rows)
        run.finish(rows)
    return RefineResult(out, rows, run.elapsed_s)


def build_method(plan: Plan, listener: Listener) -> Method:
    """Encoder, heads and queue of a plan, on its device; heads are distributed, the encoder not yet."""
    config, device = plan.config, resolve_device(plan.config.device)
    if device.type == "cpu":
        keep_freed_memory()
    encoder = base_encoder(plan, device)
    freeze_untrained(encoder, first=config.encoder_stage.freeze_blocks, last=max(plan.blocks))
    encoder.checkpointing = config.activation_checkpointing
    torch.manual_seed(config.seed)
    heads = Heads(config.heads, len(plan.blocks), encoder.embed_dim).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    method = Method(
        encoder,
        heads,
        Queue(len(plan.blocks), config.heads.queue_size, config.heads.output, generator=generator, device=device),
        Photometric(config.views, config.seed, device, mean=plan.transform.mean, std=plan.transform.std),
        blocks=plan.blocks,
        temperature=plan.temperature,
        pool=config.heads.pool,
        loss=config.loss,
        precision=resolve_precision(config.precision, device),
        most_images=-(-config.batch_size // world_size()),
    )
    method.micro_batch = choose_micro_batch(method, plan, listener)
    method.distribute_heads()
    if config.compile:
        # In place, so that weights keep their names. One piece of code for all blocks; with dynamic shapes, for both
        # sizes of views as well.
        for block in encoder.vit.blocks:
            block.compile(dynamic=True)
        heads.compile(dynamic=True)
    return method


def _monitor(plan: Plan, method: Method, listener: Listener) -> KnnMonitor:
    return KnnMonitor(plan.config, plan.source, plan.transform, method.device, method.precision, note=listener.note)


def _train(
    run: TrainingRun, plan: Plan, method: Method, monitor: KnnMonitor, state: dict[str, Any] | None
) -> tuple[Encoder, list[float]]:
    """Train both stages, or what is left of them. Returns the result, and the heads' last neighbour accuracy."""
    nn_accuracy: list[float] = []
    if plan.heads_steps and (state is None or state["stage"] == "heads"):
        heads = HeadsStage(run, plan, method)
        if state:
            heads.resume(state)
            state.clear()  # as large as the run itself
        run.train(heads)
        if own_rank() == 0:
            save_heads(run.folder.path / "heads.pt", plan, method)
        state, nn_accuracy = None, heads.nn_accuracy
        del heads  # and with it the moments of its optimizer
    if not plan.encoder_steps:
        return method.encoder, nn_accuracy
    encoder = EncoderStage(run, plan, method)
    if state:
        encoder.resume(state)
        state.clear()
    encoder.start_monitor(monitor)
    run.train(encoder)
    return encoder.result, encoder.nn_accuracy


def _evaluate(
    run: TrainingRun, plan: Plan, method: Method, monitor: KnnMonitor, refined: Encoder, nn_accuracy: Sequence[float]
) -> list[Row]:
    """Rows of the results. What cannot be evaluated is reported and left out: it must not cost the training."""
    try:
        if plan.config.stage == "heads":
            return _rank_heads(run, plan, method, monitor, nn_accuracy)
        return _compare(run, plan, method, refined) if plan.config.evaluate.enabled else []
    except (ConfigError, DataError) as error:
        run.listener.warn(f"no results table: {error}")
        return []


def _rank_heads(
    run: TrainingRun, plan: Plan, method: Method, monitor: KnnMonitor, nn_accuracy: Sequence[float]
) -> list[Row]:
    rows = rank_heads(
        method.encoder,
        method.heads,
        monitor,
        blocks=plan.blocks,
        temperature=plan.temperature,
        pool=plan.config.heads.pool,
        nn_accuracy=list(nn_accuracy),
    )
    if not rows:
        run.listener.note(f"no ranking of the heads: {plan.source.name} has no labelled validation images")
    return rows


def _compare(run: TrainingRun, plan: Plan, method: Method, refined: Encoder) -> list[Row]:
    config = plan.config
    try:
        images = labelled_splits(config.data)
    except DataError as error:
        run.listener.note(f"no before/after table: {error}")
        return []
    reading = PassSettings(
        plan.transform, method.device, method.precision, workers=config.workers, max_bad=config.data.max_bad
    )

    def encoders() -> Iterator[tuple[str, Encoder]]:
        yield "base", base_encoder(plan, method.device)
        yield "refined", refined

    rows, bad = before_after(config, images, encoders(), reading, run.listener.progress)
    run.skipped.add_evaluated(bad)
    return rows


@torch.no_grad()
def _write_encoder(run: TrainingRun, plan: Plan, refined: Encoder, rows: Sequence[Row]) -> None:
    header = {
        **header_of(plan),
        "preset": plan.config.preset,
        "data": data_record(plan.config.data),
        "transform": plan.transform.to_dict(),
        "metrics": [row for row in rows if row.get("model") == "refined"],
    }
    save_encoder(run.folder.path / "encoder.safetensors", refined, header)
