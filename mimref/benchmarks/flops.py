"""Floating-point operations, counted by torch; 2 per multiply-add."""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mimref.benchmarks.stage import image_channels
from mimref.data.views import multi_crop
from mimref.encoders.backbones import EncoderArchitecture
from mimref.refinement.config import RefineConfig
from mimref.refinement.dense import read_patches
from mimref.refinement.method import PooledBlocks
from mimref.refinement.schedule import StageName
from mimref.refinement.sizes import meta_modules

# torch's counter knows the fused attention kernels of GPUs but counts zero FLOPs for the CPU's.
_CPU_ATTENTION: dict[object, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}


def count_flops(work: Callable[[], object]) -> int:
    """Count the FLOPs of all products that `work` computes.

    In the backward pass, fused attention recomputes its scores: five products, where the plain kernel has four.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        work()
    return int(counter.get_total_flops())


def model_flops(config: RefineConfig, architecture: EncoderArchitecture, blocks: list[int], stage: StageName) -> int:
    """Count the FLOPs of encoder and heads per image in one step, forward and backward, on any machine.

    Counted from shapes alone. Frozen parts have no backward pass, and nothing is recomputed. The base's pass for a
    dense term is included; photometric augmentation, queue and loss are not.
    """
    groups = multi_crop(config.views, architecture.image_size)
    encoder, heads = meta_modules(config, architecture, blocks, stage)
    channels = image_channels(config)
    views = [torch.empty(group.count, channels, group.size, group.size, device="meta") for group in groups]
    wanted = sorted(set(blocks))

    def step() -> None:
        pooled_ND, _ = PooledBlocks(encoder, wanted, config.heads.pool)(views)
        _, prediction_HNO = heads(*heads.stacked([pooled_ND[wanted.index(block)] for block in blocks]))
        prediction_HNO.sum().backward()
        if stage == "encoder" and config.loss.dense != "none":
            with torch.no_grad():
                read_patches(encoder, views[0], max(blocks))

    with sdpa_kernel(SDPBackend.MATH):
        return count_flops(step)
