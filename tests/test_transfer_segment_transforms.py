"""Crops of training images and views of test images, against plain loops and torchvision."""

import colorsys

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from mimref.data.masks.sources import UNLABELLED
from mimref.draws import Operation, uniform
from mimref.transfer.segment.config import CropsConfig
from mimref.transfer.segment.photometric import distort
from mimref.transfer.segment.transforms import crop_box, nearest, resized_size, training_crop, view_of


def pair(height: int, width: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(height * width)
    mask = torch.randint(-1, classes, (height // 4 + 1, width // 4 + 1)).repeat_interleave(4, 0).repeat_interleave(4, 1)
    return torch.randint(256, (3, height, width), dtype=torch.uint8), mask[:height, :width].short()


def draw(seed: int, epoch: int, operation: Operation, sample: int, count: int) -> list[float]:
    found: list[float] = uniform(seed, epoch, operation, torch.tensor([sample]), count=count)[0].double().tolist()
    return found


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (9, 80), (16, 16)])
def test_training_crop(shape: tuple[int, int]) -> None:
    """Crops equal those of mmsegmentation's pipeline, step by step in plain Python."""
    image, mask = pair(*shape)
    crops, size = CropsConfig(), 16
    for sample in range(20):
        found = training_crop(image, mask, size, crops, 3, 2, sample)
        (u,) = draw(3, 2, Operation.CROP_SHAPE, sample, 1)
        ratio = 0.5 + 1.5 * u
        factor = min(32 * ratio / max(shape), 16 * ratio / min(shape))
        height, width = (max(1, int(side * factor + 0.5)) for side in shape)
        assert max(height, width) <= 32 * ratio + 1 and min(height, width) <= 16 * ratio + 1
        resize = v2.Resize([height, width], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        resized = resize(image)
        labels = [
            [int(mask[int((y + 0.5) * shape[0] / height), int((x + 0.5) * shape[1] / width)]) for x in range(width)]
            for y in range(height)
        ]
        places = draw(3, 2, Operation.CROP_PLACE, sample, 22)
        for attempt in range(11):
            top = int(places[attempt] * (max(height - 16, 0) + 1))
            left = int(places[11 + attempt] * (max(width - 16, 0) + 1))
            cut = [row[left : left + 16] for row in labels[top : top + 16]]
            counts = {label: sum(row.count(label) for row in cut) for label in range(4)}
            present = [count for count in counts.values() if count]
            if len(present) > 1 and max(present) / sum(present) < 0.75:
                break
        flipped = draw(3, 2, Operation.FLIP, sample, 1)[0] < 0.5
        expected = np.array([row[:: -1 if flipped else 1] for row in cut])
        assert (found.height, found.width) == expected.shape
        assert np.array_equal(found.mask[: found.height, : found.width], expected)
        assert (found.mask[found.height :] == UNLABELLED).all() and (found.mask[:, found.width :] == UNLABELLED).all()
        pixels = resized[:, top : top + 16, left : left + 16]
        assert torch.equal(found.image[:, : found.height, : found.width], pixels.flip(-1) if flipped else pixels)
        assert not found.image[:, found.height :].any() and not found.image[:, :, found.width :].any()


def test_a_crop_of_one_class_is_drawn_again() -> None:
    mask = torch.zeros(64, 64, dtype=torch.int16)
    mask[48:, 48:] = 1
    for sample in range(30):
        draw_2T = uniform(0, 0, Operation.CROP_PLACE, torch.tensor([sample]), count=22).view(2, -1)
        top, left = crop_box(mask, 16, 0.75, draw_2T)
        boxes = [(int(y * 49), int(x * 49)) for y, x in zip(*draw_2T.double().tolist(), strict=True)]
        share = [float(mask[y : y + 16, x : x + 16].float().mean()) for y, x in boxes]
        first = next((n for n, part in enumerate(share[:10]) if 0.25 < part < 0.75), 10)
        assert (top, left) == boxes[first]


def test_the_paper_limits_the_longer_side() -> None:
    assert resized_size(100, 100, 224, CropsConfig(), 1 / 3) == (224, 224)
    assert resized_size(100, 400, 224, CropsConfig(), 1 / 3) == (112, 448)
    assert resized_size(100, 400, 512, CropsConfig(longest=4.0), 1 / 3) == (512, 2048)


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (16, 16), (5, 90)])
def test_views_of_test_images(shape: tuple[int, int]) -> None:
    image, mask = pair(*shape)
    bicubic = v2.Compose([v2.Resize(16, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(16)])
    crop = view_of(7, image, mask, 16, "crop")
    assert crop.number == 7 and torch.equal(crop.image, bicubic(image))
    exact = v2.Compose([v2.Resize(16, v2.InterpolationMode.NEAREST_EXACT), v2.CenterCrop(16)])
    assert torch.equal(crop.mask, exact((mask + 1).to(torch.uint8)[None])[0].short() - 1)
    slide = view_of(7, image, mask, 16, "slide")
    assert torch.equal(slide.image, v2.Resize(16, v2.InterpolationMode.BICUBIC, antialias=True)(image))
    assert torch.equal(slide.mask, mask)
    full = view_of(7, image, mask, 16, "full")
    assert torch.equal(full.image, image) and torch.equal(full.mask, mask)


def test_nearest_keeps_every_value() -> None:
    mask = torch.arange(-1, 30_000, 251, dtype=torch.int16)[:12].view(3, 4)
    assert torch.equal(nearest(mask, 3, 4), mask)
    assert torch.equal(nearest(mask, 6, 8), mask.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_photometric_distortion() -> None:
    """Images equal those of a loop over pixels with Python's own HSV conversion."""
    torch.manual_seed(0)
    images = torch.rand(40, 3, 3, 3, dtype=torch.float64)
    sample = torch.arange(40)
    found = distort(images, 5, 1, sample)
    changed = 0
    for n in range(40):
        u = draw(5, 1, Operation.JITTER, n, 9)
        brightness, contrast, saturation, hue = (each < 0.5 for each in u[:4])
        early = u[8] < 0.5
        changed += brightness or contrast or saturation or hue
        for y in range(3):
            for x in range(3):
                rgb = images[n, :, y, x].tolist()

                def apply(rgb: list[float], factor: float, shift: float = 0.0) -> list[float]:
                    return [min(1.0, max(0.0, value * factor + shift)) for value in rgb]

                if brightness:
                    rgb = apply(rgb, 1.0, 32 / 255 * (2 * u[4] - 1))
                if contrast and early:
                    rgb = apply(rgb, 0.5 + u[5])
                h, s, v = colorsys.rgb_to_hsv(*rgb)
                if saturation:
                    s = min(1.0, s * (0.5 + u[6]))
                if hue:
                    h = (h + 0.1 * (2 * u[7] - 1)) % 1
                rgb = list(colorsys.hsv_to_rgb(h, s, v))
                if contrast and not early:
                    rgb = apply(rgb, 0.5 + u[5])
                assert found[n, :, y, x].tolist() == pytest.approx(rgb, abs=1e-6)
    assert 30 < changed < 40
