"""The method on one batch: views, encoder, heads, neighbours, loss, gradients.

Shapes: B images (b of a micro-batch), V views (0 and 1 global), G = 2 global views, H heads,
D width of a block, O output width, N = V * B rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimref.data.loader import ViewBatch
from mimref.data.views import Photometric
from mimref.devices import autocast, send
from mimref.distributed.collectives import gather_rows, gather_rows_with_gradient, gather_samples, sum_over_ranks
from mimref.distributed.group import own_rank, world_size
from mimref.distributed.sharding import Sharded, like
from mimref.draws import Operation, uniform
from mimref.encoders.backbones import TokenEncoder
from mimref.refinement.alignment import Alignment, Neighbours, Queue, nna_loss
from mimref.refinement.config import LossConfig
from mimref.refinement.dense import DenseTerm, patches_of
from mimref.refinement.heads import Heads
from mimref.refinement.norms import DEPTH, settled, update_statistics


class StepValues(NamedTuple):
    """Values of a step, on the device; reading them costs a sync."""

    loss: Tensor
    """Weighted sum over heads, and the weighted dense term."""
    alignment: Alignment
    neighbours: Neighbours
    """Of both global views, (H, 2 * B) queries, view 0 first."""
    sample_B: Tensor
    """Sample indices on the device."""
    share: float
    """This rank's share of the batch's images; 1 in a single process."""
    dense: Tensor | None = None
    """The dense term without its weight, scaled as `loss`: the mean over ranks is the mean over the batch."""


class PooledBlocks(nn.Module):
    """Pooled tokens of some blocks, as one module whose gradients ranks can average."""

    def __init__(self, encoder: TokenEncoder, wanted: Sequence[int], pool: str) -> None:
        super().__init__()
        self.encoder, self.wanted, self.pool = encoder, wanted, pool

    def forward(self, images: list[Tensor], *, dense: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """Images of several sizes, (N_i, 3, S_i, S_i) each -> (sum of N_i, D) of every block, with its own width D.

        dense: also the patch tokens of the last of the blocks, of images of the first size: (N_0, P, D).
        """
        parts, patches_NPD = [], None
        for sized in images:
            # The head at the last block reads the normed output, as users of the encoder do.
            tokens = self.encoder.blocks(sized, self.wanted, final_norm=self.encoder.architecture.has_final_norm)
            parts.append([self.encoder.pool(block, self.pool) for block in tokens])
            if dense and sized is images[0]:
                patches_NPD = patches_of(self.encoder, tokens[-1])
        return [torch.cat(of_block) for of_block in zip(*parts, strict=True)], patches_NPD


class Method:
    """Nearest Neighbor Alignment of one batch: features, heads, neighbours, loss, gradients. Both stages use it."""

    def __init__(
        self,
        encoder: TokenEncoder,
        heads: Heads,
        queue: Queue,
        photometric: Photometric,
        *,
        blocks: Sequence[int],
        temperature: Sequence[float],
        pool: str,
        loss: LossConfig,
        precision: torch.dtype,
        micro_batch: int | None = None,
        most_images: int = 0,
    ) -> None:
        """blocks, temperature: of every head, blocks 1-based. micro_batch: images per encoder pass; None encodes a
        batch at once. most_images: the most images of a batch that a rank can have; needed in a process group."""
        self.encoder, self.heads, self.queue, self.photometric = encoder, heads, queue, photometric
        self.device, self.precision, self.loss = photometric.device, precision, loss
        self.micro_batch, self.most_images = micro_batch, most_images
        self.wanted = sorted(set(blocks))
        self.block_of_head = [self.wanted.index(block) for block in blocks]
        self.temperature_H = torch.tensor(temperature, device=self.device)
        self.pooled_blocks = PooledBlocks(encoder, self.wanted, pool)
        # Those whose gradients ranks average, see `averaged` and `shard`.
        self.trained_encoder: nn.Module = self.pooled_blocks
        self.trained_heads: nn.Module = heads
        self.sharded_encoder: Sharded | None = None
        self.sharded_heads: Sharded | None = None
        self.dense: DenseTerm | None = None
        """Stage 2's optional term."""
        self.compiled = False
        """Whether encoder blocks and heads are compiled."""
        self.settled = settled(heads)
        """Whether the heads' norms have statistics to begin with."""

    def shard(self) -> None:
        """Divide encoder and heads among the ranks, with their gradients: heads layer by layer along H.

        The queue stays whole on every rank: to look up a part of it would take an exchange of all queries.
        """
        self.sharded_encoder = Sharded(self.encoder, self.encoder.block_modules, self.device, method="blocks")
        layers = [*self.heads.projector, *self.heads.predictor]
        self.sharded_heads = Sharded(self.heads, layers, self.device)

    def plain_encoder(self) -> TokenEncoder:
        """The encoder for passes of which ranks may run different numbers. Call it on all ranks."""
        if self.sharded_encoder is None:
            return self.encoder
        weights = self.sharded_encoder.weights
        return cast(TokenEncoder, self.sharded_encoder.plain(weights, self.device, precision=self.precision))

    def plain_heads(self) -> Heads:
        """The same of the heads."""
        if self.sharded_heads is None:
            return self.heads
        return cast(Heads, self.sharded_heads.plain(self.sharded_heads.weights, self.device))

    def forward_backward(self, batch: ViewBatch, weight_H: Tensor, *, top_k: int, train_encoder: bool) -> StepValues:
        """Loss of one batch; its gradients are added to the weights' own, and the queue takes in view 0.

        With `micro_batch` the encoder runs twice on parts of the batch: without gradient, so that heads and loss see
        the whole batch, and again to backpropagate the gradients of its features (GradCache, Gao et al. 2021). Memory
        then follows the micro-batch, and the gradients are those of one pass. The dense term, a sum over images, is
        computed in the second pass alone, part by part. Ranks exchange the gradients of all parts once, with the last
        one; of sharded weights, those of every part, since their sum would take the memory of a whole encoder.
        """
        if not self.settled:
            self._settle(batch)
        # Ranks may have different numbers of images, but all must take the same branch.
        one_pass = self.micro_batch is None or self.micro_batch >= (self.most_images or len(batch.sample_B))
        if one_pass or not train_encoder:
            values = self.forward(batch, weight_H, top_k=top_k, train_encoder=train_encoder)
            values.loss.backward()
            update_statistics(self.heads)
            return values
        dense = []
        with torch.no_grad():
            features_VBD = [x_VBD.requires_grad_() for x_VBD in self._encode_in_parts(batch)]
        values = self._align(self._of_heads(features_VBD), batch, weight_H, top_k)
        values.loss.backward()
        update_statistics(self.heads)
        gradients_VBD = [x_VBD.grad for x_VBD in features_VBD if x_VBD.grad is not None]
        images = len(batch.sample_B)
        for rows, part in self._parts(batch):
            encoder, last = self.trained_encoder, rows.stop == images
            with encoder.no_sync() if isinstance(encoder, DistributedDataParallel) and not last else nullcontext():
                outputs, distance_N = self._encode(part, encoder, self.dense)
                gradients = [x_VBD[:, rows] for x_VBD in gradients_VBD]
                if distance_N is not None:
                    dense.append(self._share_of_mean(distance_N, values, images))
                    outputs.append(self.loss.dense_weight * dense[-1])
                    gradients.append(torch.ones_like(outputs[-1]))
                torch.autograd.backward(outputs, gradients)
        return self._with_dense(values, torch.stack(dense).sum()) if dense else values

    def load_heads(self, state: dict[str, Any]) -> None:
        """Load saved heads of the same shapes."""
        self.heads.load_state_dict(like(state, self.heads.state_dict()))
        self.settled = settled(self.heads)

    def _settle(self, batch: ViewBatch) -> None:
        """Find the statistics that running norms start from: a pass per layer, as each needs those before it."""
        features_HND = self.features(batch, train_encoder=False)
        for _ in range(DEPTH):
            # With gradients, though nothing needs them: torch.compile would compile another version without.
            with autocast(self.device, self.precision):
                self.heads(*features_HND)
            update_statistics(self.heads)
        self.settled = True

    def forward(self, batch: ViewBatch, weight_H: Tensor, *, top_k: int, train_encoder: bool) -> StepValues:
        """Loss of one batch in one pass; the queue takes in view 0. Call `loss.backward()` on the result."""
        features_HND, distance_N = self._features(batch, train_encoder=train_encoder)
        values = self._align(features_HND, batch, weight_H, top_k)
        if distance_N is None:
            return values
        return self._with_dense(values, self._share_of_mean(distance_N, values, len(batch.sample_B)))

    def features(self, batch: ViewBatch, *, train_encoder: bool) -> list[Tensor]:
        """What the heads take, pooled tokens (H, N, D) of every distinct width, rows view by view."""
        return self._features(batch, train_encoder=train_encoder)[0]

    def _features(self, batch: ViewBatch, *, train_encoder: bool) -> tuple[list[Tensor], Tensor | None]:
        """The same, and where the encoder trains, the global views' distances of the dense term."""
        if train_encoder:
            features_VBD, distance_N = self._encode(batch, self.trained_encoder, self.dense)
            return self._of_heads(features_VBD), distance_N
        # FSDP keeps what it gathers for passes with gradients.
        with torch.no_grad() if self.sharded_encoder is not None else torch.inference_mode():
            features_VBD = self._encode_in_parts(batch)
        # Stacked outside of inference mode: autograd cannot use inference tensors.
        return self._of_heads(features_VBD), None

    def _share_of_mean(self, distance_N: Tensor, values: StepValues, images: int) -> Tensor:
        """What distances of this rank add to their mean over the batch, times the number of ranks, as in the loss.

        distance_N: of both global views of some or all of the rank's `images`.
        """
        return distance_N.sum() * (values.share * world_size() / max(1, 2 * images))

    def _with_dense(self, values: StepValues, dense: Tensor) -> StepValues:
        return values._replace(loss=values.loss + self.loss.dense_weight * dense, dense=dense)

    def _align(self, features_HND: list[Tensor], batch: ViewBatch, weight_H: Tensor, top_k: int) -> StepValues:
        """Heads, neighbours and loss of a whole batch."""
        with autocast(self.device, self.precision):
            projection_HNO, prediction_HNO = self.trained_heads(*features_HND)
        images = len(batch.sample_B)
        samples = gather_samples(batch.sample_B, self.most_images)
        sample_B = send(batch.sample_B, self.device)
        global_HMO = projection_HNO[:, : 2 * images]
        choice_HM = self._choices(batch.epoch, sample_B)
        neighbours = self.queue.swap_neighbours(global_HMO, sample_B.repeat(2), choice_HM, top_k=top_k)
        views = sum(crops.shape[1] for crops in batch.crops)
        prediction_HVBO = prediction_HNO.unflatten(1, (views, images))
        global_HGBO, neighbour_HGBO = (x_HMO.unflatten(1, (2, images)) for x_HMO in (global_HMO, neighbours.rows_HMO))
        # Loss and queue need what other ranks have.
        counts = [len(part) for part in samples]
        every_HGBO = gather_rows(global_HGBO, counts, dim=2)
        if self.loss.direction == "prediction":
            anchor_HVBO = gather_rows_with_gradient(prediction_HVBO, counts, dim=2)
            negative_HGBO = neighbour_HGBO if self.loss.swap_negatives else global_HGBO
        else:
            anchor_HVBO = prediction_HVBO
            negative_HGBO = gather_rows(neighbour_HGBO, counts, dim=2) if self.loss.swap_negatives else every_HGBO
        alignment = nna_loss(
            prediction_HVBO,
            negative_HGBO,
            neighbour_HGBO,
            self.temperature_H,
            direction=self.loss.direction,
            first=sum(counts[: own_rank()]),
            all_prediction_HVBO=anchor_HVBO,
        )
        # Enqueued after the lookup, so that no sample finds itself in this step.
        every_B = sample_B if len(samples) == 1 else send(torch.cat(samples), self.device)
        self.queue.enqueue(every_HGBO[:, 0], every_B)
        # Ranks' gradients are averaged: each counts by its share of the batch.
        share = images / sum(counts)
        # A rank without an image has no mean, but takes part in the others' backward pass.
        loss_H = alignment.loss_H if images else anchor_HVBO.sum(dim=(1, 2, 3))
        loss = (weight_H * loss_H).sum() * (share * len(counts))
        return StepValues(loss, alignment, neighbours, sample_B, share)

    def _encode(
        self, batch: ViewBatch, pooled_blocks: nn.Module, dense: DenseTerm | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Pooled tokens of the blocks that heads read, (V, B, D) each, by one encoder pass per crop size.

        dense: also the distance of both global views of each image to the base, (2 * B,).
        """
        if not len(batch.sample_B):
            # Not all kernels and models take no image: a black one is encoded, and its features are left out.
            black = [crops.new_zeros(1, *crops.shape[1:]) for crops in batch.crops]
            one = ViewBatch(batch.epoch, batch.sample_B.new_zeros(1), black, [])
            pooled_VBD, distance_N = self._encode(one, pooled_blocks, dense)
            return [x_VBD[:, :0] for x_VBD in pooled_VBD], None if distance_N is None else distance_N[:0]
        views = views_of(batch, self.photometric)
        images = [sized_vB3SS.flatten(0, 1) for sized_vB3SS in views]
        # Before the encoder's own pass, whose activations are kept; in a block of its own, since autocast keeps casts
        # of weights until its end, and before torch 2.10 those made without gradient too.
        with autocast(self.device, self.precision):
            base_NPD = None if dense is None else dense.base_patches(images[0])
        with autocast(self.device, self.precision):
            pooled_ND, student_NPD = pooled_blocks(images, dense=dense is not None)
        shape = (sum(map(len, views)), len(batch.sample_B))
        pooled_VBD = [x_ND.unflatten(0, shape) for x_ND in pooled_ND]
        if dense is None or base_NPD is None:
            return pooled_VBD, None
        return pooled_VBD, dense.distance(student_NPD, base_NPD)

    def _encode_in_parts(self, batch: ViewBatch) -> list[Tensor]:
        """The first of these, micro-batch by micro-batch. Call it without gradient."""
        parts = [self._encode(part, self.pooled_blocks)[0] for _, part in self._parts(batch)]
        return parts[0] if len(parts) == 1 else [torch.cat(of_block, dim=1) for of_block in zip(*parts, strict=True)]

    def _parts(self, batch: ViewBatch) -> Iterator[tuple[slice, ViewBatch]]:
        """Micro-batches of a batch, and which of its images they hold. The last ones may be smaller, or empty."""
        images = len(batch.sample_B)
        size = self.micro_batch or max(images, 1)
        # A rank whose images are all unreadable still takes part in the collectives. Every pass of sharded weights has
        # some, so all ranks have as many micro-batches.
        most = max(images, 1)
        if self.sharded_encoder is not None and self.micro_batch is not None:
            most = max(most, self.most_images)
        for start in range(0, most, size):
            rows = slice(min(start, images), min(start + size, images))
            yield rows, ViewBatch(batch.epoch, batch.sample_B[rows], [crops[rows] for crops in batch.crops], [])

    def _of_heads(self, features_VBD: list[Tensor]) -> list[Tensor]:
        """What the heads take, (H, N, D) of every distinct width."""
        stacked = self.heads.stacked([features_VBD[index] for index in self.block_of_head])
        return [x_HVBD.flatten(1, 2) for x_HVBD in stacked]

    def _choices(self, epoch: int, sample_B: Tensor) -> Tensor:
        """Uniform numbers (H, 2 * B) that pick one of the top-k neighbours."""
        seed, heads = self.photometric.seed, self.heads.num_heads
        view_M = torch.arange(2, device=self.device).repeat_interleave(len(sample_B))
        return uniform(seed, epoch, Operation.NEIGHBOUR, sample_B.repeat(2), view_M, count=heads).T


def compile_blocks(encoder: TokenEncoder) -> None:
    """Compile every block in place, so that weights keep their names.

    One piece of code serves all blocks; with dynamic shapes, both sizes of views as well.
    """
    for block in encoder.block_modules:
        block.compile(dynamic=True)


def views_of(batch: ViewBatch, photometric: Photometric) -> list[Tensor]:
    """All views of a batch, normalised: one tensor (v, B, 3, S, S) per crop size, with v views of size S."""
    found, first = [], 0
    for crops in batch.crops:
        views = range(first, first + crops.shape[1])
        first = views.stop
        found.append(photometric(crops, batch.epoch, batch.sample_B, views))
    return found


def monitored_values(values: StepValues, labels: Tensor | None) -> dict[str, object]:
    """A step's numbers for the log, one list entry per head. Sync point, for ranks too: only on logging steps.

    labels: (number of images,) on the device, only for the NN accuracy, which counts rows that hold a sample.
    """
    alignment, neighbours = values.alignment, values.neighbours
    by_head = {
        "head_loss": alignment.loss_H.detach(),
        "alignment_global": alignment.global_H,
        "alignment_local": alignment.local_H,
        "nn_similarity": neighbours.similarity_HM.mean(dim=1),
        "nn_age": neighbours.age_HM.float().mean(dim=1),
    }
    if labels is not None:
        by_head["nn_accuracy"] = neighbour_accuracy(neighbours, values.sample_B, labels)
    terms = torch.stack([term.detach() for term in (values.loss, values.dense) if term is not None])
    if world_size() > 1:
        terms, by_head = _over_ranks(terms, by_head, values.share)
    if torch.isnan(by_head["alignment_local"]).any():
        del by_head["alignment_local"]  # there are no local views
    named = dict(zip(("loss", "dense_loss"), terms.tolist(), strict=False))
    return named | {name: value.tolist() for name, value in by_head.items()}


def _over_ranks(terms: Tensor, by_head: dict[str, Tensor], share: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Terms of the loss and means of the whole batch from those of every rank's part of it."""
    means = torch.stack([value.double() for value in by_head.values()])
    values = torch.cat([terms.double() / world_size(), (means * share).flatten()])
    # The means of no images are NaN.
    values = sum_over_ranks(values if share else torch.zeros_like(values))
    return values[: len(terms)], dict(zip(by_head, values[len(terms) :].view_as(means), strict=True))


def neighbour_accuracy(neighbours: Neighbours, sample_B: Tensor, labels: Tensor) -> Tensor:
    """Percent of neighbours with their query's class, (H,); random rows from the queue's start count as wrong."""
    same_HM = labels[neighbours.sample_HM.clamp_min(0)] == labels[sample_B].repeat(2)
    return 100 * (same_HM & (neighbours.sample_HM >= 0)).float().mean(dim=1)
