"""What a refinement takes, from shapes alone: parameters, steps, and memory that does not depend on the batch."""

from dataclasses import dataclass

import torch

from mimref.encoders.checkpoints import encoder_from
from mimref.encoders.parameters import freeze_untrained
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import Heads
from mimref.refinement.plan import Plan
from mimref.refinement.schedule import StageName

_BYTES = 4  # training state is float32 whatever the precision of the computation


@dataclass(frozen=True)
class StateBytes:
    """Memory of a stage that does not depend on the batch, in bytes."""

    weights: int
    """Of encoder and heads, with their running statistics."""
    gradients: int
    moments: int
    """AdamW's two."""
    average: int
    """The averaged encoder of stage 2."""
    queue: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.average + self.queue


def meta_modules(
    config: RefineConfig, architecture: Architecture, blocks: list[int], stage: StageName
) -> tuple[Encoder, Heads]:
    """Encoder and heads on the meta device; what the stage does not train is frozen."""
    with torch.device("meta"):
        encoder = build_encoder(architecture)
        heads = Heads(config.heads, [architecture.widths[block - 1] for block in blocks])
    if stage == "heads":
        encoder.requires_grad_(False)
    else:
        freeze_untrained(encoder, first=config.encoder_stage.freeze_blocks, last=max(blocks))
    return encoder, heads


def state_bytes(config: RefineConfig, architecture: Architecture, blocks: list[int], stage: StageName) -> StateBytes:
    """Memory of a stage's weights, gradients, moments, average and queue."""
    encoder, heads = meta_modules(config, architecture, blocks, stage)
    encoder_count = sum(weight.numel() for weight in encoder.parameters())
    heads_count = sum(tensor.numel() for tensor in heads.state_dict().values())
    trained = sum(weight.numel() for part in (encoder, heads) for weight in part.parameters() if weight.requires_grad)
    return StateBytes(
        weights=_BYTES * (encoder_count + heads_count),
        gradients=_BYTES * trained,
        moments=_BYTES * 2 * trained,
        average=_BYTES * encoder_count if stage == "encoder" else 0,
        queue=_BYTES * len(blocks) * config.heads.queue_size * config.heads.output,
    )


def describe(plan: Plan) -> dict[str, str]:
    """What `mimref refine --dry-run` shows of a plan, label to text.

    Raises CheckpointError when the weights do not fit.
    """
    config, architecture = plan.config, plan.architecture
    stage: StageName = "encoder" if plan.encoder_steps else "heads"
    _, heads = meta_modules(config, architecture, plan.blocks, stage)
    encoder_count, heads_count = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (encoder_from(plan.checkpoint, architecture), heads)
    )
    mebibytes = state_bytes(config, architecture, plan.blocks, stage).total / 2**20
    memory = f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:.1f} MiB"
    views = 2 + config.views.local_views
    facts = {
        "encoder": f"{architecture.name}, {architecture.depth} blocks of width {architecture.width}, "
        f"{'post' if architecture.post_norm else 'pre'}-norm, {encoder_count:,} parameters",
        "weights": str(plan.checkpoint.path),
        "heads": f"{len(plan.blocks)} at blocks {', '.join(map(str, plan.blocks))}, {heads_count:,} parameters",
        "images": f"{len(plan.source):,} of {plan.source.name}, {views} views each, batches of {config.batch_size}",
        "steps": f"{plan.heads_steps:,} (heads), then {plan.encoder_steps:,} (encoder and heads)",
        "memory": f"{memory} in float32 for weights, optimizer, average and queue, without activations",
        "notice": "; ".join(plan.notices),
        "warning": "; ".join([*plan.warnings, *plan.source.notices]),
    }
    return {label: text for label, text in facts.items() if text}
