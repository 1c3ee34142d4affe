"""Refine an encoder: train the heads on the frozen encoder, then encoder and heads together."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from mimref.data.views import Photometric
from mimref.devices import choose_attention, keep_freed_memory, resolve_device, resolve_precision
from mimref.distributed.collectives import averaged
from mimref.distributed.group import own_rank, world_size
from mimref.encoders.backbones import TokenEncoder
from mimref.encoders.checkpoints import save_encoder
from mimref.encoders.parameters import freeze_untrained
from mimref.errors import Checks, ConfigError, DataError
from mimref.evaluation.assess.measures import MEASURES
from mimref.evaluation.compare import before_after, labelled_splits, lost_accuracy
from mimref.evaluation.exhibits.collect import Exhibition, encoder_model
from mimref.evaluation.lowshot.protocol import load_solver
from mimref.evaluation.monitor import KnnMonitor
from mimref.features.header import data_record
from mimref.progress import Listener, optional
from mimref.refinement.alignment import Queue
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import Heads
from mimref.refinement.memory import check_ranks, choose_micro_batch
from mimref.refinement.method import Method, compile_blocks
from mimref.refinement.plan import Plan, base_encoder, heads_file, make_plan
from mimref.refinement.reuse import load_heads, save_heads
from mimref.refinement.stages import EncoderStage, HeadsStage
from mimref.refinement.sweep import rank_heads
from mimref.results import Row
from mimref.training.run import TrainingResult, TrainingRun


def refine(
    config: RefineConfig,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    listener: Listener | None = None,
    checks: Checks | None = None,
) -> TrainingResult:
    """Run the stages that `config` asks for, and write the refined encoder, its log and the results into `out`.

    resume: continue the unfinished run in `out`, or return the results of a finished one. force: replace the files of
    an earlier run in `out`. checks: mistakes found earlier. Raises UserError subclasses for settings, images, weights
    or folders that do not fit, a single error for all mistakes, before anything is written; DivergenceError if the loss
    is no longer finite; Interrupted after saving on a signal.
    In a process group every rank calls this with the same arguments. Only rank 0 writes; at the end it leaves the group
    and evaluates. The results of the other ranks have no rows.
    """
    run = TrainingRun(config, out, listener, resume=resume, force=force, shard=config.shard)
    checks = checks or Checks()
    if (heads_from := config.heads_from) is not None and not resume:  # a saved state holds the heads
        checks.run("heads_from", lambda: heads_file(heads_from))
    if (found := run.finished(checks)) is not None:
        return TrainingResult(out, *found)
    if not checks.passed:
        make_plan(config, run.listener.progress, checks)  # finds what else is wrong, and raises
    with run.locked():
        plan = make_plan(config, run.listener.progress, checks)
        state = run.load_state(plan.source)
        for notice in (*plan.notices, *plan.derived):
            run.listener.note(str(notice))
        for warning in (*plan.warnings, *plan.source.notices):
            run.listener.warn(warning)
        method = build_method(plan, run.listener)
        device, precision, note = method.device, method.precision, run.listener.note
        monitor = KnnMonitor(plan.config, plan.source, plan.transform, device, precision, note=note)
        if plan.config.heads_from is not None and state is None:
            load_heads(Path(plan.config.heads_from), plan, method, run.listener)
        with run.writing(plan.config, plan.derived, state, plan.checkpoint):
            trained = _train(run, plan, method, monitor, state)
        del method  # its device must now hold whole encoders
        if not run.leave_group():
            return TrainingResult(out, [], run.elapsed_s)
        # Written before the evaluation, which may fail or be interrupted, and again with its results.
        _write_encoder(run, plan, trained.encoder, [])
        # A failed evaluation is reported and skipped: the trained encoder must not be lost.
        try:
            if plan.config.stage == "heads":
                rows = _rank_heads(run, plan, trained, monitor)
            else:
                rows = _compare(run, plan, monitor, trained.encoder)
        except (ConfigError, DataError) as error:
            run.listener.warn(f"no results table: {error}")
            rows = []
        _write_encoder(run, plan, trained.encoder, rows)
        run.finish(rows)
    return TrainingResult(out, rows, run.elapsed_s, run.skipped.items)


def build_method(plan: Plan, listener: Listener, *, try_memory: bool = True) -> Method:
    """Build a plan's encoder, heads and queue on its device; ranks average the heads' gradients, not yet the encoder's.

    With `shard`, encoder and heads are divided among the ranks, and the encoder is moved to the device block by block.
    try_memory: if no micro-batch is set, find out which one fits on a GPU.
    """
    config, device = plan.config, resolve_device(plan.config.device)
    if device.type == "cpu":
        keep_freed_memory()
    sharded = config.shard and world_size() > 1
    encoder = base_encoder(plan, torch.device("cpu"), share=True) if sharded else base_encoder(plan, device)
    freeze_untrained(encoder, first=config.encoder_stage.freeze_blocks, last=max(plan.blocks))
    check_ranks(encoder)
    precision = resolve_precision(config.precision, device)
    choose_attention(encoder, device, precision)
    encoder.checkpointing = config.activation_checkpointing
    torch.manual_seed(config.seed)
    heads = Heads(config.heads, plan.widths).to(device)
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
        precision=precision,
        most_images=-(-config.batch_size // world_size()),
    )
    # Both steps below involve all ranks, so their order matters.
    if try_memory or isinstance(config.micro_batch, int):
        method.micro_batch = choose_micro_batch(method, plan, listener)
    if sharded:
        method.shard()
    else:
        method.trained_heads = averaged(heads, device)
    if config.compile and _compiles(device, listener):
        compile_blocks(encoder)
        heads.compile(dynamic=True)
        method.compiled = True
    return method


def _compiles(device: torch.device, listener: Listener) -> bool:
    """Return whether torch.compile works here, so that it fails at the start rather than during training.

    It needs a C++ compiler, on CUDA also Triton, and a folder for compiled code.
    """
    works = False
    with optional("compile=true is ignored: torch.compile does not work here", listener):
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
        works = True
    return works


class Trained(NamedTuple):
    """The result of training, which rank 0 alone evaluates."""

    encoder: TokenEncoder
    """The refined encoder; the base after a heads-only run."""
    heads: Heads
    nn_accuracy: list[float]
    """Each head's last nearest-neighbour accuracy in stage 1, in percent."""


