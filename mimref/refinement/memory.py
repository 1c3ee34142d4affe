"""Choosing the largest micro-batch that fits in the device's memory."""

import gc
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from timm.layers.drop import DropPath
from torch import nn

from mimref.data.loader import ViewBatch
from mimref.data.views import CropGroup
from mimref.distributed.collectives import max_over_ranks
from mimref.distributed.group import without_group, world_size
from mimref.errors import ConfigError
from mimref.progress import Listener
from mimref.refinement.dense import DenseTerm
from mimref.refinement.method import Method
from mimref.refinement.norms import settled
from mimref.refinement.plan import Plan
from mimref.refinement.schedule import StageName
from mimref.refinement.sizes import exchanged_bytes, state_bytes


def choose_micro_batch(method: Method, plan: Plan, listener: Listener) -> int | None:
    """Return the images per encoder pass that the settings ask for; None for whole batches.

    If the setting is `auto` or unset, measure what fits on a CUDA device, see `largest_micro_batch`.
    """
    asked = plan.config.micro_batch
    if isinstance(asked, int):
        check_exact(method.encoder)
        return asked
    if why := _whole_batches(method, plan):
        if asked == "auto":
            listener.note(f"micro_batch auto: {why}")
        return None
    stage: StageName = "heads" if plan.config.stage == "heads" else "encoder"
    to_come = state_bytes(plan.config, plan.architecture, plan.blocks, stage)
    reserve = to_come.moments + to_come.average + to_come.base
    if world_size() > 1:  # trials run without other ranks
        reserve += to_come.gradients + exchanged_bytes(plan.config, len(plan.blocks), world_size())
    fits = largest_micro_batch(method, plan, method.most_images, reserve=reserve)
    found = -max_over_ranks(-fits)  # the smallest on any rank
    listener.note(f"micro_batch auto: {found} of {method.most_images} images per encoder pass")
    return found


def _whole_batches(method: Method, plan: Plan) -> str:
    """Return why micro-batches are not measured; empty if they are."""
    if method.device.type != "cuda":
        # Other devices use the machine's memory, and nothing reports when it is full.
        return f"whole batches on {method.device.type}"
    if reason := _inexact(method.encoder):
        return f"whole batches, since the encoder has {reason}"
    if plan.config.shard and world_size() > 1:
        # Trials run without other ranks, and the encoder may not fit on one device.
        return "not measured for sharded weights, so whole batches; set --micro-batch N"
    return ""


def check_exact(encoder: nn.Module, subject: str = "micro_batch") -> None:
    """Raise ConfigError for an encoder for which passes over parts of a batch differ from one pass over all of it.

    subject: how the message begins.
    """
    if reason := _inexact(encoder):
        wrong = f"{reason}, so micro-batches would change the result"
        raise ConfigError(f"{subject}: the encoder has {wrong}; leave micro_batch unset and lower batch_size")


def _inexact(encoder: nn.Module) -> str:
    """Return which modules make passes over parts of a batch differ from one pass; empty if none do."""
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return "BatchNorm layers, whose statistics span the batch"
        if isinstance(module, nn.Dropout) and module.p > 0:
            return "dropout, which differs between passes"
        if isinstance(module, DropPath) and module.drop_prob:
            return "stochastic depth, which differs between passes"
    return ""


def check_ranks(encoder: nn.Module) -> None:
    """Raise ConfigError in a process group for an encoder whose result depends on how a batch is split among ranks."""
    if world_size() > 1 and any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in encoder.modules()):
        raise ConfigError(
            "the encoder has BatchNorm layers, whose statistics would be those of each process's part of the batch; "
            "train it in one process"
        )


def largest_micro_batch(method: Method, plan: Plan, most: int, *, reserve: int) -> int:
    """Return the largest micro-batch up to `most` that fits in the device's memory beside `reserve` bytes.

    Call this before heads and encoder are distributed: their passes would wait for other ranks.
    """
    train_encoder, made = plan.config.stage != "heads", method.dense
    if train_encoder and made is None and plan.config.loss.dense != "none":
        # Stage 2 creates the base, whose weights `reserve` includes; in the trials the encoder takes its place.
        method.dense = DenseTerm(method.encoder, max(plan.blocks), plan.config.loss.dense)
    # Bands (other channels than colour) may have more than 8 bits.
    dtype = torch.uint8 if plan.config.data.channels is None else torch.float32
    attempt = partial(
        try_step, method, plan.crops, method.most_images, reserve=reserve, train_encoder=train_encoder, dtype=dtype
    )
    try:
        with without_group():
            return largest_that_fits(attempt, most)
    finally:
        method.dense = made


def largest_that_fits(attempt: Callable[[int], None], most: int) -> int:
    """Return the largest of most, most / 2, most / 4, ... (rounded up) with which `attempt` has enough memory.

    Raises ConfigError if not even 1 fits.
    """
    size = most
    while True:
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError:
            pass  # the exception keeps the tensors alive: leave this block before trying again
        release_memory()
        size = half(size)


def half(size: int) -> int:
    """Return the size to try after `size` did not fit. Raises ConfigError if `size` is 1."""
    if size == 1:
        raise ConfigError(
            "out of memory with a single image per encoder pass; lower batch_size, the number of local views or "
            "heads.queue_size, or set activation_checkpointing=true"
        )
    return -(-size // 2)


def release_memory() -> None:
    """Free the memory that failed attempts have left allocated."""
    gc.collect()
    torch.cuda.empty_cache()


def try_step(
    method: Method,
    groups: list[CropGroup],
    batch_size: int,
    micro_batch: int,
    *,
    reserve: int = 0,
    train_encoder: bool = True,
    dtype: torch.dtype = torch.uint8,
) -> None:
    """Run one step, forward and backward, on black images, and restore everything that it has changed.

    reserve: bytes to hold at the same time. dtype: of the crops. Three batches of crops are held, as in training: the
    current one, the previous one, and one that is copied ahead. Raises torch.OutOfMemoryError.
    """
    before, queue = method.micro_batch, deepcopy(method.queue.state_dict())
    norms = [buffer.clone() for buffer in method.heads.buffers()]
    try:
        held = [torch.empty(reserve, dtype=torch.uint8, device=method.device)]
        method.micro_batch = micro_batch
        # Encoders for gray images also accept colour images, which need more memory.
        own = method.encoder.architecture.channels
        channels = 3 if own == 1 else own
        shapes = [(batch_size, group.count, channels, group.size, group.size) for group in groups]
        crops, *others = ([torch.zeros(s, dtype=dtype, device=method.device) for s in shapes] for _ in range(3))
        held += [each for batch_of_crops in others for each in batch_of_crops]
        batch = ViewBatch(0, torch.arange(batch_size), crops, [])
        weight_H = torch.ones(method.heads.num_heads, device=method.device)
        method.forward_backward(batch, weight_H, top_k=1, train_encoder=train_encoder)
        del held, others
    finally:
        method.micro_batch = before
        method.queue.load_state_dict(queue)
        for buffer, norm in zip(method.heads.buffers(), norms, strict=True):
            buffer.copy_(norm)
        method.settled = settled(method.heads)
        for module in (method.encoder, method.heads):
            module.zero_grad(set_to_none=True)
