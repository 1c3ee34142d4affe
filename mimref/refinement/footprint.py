"""Memory of a refinement that does not depend on the batch, from shapes alone."""

from dataclasses import dataclass

import torch

from mimref.config import RefineConfig
from mimref.encoders.vit import Architecture, build_encoder
from mimref.refinement.heads import Heads
from mimref.refinement.schedule import StageName
from mimref.training.optim import freeze_untrained

_BYTES = 4
"""Of a number of the training state, which is float32 whatever the precision of the computations."""


@dataclass(frozen=True)
class StateBytes:
    """Memory of a stage that does not depend on the batch."""

    weights: int
    """Of encoder and heads, with their running statistics."""
    gradients: int
    moments: int
    """AdamW's two."""
    average: int
    """The averaged encoder, of stage 2."""
    queue: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.average + self.queue


def state_bytes(config: RefineConfig, architecture: Architecture, blocks: list[int], stage: StageName) -> StateBytes:
    """Memory of a stage's weights, gradients, moments, average and queue, from shapes alone."""
    with torch.device("meta"):
        encoder = build_encoder(architecture)
        heads = Heads(config.heads, len(blocks), encoder.embed_dim)
    if stage == "heads":
        encoder.requires_grad_(False)
    else:
        freeze_untrained(encoder, first=config.encoder_stage.freeze_blocks, last=max(blocks))
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
