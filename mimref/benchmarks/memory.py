"""Find which ways of training fit the memory of GPUs: one pass or micro-batches, recomputing, sharding.

Memory is predicted from shapes, on any machine and for GPUs of any size; see `peak`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mimref.benchmarks.measure import Facts, Ticks
from mimref.benchmarks.peak import StepPeak, step_peak
from mimref.benchmarks.stage import describe_encoder, resolve_encoder
from mimref.encoders.backbones import EncoderArchitecture
from mimref.errors import ConfigError
from mimref.progress import Progress
from mimref.refinement.config import RefineConfig
from mimref.refinement.memory import half
from mimref.refinement.schedule import StageName
from mimref.refinement.sizes import StateBytes, exchanged_bytes, meta_modules, state_bytes
from mimref.results import Row

USABLE = 0.9
"""Share of a card's memory that the plan uses. The rest is left for what is not predicted: the CUDA context, workspaces
of its libraries, NCCL buffers, and gaps between tensors."""


@dataclass(frozen=True)
class PeakMemory:
    """Memory of a process in bytes, at the peak of a step."""

    state: int
    """Weights, moments, average, queue and base, and gradients where they are held from step to step."""
    step: int
    """What the step allocates in addition: activations, gradients, similarities, logits, the batch itself."""
    update: int
    """The whole state with gradients: what the update needs after the activations are freed."""

    @property
    def total(self) -> int:
        """The larger of the update's memory and the step's with the state."""
        return max(self.update, self.state + self.step)


def predict_peak(config: RefineConfig, stage: StageName) -> PeakMemory:
    """Predict the peak of a step in one process on CUDA, with the settings' batch, micro-batch and recomputing.

    Raises ConfigError for settings that do not fit the encoder.
    """
    architecture, blocks = resolve_encoder(config)
    micro = config.micro_batch if isinstance(config.micro_batch, int) else None
    found = step_peak(
        config,
        architecture,
        blocks,
        stage,
        images=config.batch_size,
        micro_batch=micro,
        checkpointing=config.activation_checkpointing,
    )
    return _peak(state_bytes(config, architecture, blocks, stage), found.bytes, gradients_held=False)


def _peak(state: StateBytes, step: int, *, gradients_held: bool) -> PeakMemory:
    # The base's tokens are part of the step.
    update = state.total - state.tokens
    return PeakMemory(update if gradients_held else update - state.gradients, step, update)


@dataclass(frozen=True)
class Way:
    """A way of training a batch on one or more GPUs."""

    recompute: bool
    """`activation_checkpointing`."""
    shard: bool
    """`--shard`: every GPU holds a part of the encoder."""


WAYS = tuple(Way(recompute, shard) for shard in (False, True) for recompute in (False, True))
"""Ordered from the fastest to the one that needs the least memory."""


def plan_memory(
    config: RefineConfig,
    gpus: Sequence[int],
    cards: Sequence[int],
    *,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Row]:
    """Predict the peak memory of every way, per number of GPUs and card size in GiB, and whether it fits.

    Each way uses the largest micro-batch that fits: a GPU's whole share of the batch, half of it, a quarter, and so on
    down to 1, which is reported if nothing fits. The plan is for stage 2, which needs more memory than stage 1. Ways
    that the encoder does not support are left out; `note` receives the reason, once per number of GPUs. A preset's
    micro-batch and recomputing are ignored. Raises ConfigError for settings that do not fit the encoder or the numbers
    of GPUs, and for given ones that would choose a way.
    """
    if chosen := sorted(config.given & {"micro_batch", "activation_checkpointing", "shard"}):
        raise ConfigError(f"{chosen[0]} has no effect: all ways of training are predicted; leave it out")
    architecture, blocks = resolve_encoder(config)
    if max(gpus) > config.batch_size:
        raise ConfigError(
            f"--gpus {max(gpus)}: batches of {config.batch_size} leave some GPUs without an image; set --batch-size "
            f"{max(gpus)} or more, or --gpus {config.batch_size} or less"
        )
    tick = Ticks(progress, 2 * len(gpus))
    rows: list[Row] = []
    for processes in gpus:
        steps: dict[bool, _Steps] = {}
        for recompute in (False, True):
            try:
                steps[recompute] = _steps(config, architecture, blocks, processes, recompute, note)
            except ConfigError as error:  # the encoder cannot recompute its activations
                if note is not None:
                    note(str(error))
            tick()
        for way in (each for each in (WAYS if processes > 1 else WAYS[:2]) if each.recompute in steps):
            shards = processes if way.shard else 1
            state = state_bytes(config, architecture, blocks, "encoder", shards=shards)
            beside = exchanged_bytes(config, len(blocks), processes)
            beside += gathered_bytes(config, architecture, blocks) if way.shard else 0
            for card in cards:
                room = int(USABLE * card * 2**30)
                micro, peak = _largest(steps[way.recompute], state, beside, room, gradients_held=processes > 1)
                row: Row = {"metric": "memory_peak_gib", "value": peak.total / 2**30}
                row |= {"model": describe_encoder(architecture), "heads": len(blocks)}
                row |= {"views": 2 + config.views.local_views, "batch": config.batch_size, "gpus": processes}
                row |= {"card_gib": card, "recompute": way.recompute, "shard": way.shard}
                row |= {"images": steps[way.recompute].images, "micro_batch": micro, "fits": peak.total <= room}
                rows.append(row | {"state_gib": peak.update / 2**30})
    return rows


@dataclass(frozen=True)
class _Steps:
    """Peak bytes of one process's steps, as a function of the micro-batch; see `StepPeak`."""

    images: int
    """Images of the process per step."""
    whole: int
    """Peak of a step in one pass."""
    heads: int
    """Peak of heads and loss, after encoder passes without gradients."""
    one: int
    """Peak of the encoder's second pass with micro-batches of one image."""
    each: int
    """Added to `one` by each further image of a micro-batch."""
    smallest: int = 1
    """Smallest micro-batch: all images if the encoder cannot run in parts."""

    def bytes(self, micro: int) -> int:
        """Return the peak of a step, without the state."""
        return self.whole if micro == self.images else max(self.heads, self.one + self.each * (micro - 1))


