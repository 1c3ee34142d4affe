"""What a refinement needs, computed from shapes alone: parameters, steps, and memory apart from activations."""

from dataclasses import asdict, dataclass

import torch

from mimref.distributed.group import world_size
from mimref.encoders.backbones import EncoderArchitecture, TokenEncoder, new_encoder, patch_shapes
from mimref.encoders.checkpoints import encoder_from
from mimref.encoders.parameters import freeze_untrained
from mimref.encoders.vit import Architecture
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import Heads
from mimref.refinement.plan import Plan
from mimref.refinement.schedule import StageName

_BYTES = 4  # training state is float32 whatever the precision of the computation


@dataclass(frozen=True)
class StateBytes:
    """Memory of a stage in bytes, without activations. Only `tokens` depends on the batch."""

    weights: int
    """Weights of encoder and heads, with the heads' running statistics."""
    gradients: int
    moments: int
    """The two moments of AdamW."""
    average: int
    """The averaged encoder of stage 2."""
    queue: int
    base: int = 0
    """The frozen base's weights, which a dense term needs."""
    tokens: int = 0
    """The base's patch tokens in one encoder pass, which a dense term needs."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def meta_modules(
    config: RefineConfig, architecture: EncoderArchitecture, blocks: list[int], stage: StageName
) -> tuple[TokenEncoder, Heads]:
    """Build encoder and heads on the meta device, with all parameters frozen that the stage does not train."""
    with torch.device("meta"):
        encoder = new_encoder(architecture)
        heads = Heads(config.heads, [architecture.widths[block - 1] for block in blocks])
    if stage == "heads":
        encoder.requires_grad_(False)
    else:
        freeze_untrained(encoder, first=config.encoder_stage.freeze_blocks, last=max(blocks))
    return encoder, heads


def state_bytes(
    config: RefineConfig, architecture: EncoderArchitecture, blocks: list[int], stage: StageName, *, shards: int = 1
) -> StateBytes:
    """Return the memory of a stage's weights, gradients, moments, average, queue and dense term.

    shards: number of processes among which encoder and heads are divided, with their gradients, moments, average and
    base; a head is never split. The queue is not divided.
    """
    encoder, heads = meta_modules(config, architecture, blocks, stage)
    own_heads = -(-len(blocks) // shards)
    encoder_count = -(-sum(weight.numel() for weight in encoder.parameters()) // shards)
    heads_count = sum(tensor.numel() for tensor in heads.state_dict().values()) * own_heads // len(blocks)
    trained_encoder, trained_heads = (
        sum(weight.numel() for weight in part.parameters() if weight.requires_grad) for part in (encoder, heads)
    )
    trained = -(-trained_encoder // shards) + trained_heads * own_heads // len(blocks)
    dense = stage == "encoder" and config.loss.dense != "none"
    return StateBytes(
        weights=_BYTES * (encoder_count + heads_count),
        gradients=_BYTES * trained,
        moments=_BYTES * 2 * trained,
        average=_BYTES * encoder_count if stage == "encoder" else 0,
        queue=_BYTES * len(blocks) * config.heads.queue_size * config.heads.output,
        base=_BYTES * encoder_count if dense else 0,
        tokens=_BYTES * _token_numbers(config, architecture, max(blocks)) if dense else 0,
    )


def exchanged_bytes(config: RefineConfig, heads: int, processes: int) -> int:
    """Return the peak bytes in a process for other processes' images: projections, and logits with gradients."""
    images = -(-config.batch_size // processes)
    others, pairs = config.batch_size - images, 1 + config.views.local_views
    # Projections of two views, once as received and once concatenated; logits of two views, and their gradients.
    projections, logits = 2 * 2 * heads * others * config.heads.output, 2 * 2 * heads * pairs * images * others
    return 4 * (projections + logits)


def _token_numbers(config: RefineConfig, architecture: EncoderArchitecture, block: int) -> int:
    """Return how many numbers the patch tokens of one encoder pass hold, for both global views of its images."""
    size = config.views.global_size or architecture.image_size
    count, width = patch_shapes(architecture, [block], size)[block]
    images = -(-config.batch_size // world_size())
    return 2 * (min(config.micro_batch, images) if isinstance(config.micro_batch, int) else images) * count * width


def _describe(architecture: EncoderArchitecture) -> str:
    """Describe an encoder by name, blocks and widths."""
    if isinstance(architecture, Architecture):
        kind = "post" if architecture.post_norm else "pre"
        return f"{architecture.name}, {architecture.depth} blocks of width {architecture.width}, {kind}-norm"
    widths = ", ".join(map(str, architecture.widths if len(set(architecture.widths)) > 1 else [architecture.width]))
    return f"{architecture.name}, {architecture.depth} blocks of width {widths}"


def describe(plan: Plan) -> dict[str, str]:
    """Return what `mimref refine --dry-run` shows for a plan, as text by label.

    Raises CheckpointError if the weights do not fit.
    """
    config, architecture = plan.config, plan.architecture
    stage: StageName = "encoder" if plan.encoder_steps else "heads"
    _, heads = meta_modules(config, architecture, plan.blocks, stage)
    encoder_count, heads_count = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (encoder_from(plan.checkpoint, architecture), heads)
    )
    state = state_bytes(config, architecture, plan.blocks, stage)
    mebibytes, parts = state.total / 2**20, "average, queue and base" if state.base else "average and queue"
    memory = f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:.1f} MiB"
    views = 2 + config.views.local_views
    facts = {
        "encoder": f"{_describe(architecture)}, {encoder_count:,} parameters",
        "weights": str(plan.checkpoint.path),
        "heads": f"{len(plan.blocks)} at blocks {', '.join(map(str, plan.blocks))}, {heads_count:,} parameters",
        "dense term": _dense_text(plan),
        "images": f"{len(plan.source):,} of {plan.source.name}, {views} views each, batches of {config.batch_size}",
        "steps": f"{plan.heads_steps:,} (heads), then {plan.encoder_steps:,} (encoder and heads)",
        "memory": f"{memory} in float32 for weights, optimizer, {parts}, without activations",
        "notice": "; ".join(plan.notices),
        "warning": "; ".join([*plan.warnings, *plan.source.notices]),
    }
    return {label: text for label, text in facts.items() if text}


def _dense_text(plan: Plan) -> str:
    """Describe the dense term of stage 2 and what it compares; empty without one."""
    config, last = plan.config, max(plan.blocks)
    if config.loss.dense == "none" or not plan.encoder_steps:
        return ""
    count, _ = patch_shapes(plan.architecture, [last], plan.crops[0].size)[last]
    term = f"{config.loss.dense}, weight {config.loss.dense_weight:g}"
    return f"{term}, on the {count} patches of block {last} in both global views"
