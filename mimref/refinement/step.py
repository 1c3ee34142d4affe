"""One refinement step: views, encoder, heads, neighbours, loss, update.

Shapes: B images (b of a micro-batch), V views (0 and 1 global), G = 2 global views, W blocks that heads read, H heads,
D encoder width, O output width, N = V * B rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mimref.data.loader import ViewBatch
from mimref.data.photometric import Photometric
from mimref.devices import autocast
from mimref.draws import Operation, uniform
from mimref.encoders.vit import Encoder
from mimref.refinement.heads import Heads
from mimref.refinement.loss import Alignment, nna_loss
from mimref.refinement.queue import Neighbours, Queue


class StepValues(NamedTuple):
    """What a step computed, on the device; reading it costs a sync."""

    loss: Tensor
    """Weighted sum over heads."""
    alignment: Alignment
    neighbours: Neighbours
    """Of both global views, (H, 2 * B) queries, view 0 first."""
    sample_B: Tensor
    """Sample indices on the device."""


class RefinementStep:
    """The objects a step needs, and the forward pass that both stages share."""

    def __init__(
        self,
        encoder: Encoder,
        heads: Heads,
        queue: Queue,
        photometric: Photometric,
        *,
        blocks: list[int],
        temperature: list[float],
        pool: str,
        direction: str,
        swap_negatives: bool,
        seed: int,
        precision: torch.dtype,
        micro_batch: int | None = None,
    ) -> None:
        self.encoder, self.heads, self.queue, self.photometric = encoder, heads, queue, photometric
        self.device = photometric.device
        self.wanted = sorted(set(blocks))
        self.block_of_head = [self.wanted.index(block) for block in blocks]
        self.temperature_H = torch.tensor(temperature, device=self.device)
        self.pool, self.direction, self.swap_negatives = pool, direction, swap_negatives
        self.seed, self.precision = seed, precision
        self.micro_batch = micro_batch
        """Images per encoder pass; None encodes a batch at once."""

    def forward_backward(self, batch: ViewBatch, weight_H: Tensor, *, top_k: int, train_encoder: bool) -> StepValues:
        """Loss of one batch and its gradients, added to those that are there; the queue then takes up view 0.

        With `micro_batch` the encoder runs twice on parts of the batch: without gradient, so that heads and loss see
        the whole batch, and again to push the gradients of its features through (GradCache, Gao et al. 2021). Memory
        then follows the micro-batch, and the gradients are those of one pass.
        """
        if self.micro_batch is None or self.micro_batch >= len(batch.sample_B) or not train_encoder:
            values = self.forward(batch, weight_H, top_k=top_k, train_encoder=train_encoder)
            values.loss.backward()
            return values
        with torch.no_grad():
            features_WVBD = self._encode_in_parts(batch)
        features_WVBD.requires_grad_()
        values = self._align(self._of_heads(features_WVBD), batch, weight_H, top_k)
        values.loss.backward()
        assert features_WVBD.grad is not None
        gradient_WVBD = features_WVBD.grad
        for rows, part in self._parts(batch):
            torch.autograd.backward(self._encode(part), gradient_WVBD[:, :, rows])
        return values

    def forward(self, batch: ViewBatch, weight_H: Tensor, *, top_k: int, train_encoder: bool) -> StepValues:
        """Loss of one batch in one pass; the queue then takes up view 0. Call `loss.backward()` on the result."""
        return self._align(self.features(batch, train_encoder=train_encoder), batch, weight_H, top_k)

    def features(self, batch: ViewBatch, *, train_encoder: bool) -> Tensor:
        """Pooled tokens that each head reads, (H, N, D), rows view by view."""
        if train_encoder:
            return self._of_heads(self._encode(batch))
        with torch.inference_mode():
            features_WVBD = self._encode_in_parts(batch)
        # Stacked outside of inference mode, whose tensors no gradient could be computed with.
        return self._of_heads(features_WVBD)

    def _align(self, features_HND: Tensor, batch: ViewBatch, weight_H: Tensor, top_k: int) -> StepValues:
        """Heads, neighbours and loss of a whole batch."""
        with autocast(self.device, self.precision):
            projection_HNO, prediction_HNO = self.heads(features_HND)
        images = len(batch.sample_B)
        sample_B = batch.sample_B.to(self.device, non_blocking=True)
        global_HMO = projection_HNO[:, : 2 * images]
        neighbours = self.queue.swap_neighbours(
            global_HMO, sample_B.repeat(2), self._choices(batch, sample_B), top_k=top_k
        )
        alignment = nna_loss(
            prediction_HNO.unflatten(1, (-1, images)),
            global_HMO.unflatten(1, (2, images)),
            neighbours.rows_HMO.unflatten(1, (2, images)),
            self.temperature_H,
            direction=self.direction,
            swap_negatives=self.swap_negatives,
        )
        # Enqueued after the lookup, so that no sample finds itself in this step.
        self.queue.enqueue(global_HMO[:, :images], sample_B)
        return StepValues((weight_H * alignment.loss_H).sum(), alignment, neighbours, sample_B)

    def _encode(self, batch: ViewBatch) -> Tensor:
        """Pooled tokens of the blocks that heads read, (W, V, B, D); one encoder pass per crop size."""
        first_view = 0
        parts = []
        for crops in batch.crops:
            views = range(first_view, first_view + crops.shape[1])
            first_view = views.stop
            images = self.photometric(crops, batch.epoch, batch.sample_B, views).flatten(0, 1)
            with autocast(self.device, self.precision):
                # The head at the last block reads the normed output, which is what users' models return.
                tokens = self.encoder.blocks(images, self.wanted, final_norm=True)
            parts.append(torch.stack([self.encoder.pool(block, self.pool) for block in tokens]))
        pooled_WVBD: Tensor = torch.cat(parts, dim=1).unflatten(1, (-1, len(batch.sample_B)))
        return pooled_WVBD

    def _encode_in_parts(self, batch: ViewBatch) -> Tensor:
        """The same, micro-batch by micro-batch; without gradient."""
        found: Tensor | None = None
        for rows, part in self._parts(batch):
            features_WVbD = self._encode(part)
            if rows == slice(0, len(batch.sample_B)):
                return features_WVbD
            if found is None:
                blocks, views, _, width = features_WVbD.shape
                found = features_WVbD.new_empty(blocks, views, len(batch.sample_B), width)
            found[:, :, rows] = features_WVbD
        assert found is not None
        return found

    def _parts(self, batch: ViewBatch) -> Iterator[tuple[slice, ViewBatch]]:
        """Micro-batches of a batch, the last one maybe smaller, and which of its images they hold."""
        images = len(batch.sample_B)
        size = self.micro_batch or images
        for start in range(0, images, size):
            rows = slice(start, min(start + size, images))
            yield rows, ViewBatch(batch.epoch, batch.sample_B[rows], [crops[rows] for crops in batch.crops], [])

    def _of_heads(self, features_WVBD: Tensor) -> Tensor:
        """What each head reads, (H, N, D)."""
        return torch.stack([features_WVBD[index] for index in self.block_of_head]).flatten(1, 2)

    def _choices(self, batch: ViewBatch, sample_B: Tensor) -> Tensor:
        """Uniform numbers (H, 2 * B) that pick one of the top-k neighbours."""
        view_M = torch.arange(2, device=self.device).repeat_interleave(len(sample_B))
        choices_MH = uniform(
            self.seed, batch.epoch, Operation.NEIGHBOUR, sample_B.repeat(2), view_M, count=self.heads.num_heads
        )
        return choices_MH.T


def monitored_values(values: StepValues, labels: Tensor | None) -> dict[str, object]:
    """A step's numbers for the log, one list entry per head. Sync point: only on logging steps.

    labels: (number of images,) on the device, only for the NN accuracy, which counts rows that hold a sample.
    """
    alignment, neighbours = values.alignment, values.neighbours
    logged: dict[str, object] = {
        "loss": float(values.loss.detach()),
        "head_loss": alignment.loss_H.detach().tolist(),
        "alignment_global": alignment.global_H.tolist(),
        "nn_similarity": neighbours.similarity_HM.mean(dim=1).tolist(),
        "nn_age": neighbours.age_HM.double().mean(dim=1).tolist(),
    }
    if not torch.isnan(alignment.local_H).any():
        logged["alignment_local"] = alignment.local_H.tolist()
    if labels is not None:
        logged["nn_accuracy"] = neighbour_accuracy(neighbours, values.sample_B, labels).tolist()
    return logged


def neighbour_accuracy(neighbours: Neighbours, sample_B: Tensor, labels: Tensor) -> Tensor:
    """Percent of neighbours with their query's class, (H,); random rows from the queue's start count as wrong."""
    same_HM = labels[neighbours.sample_HM.clamp_min(0)] == labels[sample_B].repeat(2)
    return 100 * (same_HM & (neighbours.sample_HM >= 0)).double().mean(dim=1)
