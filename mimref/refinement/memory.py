"""Memory of a refinement: what its state takes, and the largest micro-batch that fits."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mimref.data.loader import ViewBatch
from mimref.data.views import CropGroup
from mimref.encoders.parameters import freeze_untrained
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import ConfigError
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import Heads
from mimref.refinement.method import RefinementStep
from mimref.refinement.schedule import StageName


def check_exact(encoder: nn.Module) -> None:
    """Raise ConfigError for an encoder whose second pass on a part would not repeat the first on the whole."""
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                "micro_batch: the encoder has BatchNorm layers, whose statistics span the batch, so that parts of it "
                "would give other results; leave micro_batch unset and lower batch_size"
            )
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ConfigError(
                "micro_batch: the encoder has dropout, which would differ between its two passes; leave it unset"
            )


def largest_that_fits(attempt: Callable[[int], None], most: int) -> int:
    """The largest of most, most / 2, most / 4, ... (rounded up) for which `attempt` does not run out of memory.

    Raises ConfigError when not even 1 fits.
    """
    size = most
    while True:
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError:
            pass  # the exception holds on to the tensors: leave it before trying again
        release_memory()
        size = half(size)


def half(size: int) -> int:
    """What to try when micro-batches of `size` do not fit. Raises ConfigError for those of a single image."""
    if size == 1:
        raise ConfigError(
            "out of memory with a single image per encoder pass; lower batch_size, the number of local views or "
            "heads.queue_size, or set activation_checkpointing=true"
        )
    return -(-size // 2)


def release_memory() -> None:
    """Hand back what failed attempts have left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def try_step(
    step: RefinementStep,
    groups: list[CropGroup],
    batch_size: int,
    micro_batch: int,
    *,
    reserve: int = 0,
    train_encoder: bool = True,
) -> None:
    """One whole step, forward and backward, on black images; nothing of it remains but the memory it needed.

    reserve: float32 numbers that are to have room beside it. Two batches of crops have, as in training, where one is
    copied ahead. Raises torch.OutOfMemoryError.
    """
    trained = [
        weight for module in (step.encoder, step.heads) for weight in module.parameters() if weight.requires_grad
    ]
    queue, before = step.queue.state_dict(), step.micro_batch
    kept = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in queue.items()}
    norms = {name: buffer.clone() for name, buffer in step.heads.named_buffers()}
    try:
        held = [torch.empty(reserve, device=step.device)]
        step.micro_batch = micro_batch
        crops, ahead = (
            [
                torch.zeros(batch_size, group.count, 3, group.size, group.size, dtype=torch.uint8, device=step.device)
                for group in groups
            ]
            for _ in range(2)
        )
        held += ahead
        batch = ViewBatch(0, torch.arange(batch_size), crops, [])
        weight_H = torch.ones(step.heads.num_heads, device=step.device)
        step.forward_backward(batch, weight_H, top_k=1, train_encoder=train_encoder)
        del held, ahead
    finally:
        step.micro_batch = before
        step.queue.load_state_dict(kept)
        for name, buffer in step.heads.named_buffers():
            buffer.copy_(norms[name])
        for weight in trained:
            weight.grad = None


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
