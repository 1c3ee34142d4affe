"""Patch k-NN without training: patches of training images vote on every patch (as HummingBird and NeCo evaluate).

The memory holds patch tokens of training images with the classes of their pixels, as shares. The k most similar patches
by cosine vote with weights softmax(similarity / tau); the votes are upsampled to pixels.

Shapes: B images, N patches, M patches of a batch, D width, C classes, K neighbours.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimref.data.decode import BadImages, none_readable
from mimref.data.loader import loader_workers
from mimref.data.masks.sources import Pairs
from mimref.draws import Operation, uniform
from mimref.errors import ConfigError
from mimref.evaluation.knn.protocol import find_neighbours
from mimref.features.encode import PassSettings
from mimref.progress import Progress
from mimref.transfer.segment.config import InContextConfig
from mimref.transfer.segment.heads import grid
from mimref.transfer.segment.tokens import PatchTokens
from mimref.transfer.segment.transforms import view_batches

# Shares of neighbours gathered at once: 64 MB.
_GATHERED = 1 << 24


class Memory:
    """Patches of training images and the classes of their pixels."""

    def __init__(
        self, tokens: PatchTokens, pairs: Pairs, settings: InContextConfig, reading: PassSettings, seed: int
    ) -> None:
        """tokens: of a single input. The same patches of an image are drawn for every block and encoder."""
        self.tokens, self.pairs, self.settings, self.reading, self.seed = tokens, pairs, settings, reading, seed
        self.bad = BadImages(reading.max_bad)
        self.x = np.empty((0, 0), dtype=np.float32)
        """(N, D)."""
        self.shares = torch.empty(0, 0)
        """(N, C) float32, of labelled pixels."""

    def fill(self, progress: Progress | None = None) -> None:
        """Encode the middle squares of all training images. Raises DataError for too many unreadable ones."""
        each = max(1, self.settings.memory // len(self.pairs))
        workers, done = loader_workers(self.reading.workers, self.pairs.images), 0
        size, batch_size = self.reading.transform.image_size, self.reading.batch_size
        found: list[tuple[NDArray[np.float32], Tensor]] = []
        for batch in view_batches(self.pairs, size, "crop", batch_size=batch_size, workers=workers):
            for path, reason in batch.bad:
                self.bad.add(path, reason)
            done += len(batch.images) + len(batch.bad)
            if batch.images:
                images = torch.stack([view.image for view in batch.images]).to(self.reading.device)
                (x_BND,) = self.tokens(self.reading.transform.normalize(images))
                masks = torch.stack([view.mask for view in batch.images])
                shares_BNC, labelled_BN = patch_shares(masks, round(x_BND.shape[1] ** 0.5), self.pairs.classes)
                chosen_BN = self._chosen([view.index for view in batch.images], labelled_BN, each)
                found.append((x_BND.cpu()[chosen_BN].numpy(), shares_BNC[chosen_BN]))
            if progress is not None:
                progress(done, len(self.pairs))
        if not found:
            raise none_readable(self.pairs.name, self.bad.items)
        self.x = np.concatenate([x for x, _ in found])
        self.shares = torch.cat([shares for _, shares in found])
        if self.settings.k > len(self.x):
            raise ConfigError(f"knn.k {self.settings.k} is more than the {len(self.x)} patches of training images")

    def _chosen(self, indices: list[int], labelled_BN: Tensor, each: int) -> Tensor:
        """(B, N) bool: at most so many labelled patches of each image, drawn for (seed, image, patch)."""
        draw_BN = uniform(self.seed, 0, Operation.NEIGHBOUR, torch.tensor(indices), count=labelled_BN.shape[1])
        # Unlabelled patches come last.
        rank_BN = (draw_BN + 1.0 * ~labelled_BN).argsort(dim=1).argsort(dim=1)
        return labelled_BN & (rank_BN < each)

    def scores(self, images_n3SS: Tensor) -> Tensor:
        """Votes (1, n, C, h, w) of normalised images."""
        (x_BND,) = self.tokens(images_n3SS)
        neighbours = find_neighbours(
            self.x,
            x_BND.flatten(0, 1).cpu().numpy(),
            k=self.settings.k,
            standardize=self.settings.standardize,
            device=self.reading.device.type,
        )
        votes_MC = vote(neighbours.similarity, neighbours.train_index, self.shares, self.settings.tau)
        votes_BNC = votes_MC.unflatten(0, x_BND.shape[:2]).to(self.reading.device)
        return grid(votes_BNC.transpose(1, 2))[None]


def vote(similarity_MK: Tensor, index_MK: Tensor, shares_NC: Tensor, tau: float) -> Tensor:
    """(M, C) mean shares of the neighbours, weighted by softmax(similarity / tau)."""
    weights_MK = (similarity_MK / tau).softmax(dim=1)
    step = max(1, _GATHERED // (index_MK.shape[1] * shares_NC.shape[1]))
    parts = zip(weights_MK.split(step), index_MK.split(step), strict=True)
    return torch.cat([torch.einsum("mk,mkc->mc", weights, shares_NC[index]) for weights, index in parts])


def patch_shares(masks_BSS: Tensor, side: int, classes: int) -> tuple[Tensor, Tensor]:
    """Shares (B, N, C) of the classes among the labelled pixels of every patch, and which patches have any, (B, N).

    side: patches per side, which divide S.
    """
    length = masks_BSS.shape[1] // side
    pixels_BNP = masks_BSS.unfold(1, length, length).unfold(2, length, length).flatten(1, 2).flatten(2).long()
    # Unlabelled pixels are counted as one more class, which is then dropped.
    counts = torch.zeros(*pixels_BNP.shape[:2], classes + 1)
    place = torch.where(pixels_BNP >= 0, pixels_BNP, classes)
    counts.scatter_add_(2, place, torch.ones((), dtype=counts.dtype).expand_as(place))
    counts = counts[..., :classes]
    labelled = counts.sum(dim=2)
    return counts / labelled.clamp_min(1)[..., None], labelled > 0