def _steps(
    config: RefineConfig,
    architecture: EncoderArchitecture,
    blocks: list[int],
    processes: int,
    recompute: bool,
    note: Callable[[str], None] | None = None,
) -> _Steps:
    """Predict steps in one pass and in micro-batches of one and two images, from which all others follow linearly."""
    images = -(-config.batch_size // processes)

    def step(micro: int | None) -> StepPeak:
        """Return the bytes of a step with `micro` images per encoder pass; None: the process's share of the batch."""
        return step_peak(
            config,
            architecture,
            blocks,
            "encoder",
            # Two full micro-batches, even if the process has fewer images.
            images=images if micro is None else max(images, 2 * micro),
            micro_batch=micro,
            checkpointing=recompute,
            gradients_held=processes > 1,
        )

    whole = step(None)
    try:
        one, two = step(1), step(2)
    except ConfigError as error:
        if note is not None:
            note(str(error))
        return _Steps(images, whole.whole, 0, 0, 0, smallest=images)
    return _Steps(images, whole.whole, max(one.whole, two.whole), one.parts, two.parts - one.parts)


def _largest(
    steps: _Steps, state: StateBytes, beside: int, room: int, *, gradients_held: bool
) -> tuple[int, PeakMemory]:
    """Return the largest micro-batch that fits in `room` bytes, or the smallest if none does, and its peak."""
    micro = steps.images
    while True:
        peak = _peak(state, steps.bytes(micro) + beside, gradients_held=gradients_held)
        if peak.total <= room or micro == steps.smallest:
            return micro, peak
        micro = half(micro)


def gathered_bytes(config: RefineConfig, architecture: EncoderArchitecture, blocks: list[int]) -> int:
    """Return the bytes of other shards held at the peak: two blocks, one of them prefetched, and their gradients."""
    encoder, _ = meta_modules(config, architecture, blocks, "encoder")
    sizes = [sum(4 * weight.numel() for weight in block.parameters()) for block in encoder.block_modules]
    return 2 * sum(sorted(sizes)[-2:])


def memory_facts(rows: Sequence[Row]) -> Facts:
    """Describe the plan in words, with one line per way, number of GPUs and card."""
    facts: Facts = []
    for row in rows:
        what = f"{row['gpus']} x {row['card_gib']} GB, {way_text(row)}"
        how = "in one pass" if row["micro_batch"] == row["images"] else f"in micro-batches of {row['micro_batch']}"
        verdict = "fits" if row["fits"] else "does not fit"
        facts.append((what, f"{verdict}: {float(row['value']):,.1f} GiB per GPU, {row['images']} images {how}"))
    return facts


def memory_page(rows: Sequence[Row]) -> str:
    """Return the plan in Markdown."""
    first = rows[0]
    setting = f"{first['model']}, {first['heads']} heads, {first['views']} views, batches of {first['batch']}"
    return f"{setting}, GiB per GPU:\n\n{memory_table(rows)}"


def memory_table(rows: Sequence[Row]) -> str:
    """Return the plan as a Markdown table: a row per way, a column per number and size of GPUs."""
    columns = list(dict.fromkeys((row["gpus"], row["card_gib"]) for row in rows))
    ways = list(dict.fromkeys(way_text(row) for row in rows))
    cell = {(way_text(row), row["gpus"], row["card_gib"]): _cell(row) for row in rows}
    lines = ["| | " + " | ".join(f"{gpus} x {card} GB" for gpus, card in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    lines += [f"| {way} | " + " | ".join(cell.get((way, *column), "") for column in columns) + " |" for way in ways]
    return "\n".join(lines) + "\n"


def way_text(row: Row) -> str:
    """Describe the way of training of a row."""
    parts = ["shards" if row["shard"] else "whole weights"] + ["recomputing"] * bool(row["recompute"])
    return ", ".join(parts)


def _cell(row: Row) -> str:
    size = f"{float(row['value']):,.1f} GiB"
    if not row["fits"]:
        return f"no: {size}"
    return f"{size}, {'one pass' if row['micro_batch'] == row['images'] else row['micro_batch']}"
