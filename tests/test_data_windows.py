"""Crops by matrix products against torchvision's resize, which the CPU path uses."""

import pytest
import torch
from torch import Tensor

from mimref.data.transforms import EvalTransform, resize
from mimref.data.windows import resize_windows, window_weights

CPU = torch.device("cpu")


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


def window(start: int, length: int, size: int) -> list[float]:
    return [start, length / size, start, start + length]


def keys(distance: float) -> float:
    """Keys's cubic kernel with a = -0.5, from its definition."""
    d = abs(distance)
    if d < 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


@pytest.mark.parametrize(("start", "length", "size"), [(0, 9, 4), (3, 5, 8), (2, 7, 7), (5000, 911, 6)])
def test_weights_are_the_normalised_kernel_within_the_window(start: int, length: int, size: int) -> None:
    total = start + length + 2
    found = window_weights(torch.tensor([window(start, length, size)], dtype=torch.float64), size, total, CPU)[0]
    step = length / size
    for output in range(size):
        centre = start + (output + 0.5) * step
        inside = [start <= pixel < start + length for pixel in range(total)]
        row = [keys((pixel + 0.5 - centre) / max(1, step)) * inside[pixel] for pixel in range(total)]
        torch.testing.assert_close(found[output].double(), torch.tensor(row).double() / sum(row), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [5, 16, 40])
def test_boxes_of_padded_images_are_resized_as_torchvision_does(size: int) -> None:
    images = [noise(3, 30, 41), noise(3, 23, 18)]
    boxes = [[(0, 0, 30, 41), (4, 7, 20, 16), (11, 3, 1, 2)], [(0, 0, 23, 18), (2, 1, 16, 16), (20, 9, 3, 5)]]
    stacked = torch.full((2, 3, 30, 41), 99.0)
    for row, image in zip(stacked, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    windows = torch.tensor(
        [[[window(top, high, size), window(left, wide, size)] for top, left, high, wide in own] for own in boxes],
        dtype=torch.float64,
    )
    crops = resize_windows(stacked, windows, size)
    assert (crops.shape, crops.dtype) == ((2, 3, 3, size, size), torch.uint8)
    for image, own, found in zip(images, boxes, crops, strict=True):
        for (top, left, high, wide), crop in zip(own, found, strict=True):
            expected = resize(image[:, top : top + high, left : left + wide], [size, size])
            apart = (crop.int() - expected.int()).abs()
            assert apart.max() <= 2 and apart.double().mean() < 0.2  # a crop may have only 75 values


@pytest.mark.parametrize(
    "transform", [EvalTransform(16), EvalTransform(15, 1.0), EvalTransform(40, 0.9), EvalTransform(16, resize="direct")]
)
@pytest.mark.parametrize("shape", [(30, 41), (41, 30), (16, 16), (17, 18), (1, 40), (90, 2)])
def test_evaluation_windows_are_those_of_the_transform(transform: EvalTransform, shape: tuple[int, int]) -> None:
    image, size = noise(3, *shape), transform.image_size
    crop = resize_windows(image[None].float(), transform.windows([shape]), size)[0, 0]
    apart = (crop.int() - transform.crop(image).int()).abs()
    assert apart.max() <= 2 and apart.double().mean() < 0.05


def test_no_image_has_no_window() -> None:
    assert EvalTransform(8).windows([]).shape == (0, 1, 2, 4)
