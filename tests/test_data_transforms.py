import json

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from mimref.data.transforms import IMAGENET_MEAN, IMAGENET_STD, EvalTransform
from mimref.errors import ConfigError


def noise(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (300, 500), (500, 301), (10, 37), (1, 1), (5, 80)])
@pytest.mark.parametrize(("size", "fraction", "resized"), [(16, 0.875, 18), (28, 1.0, 28)])
def test_crop_is_torchvisions(height: int, width: int, size: int, fraction: float, resized: int) -> None:
    reference = v2.Compose(
        [v2.Resize(resized, interpolation=v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)]
    )
    image = noise(height, width)
    cropped = EvalTransform(size, fraction).crop(image)
    assert cropped.shape == (3, size, size)
    assert cropped.dtype == torch.uint8
    assert cropped.is_contiguous()
    assert torch.equal(cropped, reference(image))


def test_the_papers_transform_is_the_default() -> None:
    transform = EvalTransform(224)
    image = noise(300, 400)
    reference = v2.Compose(
        [
            v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    got = transform.normalize(transform.crop(image)[None])[0]
    torch.testing.assert_close(got, reference(image), rtol=0, atol=1e-6)


def test_image_of_the_right_size_is_kept_and_the_crop_is_central() -> None:
    image = noise(28, 28)
    assert torch.equal(EvalTransform(28, 1.0).crop(image), image)
    wide = noise(28, 48)
    assert torch.equal(EvalTransform(28, 1.0).crop(wide), wide[:, :, 10:38])


@pytest.mark.parametrize(("height", "width"), [(300, 500), (10, 37), (500, 301), (224, 224)])
def test_a_direct_resize_is_torchvisions_to_a_square(height: int, width: int) -> None:
    image, transform = noise(height, width), EvalTransform(28, 0.5, resize="direct")
    reference = v2.Resize((28, 28), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(transform.crop(image), reference(image)) and transform.crop(image).is_contiguous()
    assert EvalTransform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform
    assert transform.to_dict() == EvalTransform(28, 0.5).to_dict() | {"resize": "direct"}
    with pytest.raises(ConfigError, match="'both'"):
        EvalTransform.from_dict(transform.to_dict() | {"resize": "both"})


@pytest.mark.parametrize(("height", "width"), [(1, 200_000), (200_000, 1)])
def test_a_strip_does_not_fill_the_memory(height: int, width: int) -> None:
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    centre = 100_000
    image[:, :, centre - 100 : centre + 100] = 200
    image[:, centre - 100 : centre + 100, :] = 200
    cropped = EvalTransform(224).crop(image)
    assert cropped.shape == (3, 224, 224)
    assert (cropped == 200).all()


def test_normalize_matches_a_plain_loop_in_float64() -> None:
    transform = EvalTransform(4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    batch = torch.stack([noise(4, 4), noise(4, 4).flip(1)])
    got = transform.normalize(batch, torch.float64)
    for image in range(2):
        for channel in range(3):
            for y in range(4):
                for x in range(4):
                    pixel = batch[image, channel, y, x].item() / 255
                    expected = (pixel - transform.mean[channel]) / transform.std[channel]
                    assert got[image, channel, y, x].item() == pytest.approx(expected, rel=1e-14, abs=1e-14)


def test_normalize_rounds_to_low_precision_once() -> None:
    batch = noise(8, 8)[None]
    transform = EvalTransform(8)
    exact = transform.normalize(batch)
    assert exact.dtype == torch.float32
    assert torch.equal(transform.normalize(batch, torch.bfloat16), exact.bfloat16())


@pytest.mark.gpu
def test_normalize_stays_on_the_batchs_device() -> None:
    batch = noise(8, 8)[None]
    on_gpu = EvalTransform(8).normalize(batch.cuda())
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), EvalTransform(8).normalize(batch), rtol=0, atol=1e-6)


def test_dictionary_survives_json() -> None:
    transform = EvalTransform(28, 1.0, mean=(0.5, 0.25, 0.1))
    assert EvalTransform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform
    assert EvalTransform(224).to_dict() == {
        "image_size": 224,
        "crop_fraction": 0.875,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }


@pytest.mark.parametrize(
    "saved", [{}, {**EvalTransform(8).to_dict(), "mean": [1.0, 2.0]}, {**EvalTransform(8).to_dict(), "image_size": "x"}]
)
def test_a_broken_dictionary_is_refused(saved: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="recorded transform"):
        EvalTransform.from_dict(saved)


def test_values_that_make_no_transform() -> None:
    with pytest.raises(ConfigError, match="image size is 0"):
        EvalTransform(0)
    with pytest.raises(ConfigError, match=r"crop_fraction is 1\.5"):
        EvalTransform(8, 1.5)
    with pytest.raises(ConfigError, match="std is"):
        EvalTransform(8, std=(0.0, 1.0, 1.0))
    with pytest.raises(ConfigError, match="finite"):
        EvalTransform(8, mean=(float("nan"), 1.0, 1.0))
