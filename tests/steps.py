"""A refinement step in float64 on an encoder of four blocks, and batches for it."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mimref.config.run import ViewsConfig
from mimref.data.loader import ViewBatch
from mimref.data.views import Photometric
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.refinement.alignment import Queue
from mimref.refinement.config import HeadsConfig, LossConfig
from mimref.refinement.dense import DenseTerm
from mimref.refinement.heads import Heads
from mimref.refinement.method import Method
from mimref.refinement.norms import Norm

CPU = torch.device("cpu")
ARCHITECTURE = Architecture("custom", image_size=8, width=32, depth=4, num_heads=2, patch_size=4)
CONFIG = HeadsConfig(projector_hidden=12, predictor_hidden=10, output=6)
BLOCKS = [4, 2, 3]
TEMPERATURE = [0.1, 0.2, 0.5]
QUEUE, IMAGES, SEED = 16, 5, 3
DENSE_WEIGHT = 30.0


class DoublePhotometric(Photometric):
    """Makes views in float64."""

    def __call__(self, crops: Tensor, epoch: int, sample_B: Tensor, views: Sequence[int]) -> Tensor:
        return super().__call__(crops, epoch, sample_B, views).double()


def make_step(
    blocks: list[int] = BLOCKS,
    *,
    pool: str = "cls",
    direction: str = "projection",
    swap_negatives: bool = False,
    norm: Norm = "batch",
    post_norm: bool = False,
    dense: Any = "none",
    encoder: Any = None,
) -> Method:
    """Return a step; the same arguments give an identical one."""
    torch.manual_seed(0)
    architecture = Architecture(**{**ARCHITECTURE.to_dict(), "post_norm": post_norm})
    encoder = encoder or build_encoder(architecture)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:  # moves norms and biases away from one and zero
                parameter.add_(0.2 * torch.randn(parameter.shape))
    heads = Heads(CONFIG.model_copy(update={"norm": norm}), [32] * len(blocks)).double()
    queue = Queue(len(blocks), QUEUE, CONFIG.output, generator=torch.Generator().manual_seed(1), device=CPU)
    queue.rows_HQO = F.normalize(queue.rows_HQO.double(), dim=2)
    step = Method(
        encoder.double().eval(),
        heads,
        queue,
        DoublePhotometric(ViewsConfig(), SEED, CPU),
        blocks=blocks,
        temperature=TEMPERATURE[: len(blocks)],
        pool=pool,
        loss=LossConfig(direction=direction, swap_negatives=swap_negatives, dense=dense, dense_weight=DENSE_WEIGHT),
        precision=torch.float32,  # no autocast
    )
    if dense != "none":
        step.dense = DenseTerm(other_weights(step.encoder), max(blocks), dense)
    return step


def other_weights(encoder: Encoder) -> Encoder:
    """Return a copy with slightly different weights, as those of the base differ from a refined encoder's."""
    copy, generator = deepcopy(encoder), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return copy.requires_grad_(False)


def make_batch(samples: Sequence[int] = range(IMAGES), *, local_views: int = 2, epoch: int = 0) -> ViewBatch:
    """Return random crops that depend on sample and epoch, whatever batch they are in."""

    def crops(count: int, size: int, salt: int) -> Tensor:
        parts = [
            torch.randint(
                0,
                256,
                (count, 3, size, size),
                dtype=torch.uint8,
                generator=torch.Generator().manual_seed(1000 * salt + sample),
            )
            for sample in samples
        ]
        return torch.stack(parts)

    groups = [crops(2, 8, 1 + epoch)] + ([crops(local_views, 4, 11 + epoch)] if local_views else [])
    return ViewBatch(epoch, torch.tensor(list(samples)), groups, [])


def weights(heads: int) -> Tensor:
    """Return a weight for every head, (H,), each different."""
    return torch.tensor([1.0, 0.4, 2.0], dtype=torch.float64)[:heads]
