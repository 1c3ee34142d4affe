"""Patch k-NN without training: patches of training images vote on every patch, as in HummingBird and NeCo.

The memory holds patch tokens of training images, each with the shares of the classes among its pixels. The k patches
with the highest cosine similarity vote with weights softmax(similarity / tau); the votes are upsampled to pixels.

Shapes: n windows of N patches each, P patches of an image, M patches of a batch, D width, C classes, K neighbours.
"""

import math

import numpy as np
import torch
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
from mimref.transfer.segment.windows import Viewing, cut_windows, mask_windows

# Number of neighbours' shares gathered at once: 64 MB.
_GATHERED = 1 << 24


class Memory:
    """Patch tokens of training images and the classes of their pixels."""

    def __init__(
        self,
        tokens: PatchTokens,
        pairs: Pairs,
        settings: InContextConfig,
        reading: PassSettings,
        viewing: Viewing,
        seed: int,
    ) -> None:
        """tokens: with a single input. The draws of an image's patches are the same for every block and encoder."""
        self.tokens, self.pairs, self.settings, self.seed = tokens, pairs, settings, seed
        self.reading, self.viewing = reading, viewing
        self.bad = BadImages(reading.max_bad)
        self.x = np.empty((0, 0), dtype=np.float32)
        """Patch tokens in memory, (N, D)."""
        self.shares = torch.empty(0, 0)
        """Shares of the classes among their labelled pixels, (N, C) float32."""

    def fill(self, progress: Progress | None = None) -> None:
        """Encode all training images in the same way as test images. Raises DataError if too many are unreadable."""
        size, workers, done = self.reading.transform.image_size, self.reading.workers, 0
        each = max(1, self.settings.memory // len(self.pairs))
        found: list[tuple[Tensor, Tensor]] = []
        for batch in view_batches(
            self.pairs,
            size,
            self.viewing.mode,
            batch_size=self.reading.batch_size,
            workers=loader_workers(workers, self.pairs.images),
        ):
            self.bad.add_all(batch.bad)
            done += len(batch.images) + len(batch.bad)
            cut = [cut_windows(view, self.reading, self.viewing.stride) for view in batch.images]
            windows = torch.cat([of_image.images for of_image in cut]) if cut else torch.empty(0)
            encoded = [self.tokens(part)[0].cpu() for part in windows.split(self.reading.batch_size)] if cut else []
            of_image = torch.cat(encoded).split([len(one.corners) for one in cut]) if cut else ()
            for view, one, x_nND in zip(batch.images, cut, of_image, strict=True):
                masks = mask_windows(view, size, one.corners)
                shares_nNC, labelled_nN = patch_shares(masks, math.isqrt(x_nND.shape[1]), self.pairs.classes)
                chosen = self._chosen(view.number, labelled_nN.flatten(), each)
                found.append((x_nND.flatten(0, 1)[chosen], shares_nNC.flatten(0, 1)[chosen]))
            if progress is not None:
                progress(done, len(self.pairs))
        if not found:
            raise none_readable(self.pairs.name, self.bad.items)
        self.x = torch.cat([x for x, _ in found]).numpy()
        self.shares = torch.cat([shares for _, shares in found])
        if self.settings.k > len(self.x):
            raise ConfigError(
                f"knn.k {self.settings.k} is more than the {len(self.x)} patches of training images; choose fewer"
            )

    def _chosen(self, index: int, labelled_P: Tensor, most: int) -> Tensor:
        """Return positions of up to `most` labelled patches of an image, drawn by (seed, image, patch), in order."""
        draw_P = uniform(self.seed, 0, Operation.NEIGHBOUR, torch.tensor([index]), count=len(labelled_P))[0]
        rows = labelled_P.nonzero().flatten()
        return rows[draw_P[rows].argsort(stable=True)[:most]].sort().values

    def scores(self, images_n3SS: Tensor) -> Tensor:
        """Return the votes (1, n, C, h, w) on normalised images."""
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
    """Return the mean shares (M, C) of the neighbours, weighted by softmax(similarity / tau)."""
    weights_MK = (similarity_MK / tau).softmax(dim=1)
    step = max(1, _GATHERED // (index_MK.shape[1] * shares_NC.shape[1]))
    parts = zip(weights_MK.split(step), index_MK.split(step), strict=True)
    return torch.cat([torch.einsum("mk,mkc->mc", weights, shares_NC[index]) for weights, index in parts])


def patch_shares(masks_BSS: Tensor, side: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return each patch's class shares (B, N, C) among its labelled pixels, and whether it has any, (B, N).

    side: patches per side; a divisor of S.
    """
    length = masks_BSS.shape[1] // side
    pixels_BNP = masks_BSS.unfold(1, length, length).unfold(2, length, length).flatten(1, 2).flatten(2).long()
    # Unlabelled pixels are counted as an additional class, which is then dropped.
    counts = torch.zeros(*pixels_BNP.shape[:2], classes + 1)
    place = torch.where(pixels_BNP >= 0, pixels_BNP, classes)
    counts.scatter_add_(2, place, torch.ones((), dtype=counts.dtype).expand_as(place))
    counts = counts[..., :classes]
    labelled = counts.sum(dim=2)
    return counts / labelled.clamp_min(1)[..., None], labelled > 0
