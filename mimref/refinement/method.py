"""The method applied to one batch: views, encoder, heads, neighbours, loss, gradients.

Shapes: B images (b in a micro-batch), V views (0 and 1 global), G = 2 global views, H heads,
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
    """Weighted sum over heads, plus the weighted dense term."""
    alignment: Alignment
    neighbours: Neighbours
    """Neighbours of both global views: (H, 2 * B) queries, view 0 first."""
    sample_B: Tensor
    """Sample indices on the device."""
    share: float
    """This rank's share of the batch's images; 1 in a single process."""
    dense: Tensor | None = None
    """The unweighted dense term, scaled like `loss`: its mean over ranks is the mean over the batch."""


class PooledBlocks(nn.Module):
    """Pooled tokens of some blocks, as a single module so that ranks can average its gradients."""

    def __init__(self, encoder: TokenEncoder, wanted: Sequence[int], pool: str) -> None:
        super().__init__()
        self.encoder, self.wanted, self.pool = encoder, wanted, pool

    def forward(self, images: list[Tensor], *, dense: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """Encode images of several sizes, (N_i, 3, S_i, S_i) each -> (sum of N_i, D) per block, with its own width D.

        dense: also return the patch tokens (N_0, P, D) of the last of the blocks, for images of the first size.
        """
        parts, patches_NPD = [], None
        for sized in images:
            # A head at the last block reads the output after the final norm, as users of the encoder do.
            tokens = self.encoder.blocks(sized, self.wanted, final_norm=self.encoder.architecture.has_final_norm)
            parts.append([self.encoder.pool(block, self.pool) for block in tokens])
            if dense and sized is images[0]:
                patches_NPD = patches_of(self.encoder, tokens[-1])
        return [torch.cat(of_block) for of_block in zip(*parts, strict=True)], patches_NPD


class Method:
    """Nearest Neighbor Alignment on one batch: features, heads, neighbours, loss, gradients. Both stages use it."""

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
        """blocks, temperature: one per head; blocks are 1-based. micro_batch: images per encoder pass; None encodes a
        batch at once. most_images: the most images of a batch that a rank can have; needed in a process group."""
        self.encoder, self.heads, self.queue, self.photometric = encoder, heads, queue, photometric
        self.device, self.precision, self.loss = photometric.device, precision, loss
        self.micro_batch, self.most_images = micro_batch, most_images
        self.wanted = sorted(set(blocks))
        self.block_of_head = [self.wanted.index(block) for block in blocks]
        self.temperature_H = torch.tensor(temperature, device=self.device)
        self.pooled_blocks = PooledBlocks(encoder, self.wanted, pool)
        # The modules whose gradients are averaged over ranks, see `averaged` and `shard`.
        self.trained_encoder: nn.Module = self.pooled_blocks
        self.trained_heads: nn.Module = heads
        self.sharded_encoder: Sharded | None = None
        self.sharded_heads: Sharded | None = None
        self.dense: DenseTerm | None = None
        """The optional dense term of stage 2."""
        self.compiled = False
        """Whether encoder blocks and heads are compiled."""
        self.settled = settled(heads)
        """Whether the heads' running norms have initial statistics."""

    def shard(self) -> None:
        """Divide encoder and heads, with their gradients, among the ranks; each layer of the heads is split along H.

        Every rank keeps the whole queue: with a divided one, ranks would have to exchange all queries.
        """
        self.sharded_encoder = Sharded(self.encoder, self.encoder.block_modules, self.device, method="blocks")
        layers = [*self.heads.projector, *self.heads.predictor]
        self.sharded_heads = Sharded(self.heads, layers, self.device)

    def plain_encoder(self) -> TokenEncoder:
        """Return an encoder for passes whose number may differ between ranks. Call this on all ranks."""
        if self.sharded_encoder is None:
            return self.encoder
        weights = self.sharded_encoder.weights
        return cast(TokenEncoder, self.sharded_encoder.plain(weights, self.device, precision=self.precision))

    def plain_heads(self) -> Heads:
        """Return the heads, likewise; call this on all ranks."""
        if self.sharded_heads is None:
            return self.heads
        return cast(Heads, self.sharded_heads.plain(self.sharded_heads.weights, self.device))

    def forward_backward(self, batch: ViewBatch, weight_H: Tensor, *, top_k: int, train_encoder: bool) -> StepValues:
        """Compute the loss of one batch, add its gradients to the weights' gradients, and enqueue view 0.

        With `micro_batch` the encoder runs twice on parts of the batch: first without gradient, so that heads and loss
        see the whole batch, then again to backpropagate the gradients of its features (GradCache, Gao et al. 2021).
        Memory then depends on the micro-batch, and the gradients equal those of a single pass. The dense term, a sum
        over images, is computed in the second pass only, part by part. Ranks exchange gradients once, after the last
        part. With sharded weights they do so after every part: the sum would take the memory of a whole encoder.
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
        """Compute the initial statistics of running norms: one pass per layer, as each depends on those before it."""
        features_HND = self.features(batch, train_encoder=False)
        for _ in range(DEPTH):
            # With gradients, although nothing needs them: without, torch.compile would compile a second version.
            with autocast(self.device, self.precision):
                self.heads(*features_HND)
            update_statistics(self.heads)
        self.settled = True

    def forward(self, batch: ViewBatch, weight_H: Tensor, *, top_k: int, train_encoder: bool) -> StepValues:
        """Compute the loss of one batch in one pass, and enqueue view 0. Call `loss.backward()` on the result."""
        features_HND, distance_N = self._features(batch, train_encoder=train_encoder)
        values = self._align(features_HND, batch, weight_H, top_k)
        if distance_N is None:
            return values
        return self._with_dense(values, self._share_of_mean(distance_N, values, len(batch.sample_B)))

    def features(self, batch: ViewBatch, *, train_encoder: bool) -> list[Tensor]:
        """Return the heads' inputs: pooled tokens (H, N, D) per distinct width D, with rows view by view."""
        return self._features(batch, train_encoder=train_encoder)[0]

    def _features(self, batch: ViewBatch, *, train_encoder: bool) -> tuple[list[Tensor], Tensor | None]:
        """Return the heads' inputs and, if the encoder trains with a dense term, the global views' distances."""
        if train_encoder:
            features_VBD, distance_N = self._encode(batch, self.trained_encoder, self.dense)
            return self._of_heads(features_VBD), distance_N
        # FSDP keeps gathered weights for later passes with gradients.
        with torch.no_grad() if self.sharded_encoder is not None else torch.inference_mode():
            features_VBD = self._encode_in_parts(batch)
        # Stacked outside of inference mode: autograd cannot use inference tensors.
        return self._of_heads(features_VBD), None

    def _share_of_mean(self, distance_N: Tensor, values: StepValues, images: int) -> Tensor:
        """Return this rank's contribution to the batch's mean distance, times the number of ranks, as in the loss.

        distance_N: distances of both global views, for some or all of the rank's `images`.
        """
        return distance_N.sum() * (values.share * world_size() / max(1, 2 * images))

    def _with_dense(self, values: StepValues, dense: Tensor) -> StepValues:
        return values._replace(loss=values.loss + self.loss.dense_weight * dense, dense=dense)

    def _align(self, features_HND: list[Tensor], batch: ViewBatch, weight_H: Tensor, top_k: int) -> StepValues:
        """Compute heads, neighbours and loss of a whole batch."""
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
        # Loss and queue need the rows of all ranks.
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
        # Enqueue after the lookup, so that no sample finds its own row of this step.
        every_B = sample_B if len(samples) == 1 else send(torch.cat(samples), self.device)
        self.queue.enqueue(every_HGBO[:, 0], every_B)
        # Gradients are averaged over ranks: weight each rank by its share of the batch.
        share = images / sum(counts)
        # A rank without images has no mean, but must take part in the backward pass of the others.
        loss_H = alignment.loss_H if images else anchor_HVBO.sum(dim=(1, 2, 3))
        loss = (weight_H * loss_H).sum() * (share * len(counts))
        return StepValues(loss, alignment, neighbours, sample_B, share)

    def _encode(
        self, batch: ViewBatch, pooled_blocks: nn.Module, dense: DenseTerm | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return pooled tokens of the blocks that heads read, (V, B, D) each, from one encoder pass per crop size.

        dense: also return the distance of both global views of each image to the base, (2 * B,).
        """
        if not len(batch.sample_B):
            # Not all kernels and models accept an empty batch: encode a black image and drop its features.
            black = [crops.new_zeros(1, *crops.shape[1:]) for crops in batch.crops]
            one = ViewBatch(batch.epoch, batch.sample_B.new_zeros(1), black, [])
            pooled_VBD, distance_N = self._encode(one, pooled_blocks, dense)
            return [x_VBD[:, :0] for x_VBD in pooled_VBD], None if distance_N is None else distance_N[:0]
        views = views_of(batch, self.photometric)
        images = [sized_vB3SS.flatten(0, 1) for sized_vB3SS in views]
        # The base runs first, before the encoder's activations take memory, and in its own block: autocast caches cast
        # weights until the block ends, and before torch 2.10 even those cast without gradient.
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
        """Return the pooled tokens of `_encode`, computed by micro-batches. Call this without gradient."""
        parts = [self._encode(part, self.pooled_blocks)[0] for _, part in self._parts(batch)]
        return parts[0] if len(parts) == 1 else [torch.cat(of_block, dim=1) for of_block in zip(*parts, strict=True)]

    def _parts(self, batch: ViewBatch) -> Iterator[tuple[slice, ViewBatch]]:
        """Yield the micro-batches of a batch, each with its slice of images. The last ones may be smaller or empty."""
        images = len(batch.sample_B)
        size = self.micro_batch or max(images, 1)
        # A rank whose images are all unreadable still takes part in the collectives. With sharded weights every pass
        # has collectives, so all ranks need the same number of micro-batches.
        most = max(images, 1)
        if self.sharded_encoder is not None and self.micro_batch is not None:
            most = max(most, self.most_images)
        for start in range(0, most, size):
            rows = slice(min(start, images), min(start + size, images))
            yield rows, ViewBatch(batch.epoch, batch.sample_B[rows], [crops[rows] for crops in batch.crops], [])

    def _of_heads(self, features_VBD: list[Tensor]) -> list[Tensor]:
        """Stack features as the heads' inputs, (H, N, D) per distinct width D."""
        stacked = self.heads.stacked([features_VBD[index] for index in self.block_of_head])
        return [x_HVBD.flatten(1, 2) for x_HVBD in stacked]

    def _choices(self, epoch: int, sample_B: Tensor) -> Tensor:
        """Draw uniform numbers (H, 2 * B) that pick one of the top-k neighbours."""
        seed, heads = self.photometric.seed, self.heads.num_heads
        view_M = torch.arange(2, device=self.device).repeat_interleave(len(sample_B))
        return uniform(seed, epoch, Operation.NEIGHBOUR, sample_B.repeat(2), view_M, count=heads).T


def compile_blocks(encoder: TokenEncoder) -> None:
    """Compile every block in place, so that weights keep their names.

    All blocks share the compiled code and, thanks to dynamic shapes, so do both sizes of views.
    """
    for block in encoder.block_modules:
        block.compile(dynamic=True)


def views_of(batch: ViewBatch, photometric: Photometric) -> list[Tensor]:
    """Return all views of a batch, normalised: one tensor (v, B, 3, S, S) per crop size, with v views of size S."""
    found, first = [], 0
    for crops in batch.crops:
        views = range(first, first + crops.shape[1])
        first = views.stop
        found.append(photometric(crops, batch.epoch, batch.sample_B, views))
    return found


def monitored_values(values: StepValues, labels: Tensor | None) -> dict[str, object]:
    """Return a step's numbers for the log, with one list entry per head.

    A sync point, also between ranks: call it only on logging steps. labels: (number of images,) on the device, used
    only for the accuracy of the neighbours.
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
    """Combine the ranks' loss terms and means over their parts into those of the whole batch."""
    means = torch.stack([value.double() for value in by_head.values()])
    values = torch.cat([terms.double() / world_size(), (means * share).flatten()])
    # Means over no images are NaN.
    values = sum_over_ranks(values if share else torch.zeros_like(values))
    return values[: len(terms)], dict(zip(by_head, values[len(terms) :].view_as(means), strict=True))


def neighbour_accuracy(neighbours: Neighbours, sample_B: Tensor, labels: Tensor) -> Tensor:
    """Percent of neighbours with their query's class, (H,); random rows from the queue's start count as wrong."""
    same_HM = labels[neighbours.sample_HM.clamp_min(0)] == labels[sample_B].repeat(2)
    return 100 * (same_HM & (neighbours.sample_HM >= 0)).float().mean(dim=1)
