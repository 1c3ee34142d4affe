"""Scores of whole images from windows of the size that the heads see, and confusion matrices of the classes.

Windows cover an image from its upper left corner on; the last ones are moved inwards so that none extends beyond it.
Where windows overlap, scores are averaged (mmsegmentation's sliding window). An image of a window's size is one window.

Shapes: K heads, n windows, C classes, h x w patches, S pixels per side of a window.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mimref.data.decode import BadImages, none_readable
from mimref.data.loader import loader_workers
from mimref.data.masks.sources import UNLABELLED, Pairs
from mimref.features.encode import PassSettings
from mimref.progress import Progress
from mimref.transfer.segment.config import TestMode, Upsampling
from mimref.transfer.segment.heads import PIXEL_ELEMENTS, to_pixels
from mimref.transfer.segment.metrics import Confusion, confusions
from mimref.transfer.segment.transforms import View, nearest, view_batches

SAMPLES = 4
"""Number of images whose predictions are saved for a figure."""
_DEFAULT_STRIDE = 2 / 3

Scores = Callable[[Tensor], Tensor]
"""Maps normalised windows (n, 3, S, S) to scores of their patches, (K, n, C, h, w)."""


class Sample(NamedTuple):
    """An image with the true and predicted classes of its pixels, on the CPU."""

    image: Tensor
    """uint8 (3, H, W), as passed to the heads."""
    truth: Tensor
    """int16 (H', W'); the size may differ from the image's."""
    predicted_K: Tensor
    """int16 (K, H', W'): the prediction of every head."""


class Found(NamedTuple):
    """Result of a test."""

    confusions: list[Confusion]
    """Confusion matrix (C, C) of every head."""
    samples: list[Sample]
    """The first `SAMPLES` readable images."""
    bad: list[tuple[str, str]]
    """Path and reason of every image that could not be read."""


class Viewing(NamedTuple):
    """Settings for testing images."""

    mode: TestMode
    upsampling: Upsampling
    stride: int | None = None
    """Pixels from window to window; None: two thirds of a window."""


def evaluate_images(
    pairs: Pairs, scores: Scores, heads: int, reading: PassSettings, viewing: Viewing, progress: Progress | None = None
) -> Found:
    """Return every head's confusion matrix over all images. Raises DataError if too many images are unreadable."""
    size = reading.transform.image_size
    total = torch.zeros(heads, pairs.classes, pairs.classes, dtype=torch.int64, device=reading.device)
    bad, samples, done = BadImages(reading.max_bad), list[Sample](), 0
    workers = loader_workers(reading.workers, pairs.images)
    for batch in view_batches(pairs, size, viewing.mode, batch_size=reading.batch_size, workers=workers):
        bad.add_all(batch.bad)
        for view, of_pixels in zip(batch.images, score_views(batch.images, scores, reading, viewing), strict=True):
            truth = view.mask.to(reading.device)
            predicted = [each.argmax(1).short() for each in of_pixels]
            total += confusions(truth, torch.cat(predicted), pairs.classes)
            if len(samples) < SAMPLES:
                samples.append(Sample(view.image, view.mask, torch.cat(predicted).cpu()))
        done += len(batch.images) + len(batch.bad)
        if progress is not None:
            progress(done, len(pairs))
    if not samples:
        raise none_readable(pairs.name, bad.items)
    return Found([each.numpy() for each in total.cpu()], samples, bad.items)


@torch.no_grad()
def score_views(
    views: list[View], scores: Scores, reading: PassSettings, viewing: Viewing
) -> Iterator[Iterator[Tensor]]:
    """Yield, for every image, the scores of its mask's pixels: parts (heads, C, H, W), a few heads at a time."""
    size, cut = reading.transform.image_size, [cut_windows(view, reading, viewing.stride) for view in views]
    windows = torch.cat([each.images for each in cut]) if cut else torch.empty(0)
    of_patches = [scores(part) for part in windows.split(reading.batch_size)] if cut else []
    of_image = torch.cat(of_patches, dim=1).split([len(each.corners) for each in cut], dim=1) if cut else ()
    for view, each, found in zip(views, cut, of_image, strict=True):
        yield assemble(found, each.corners, view.image.shape[1:], view.mask.shape, size, viewing.upsampling)


class Windows(NamedTuple):
    """The windows of an image."""

    images: Tensor
    """(n, 3, S, S), normalised, on the device; zero beyond a small image's lower and right edges."""
    corners: list[tuple[int, int]]
    """Top and left of each window."""


def cut_windows(view: View, reading: PassSettings, stride: int | None) -> Windows:
    """Cut an image into windows. stride: None is two thirds of a window."""
    size = reading.transform.image_size
    image = reading.transform.normalize(view.image[None].to(reading.device, non_blocking=True))[0]
    padded = F.pad(image, (0, max(0, size - image.shape[2]), 0, max(0, size - image.shape[1])))
    corners = window_corners(padded.shape[1], padded.shape[2], size, stride or max(1, int(size * _DEFAULT_STRIDE)))
    return Windows(torch.stack([padded[:, top : top + size, left : left + size] for top, left in corners]), corners)


def mask_windows(view: View, size: int, corners: list[tuple[int, int]]) -> Tensor:
    """Return the classes (n, S, S) in an image's windows; unlabelled beyond its edges."""
    mask = nearest(view.mask, *view.image.shape[1:])
    padded = F.pad(mask, (0, max(0, size - mask.shape[1]), 0, max(0, size - mask.shape[0])), value=UNLABELLED)
    return torch.stack([padded[top : top + size, left : left + size] for top, left in corners])


def window_corners(height: int, width: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Return top and left of all windows of an image that is at least as large as one window."""
    tops, lefts = (
        [min(number * stride, length - size) for number in range(max(length - size + stride - 1, 0) // stride + 1)]
        for length in (height, width)
    )
    return [(top, left) for top in tops for left in lefts]


def assemble(
    scores_KnChw: Tensor,
    corners: list[tuple[int, int]],
    seen: torch.Size,
    shape: torch.Size,
    size: int,
    upsampling: Upsampling,
) -> Iterator[Tensor]:
    """Yield the scores (heads, C, H, W) of one image from those of its windows, a few heads at a time.

    seen: height and width of the image that the windows cover. shape: height and width of the result.
    """
    height, width = (max(length, size) for length in seen)
    step = max(1, PIXEL_ELEMENTS // (scores_KnChw.shape[2] * max(height * width, shape[0] * shape[1])))
    for part_KnChw in scores_KnChw.split(step):
        if len(corners) == 1:
            summed = to_pixels(part_KnChw[:, 0], (size, size), upsampling)
        else:
            summed = part_KnChw.new_zeros(len(part_KnChw), part_KnChw.shape[2], height, width)
            count = part_KnChw.new_zeros(height, width)
            for number, (top, left) in enumerate(corners):
                place = (..., slice(top, top + size), slice(left, left + size))
                summed[place] += to_pixels(part_KnChw[:, number], (size, size), upsampling)
                count[place] += 1
            summed /= count
        summed = summed[..., : seen[0], : seen[1]]
        yield summed if summed.shape[2:] == shape else to_pixels(summed, shape, upsampling)