def _train(run: TrainingRun, plan: Plan, method: Method, monitor: KnnMonitor, state: dict[str, Any] | None) -> Trained:
    """Train both stages, or the rest of them after resuming."""
    nn_accuracy: list[float] = []
    if plan.heads_steps and (state is None or state["stage"] == "heads"):
        heads = HeadsStage(run, plan, method)
        heads.monitor = monitor
        run.train(heads, state)
        if run.sharded or own_rank() == 0:
            save_heads(run.folder.path / "heads.pt", plan, method)
        nn_accuracy = heads.nn_accuracy
        del heads  # frees the moments of its optimizer
    if plan.encoder_steps:
        stage = EncoderStage(run, plan, method)
        stage.monitor = monitor
        run.train(stage, state)
        return Trained(stage.final_result(), method.heads, nn_accuracy)
    sharded, encoder = method.sharded_encoder, method.encoder
    if sharded is not None:
        encoder = cast(TokenEncoder, sharded.plain_on_first(sharded.weights))
    return Trained(encoder, method.plain_heads(), nn_accuracy)


def _rank_heads(run: TrainingRun, plan: Plan, trained: Trained, monitor: KnnMonitor) -> list[Row]:
    encoder, heads, accuracy = trained
    encoder = encoder.to(monitor.settings.device)
    rows = rank_heads(encoder, heads, monitor, plan.columns, plan.temperature, accuracy)
    if not rows:
        run.listener.note(f"no ranking of the heads: {plan.source.name} has no labelled validation images")
    return rows


def _compare(run: TrainingRun, plan: Plan, monitor: KnnMonitor, refined: TokenEncoder) -> list[Row]:
    config, settings = plan.config, monitor.settings
    if not config.evaluate.enabled:
        return []

    def encoders() -> Iterator[tuple[str, TokenEncoder]]:
        yield "base", base_encoder(plan, settings.device)
        yield "refined", refined.to(settings.device)  # sharded weights are gathered on the CPU

    try:
        images = labelled_splits(config.data, plan.source, monitor.val)
    except DataError as error:
        run.listener.note(f"measures without labels in place of k-NN, low-shot and clustering: {error}")
        return _measure_unlabelled(run, plan, monitor, encoders())
    protocols = ["knn", "cluster"]
    with optional("no low-shot results", run.listener):
        load_solver()
        protocols.insert(1, "lowshot")
    exhibition = Exhibition(images[1], settings, config.seed, run.listener) if config.evaluate.exhibits else None
    progress, note = run.listener.progress, run.listener.note
    rows, bad = before_after(
        config, images, encoders(), settings, progress, protocols=protocols, note=note, exhibition=exhibition
    )
    run.skipped.add_evaluated(bad)
    if plan.encoder_steps and (lost := lost_accuracy(rows, len(images[1]))) is not None:
        run.listener.warn(lost)
    for notice in images[1].peculiarities("validation images"):
        run.listener.warn(notice)
    if exhibition is not None:
        exhibition.save(run.folder.path)
    return rows


def _measure_unlabelled(
    run: TrainingRun, plan: Plan, monitor: KnnMonitor, encoders: Iterator[tuple[str, TokenEncoder]]
) -> list[Row]:
    """Return the rows of all measures for which higher or lower is better, and save some training images to show."""
    rows: list[Row] = []
    exhibition = Exhibition.of_some(plan.source, monitor.settings, plan.config.seed, run.listener, "training images")
    for model, encoder in encoders:
        values = monitor.check(encoder)
        measures = [name for name in MEASURES if name in values and name != "alpha_req"]
        rows += [{"model": model, "metric": name, "value": values[name]} for name in measures]
        if plan.config.evaluate.exhibits:
            exhibition.add_passes([encoder_model(model, encoder, monitor.settings)])
    exhibition.save(run.folder.path)
    return rows


def _write_encoder(run: TrainingRun, plan: Plan, refined: TokenEncoder, rows: Sequence[Row]) -> None:
    source = " ".join(filter(None, [plan.config.encoder.source, "refined" if plan.encoder_steps else None]))
    header: dict[str, Any] = {"source": source} if source else {}
    if plan.checkpoint.licence:
        header["licence"] = plan.checkpoint.licence
    header |= {
        "preset": run.config.preset,
        "data": data_record(plan.config.data),
        "transform": plan.transform.to_dict(),
        "metrics": [row for row in rows if row.get("model") == "refined"],
    }
    save_encoder(run.folder.path / "encoder.safetensors", refined, header)
