"""Which way of training fits the memory of GPUs: one pass or micro-batches, recomputing, sharding.

Predicted from shapes, for a GPU of any size on any machine; see `peak`.
"""

from collections.abc import Sequence
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
"""Share of a card's memory that is planned with. The rest is for what is not predicted: CUDA's context, workspaces of
its libraries, NCCL's buffers, and gaps between tensors."""


@dataclass(frozen=True)
class PeakMemory:
    """Memory of a process in bytes, at the peak of a step."""

    state: int
    """Weights, moments, average, queue and base, and gradients where they are held from step to step."""
    step: int
    """What the step makes beside them: activations, gradients, similarities, logits, the batch itself."""
    update: int
    """All of the state, with gradients: what the update needs, when the activations are freed."""

    @property
    def total(self) -> int:
        """The larger of both."""
        return max(self.update, self.state + self.step)


def predict_peak(config: RefineConfig, stage: StageName) -> PeakMemory:
    """Peak of a step in one process on CUDA, with the batch, micro-batch and recomputing of the settings.

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
    """`--shard`: every GPU has a part of the encoder."""


WAYS = tuple(Way(recompute, shard) for shard in (False, True) for recompute in (False, True))
"""From the fastest to the one that takes the least memory."""


def plan_memory(
    config: RefineConfig, gpus: Sequence[int], cards: Sequence[int], *, progress: Progress | None = None
) -> list[Row]:
    """Peak memory of every way, for each number of GPUs and each size of their memory in GiB, and whether it fits.

    Each way has the largest micro-batch that fits: a GPU's whole part of the batch, half of it, a quarter ... down to
    1, which is given where nothing fits. Stage 2 is planned, which needs more than stage 1. Micro-batch and recomputing
    of the settings do not matter. Raises ConfigError for settings that do not fit the encoder or the numbers of GPUs.
    """
    architecture, blocks = resolve_encoder(config)
    if max(gpus) > config.batch_size:
        raise ConfigError(
            f"--gpus {max(gpus)}: batches of {config.batch_size} leave some GPUs without an image; set --batch-size "
            f"{max(gpus)} or more, or --gpus {config.batch_size} or less"
        )
    tick = Ticks(progress, 2 * len(gpus))
    rows: list[Row] = []
    for processes in gpus:
        steps = {}
        for recompute in (False, True):
            steps[recompute] = _steps(config, architecture, blocks, processes, recompute)
            tick()
        for way in WAYS if processes > 1 else WAYS[:2]:
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
    """Steps of one process by their micro-batch, in bytes; see `StepPeak`."""

    images: int
    """Of the process in every step."""
    whole: int
    """In one pass."""
    heads: int
    """Heads and loss, after passes of the encoder without gradient."""
    one: int
    """Parts of one image."""
    each: int
    """What every other image adds."""

    def bytes(self, micro: int) -> int:
        """Peak of a step beside the state."""
        return self.whole if micro == self.images else max(self.heads, self.one + self.each * (micro - 1))


def _steps(
    config: RefineConfig, architecture: EncoderArchitecture, blocks: list[int], processes: int, recompute: bool
) -> _Steps:
    """Of three micro-batches; those of others lie on the line through two."""
    images = -(-config.batch_size // processes)

    def step(micro: int | None) -> StepPeak:
        """Bytes of a step with so many images per encoder pass; None: all of the process's part of the batch."""
        return step_peak(
            config,
            architecture,
            blocks,
            "encoder",
            # Two full parts, also where the process has fewer images.
            images=images if micro is None else max(images, 2 * micro),
            micro_batch=micro,
            checkpointing=recompute,
            gradients_held=processes > 1,
        )

    whole, one, two = step(None), step(1), step(2)
    return _Steps(images, whole.whole, max(one.whole, two.whole), one.parts, two.parts - one.parts)


def _largest(
    steps: _Steps, state: StateBytes, beside: int, room: int, *, gradients_held: bool
) -> tuple[int, PeakMemory]:
    """The largest micro-batch for which there is room, or 1, and its peak."""
    micro = steps.images
    while True:
        peak = _peak(state, steps.bytes(micro) + beside, gradients_held=gradients_held)
        if peak.total <= room or micro == 1:
            return micro, peak
        micro = half(micro)


def gathered_bytes(config: RefineConfig, architecture: EncoderArchitecture, blocks: list[int]) -> int:
    """What a process has of other shards at the peak: two blocks, the second ahead of its use, with their gradients."""
    encoder, _ = meta_modules(config, architecture, blocks, "encoder")
    sizes = [sum(4 * weight.numel() for weight in block.parameters()) for block in encoder.block_modules]
    return 2 * sum(sorted(sizes)[-2:])


def memory_facts(rows: Sequence[Row]) -> Facts:
    """The plan in words, one line per way, number of GPUs and card."""
    facts: Facts = []
    for row in rows:
        what = f"{row['gpus']} x {row['card_gib']} GB, {way_text(row)}"
        how = "in one pass" if row["micro_batch"] == row["images"] else f"in micro-batches of {row['micro_batch']}"
        verdict = "fits" if row["fits"] else "does not fit"
        facts.append((what, f"{verdict}: {float(row['value']):,.1f} GiB per GPU, {row['images']} images {how}"))
    return facts


def memory_page(rows: Sequence[Row]) -> str:
    """The plan in Markdown."""
    first = rows[0]
    setting = f"{first['model']}, {first['heads']} heads, {first['views']} views, batches of {first['batch']}"
    return f"{setting}, GiB per GPU:\n\n{memory_table(rows)}"


def memory_table(rows: Sequence[Row]) -> str:
    """The plan as a table in Markdown: a row per way, a column per number and size of GPUs."""
    columns = list(dict.fromkeys((row["gpus"], row["card_gib"]) for row in rows))
    ways = list(dict.fromkeys(way_text(row) for row in rows))
    cell = {(way_text(row), row["gpus"], row["card_gib"]): _cell(row) for row in rows}
    lines = ["| | " + " | ".join(f"{gpus} x {card} GB" for gpus, card in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    lines += [f"| {way} | " + " | ".join(cell.get((way, *column), "") for column in columns) + " |" for way in ways]
    return "\n".join(lines) + "\n"


def way_text(row: Row) -> str:
    """How the batch is trained."""
    parts = ["shards" if row["shard"] else "whole weights"] + ["recomputing"] * bool(row["recompute"])
    return ", ".join(parts)


def _cell(row: Row) -> str:
    size = f"{float(row['value']):,.1f} GiB"
    if not row["fits"]:
        return f"no: {size}"
    return f"{size}, {'one pass' if row['micro_batch'] == row['images'] else row['micro_batch']}"
