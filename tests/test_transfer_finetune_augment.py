"""Augmentation of fine-tuning against timm's own, with the same draws."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, Resize

from mimref.data.decode import Decoded
from mimref.data.loader import Preparation, ViewBatch, view_batches
from mimref.data.views import CropGroup
from mimref.draws import Operation, seeded
from mimref.transfer.finetune.augment import Erasing, Mixed, RandAugment, mix, partners
from mimref.transfer.finetune.config import AugmentConfig
from tests.sources import opened
from tests.tiny import write_labelled

SEED, EPOCH = 7, 3
CPU = torch.device("cpu")
MEAN = (0.485, 0.456, 0.406)


@pytest.fixture(autouse=True)
def generators_stay() -> Iterator[None]:
    """The global state of `random` and NumPy does not change; only that of torch may."""
    random.seed(1)
    np.random.seed(2)
    yield
    found = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(2)
    assert found == (random.random(), np.random.rand())


def seed_timm(operation: Operation, number: int) -> None:
    """Seed the generators that timm draws from with our seed of this image or step."""
    with seeded(SEED, EPOCH, operation, number) as found:
        pass
    random.seed(found)
    np.random.seed(found)
    torch.manual_seed(found)


def restored() -> None:
    random.seed(1)
    np.random.seed(2)


# --- RandAugment


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-m5-n3", "rand-m9-n3-mstd101-tweights"])
def test_rand_augment_is_timms(text: str) -> None:
    change = RandAugment(text, SEED, MEAN)
    timms: Any = rand_augment_transform(
        text, {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC, "translate_const": 100}
    )
    crops = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8)
    changed = 0
    for sample, crop in enumerate(crops):
        found = change(crop, EPOCH, sample)
        seed_timm(Operation.RAND_AUGMENT, sample)
        expected = timms(Image.fromarray(crop.permute(1, 2, 0).numpy()))
        restored()
        assert found.dtype == torch.uint8
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.array(expected))
        changed += not torch.equal(found, crop)
    assert changed > 8


def test_posterizing_to_no_bits_is_black() -> None:
    """Newer versions of Pillow refuse to posterize to no bits."""
    change = RandAugment("rand-m10-n8-p1-inc1", SEED, MEAN)
    crop = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    for sample in range(20):
        assert change(crop, EPOCH, sample).shape == crop.shape


# --- random erasing


def test_erasing_is_timms_image_by_image() -> None:
    images, samples = torch.randn(40, 3, 16, 16), torch.randperm(1000)[:40]
    timms: Any = RandomErasing(0.25, mode="pixel", max_count=1, device="cpu")
    expected = images.clone()
    for image, sample in zip(expected, samples.tolist(), strict=True):
        seed_timm(Operation.ERASE, sample)
        timms(image)
    restored()
    found = images.clone()
    Erasing(0.25, SEED, CPU)(found, EPOCH, samples)
    assert torch.equal(found, expected)
    erased = (found != images).flatten(1).any(dim=1)
    assert 3 <= int(erased.sum()) <= 18
    # A part of the batch is erased in the same way.
    part = images[10:13].clone()
    Erasing(0.25, SEED, CPU)(part, EPOCH, samples[10:13])
    assert torch.equal(part, expected[10:13])
    Erasing(0.0, SEED, CPU)(images, EPOCH, samples)
    assert torch.equal(images[~erased], found[~erased])


# --- mixup and CutMix


class TimmMixup(Mixup):  # type: ignore[misc]
    """timm's mixup without the draw that decides whether to mix: it always mixes."""

    def _params_per_batch(self) -> tuple[float, bool]:
        cut = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or np.random.rand() < self.switch_prob)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        return float(np.random.beta(alpha, alpha)), cut


ALPHAS = [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)]


@pytest.mark.parametrize(("mixup", "cutmix"), ALPHAS)
def test_a_mixed_batch_and_its_loss_are_timms(mixup: float, cutmix: float) -> None:
    """timm pairs the first image with the last; in the order 0, 2, 4, ..., 5, 3, 1, its pairs are our neighbours."""
    images = torch.randn(10, 3, 16, 16, dtype=torch.float64)
    labels, logits = torch.randint(0, 6, (10,)), torch.randn(10, 6, dtype=torch.float64)
    order = [*range(0, 10, 2), *range(9, 0, -2)]
    timms = TimmMixup(mixup, cutmix, label_smoothing=0.1, num_classes=6)
    shares, cuts = [], 0
    for step in range(12):
        found = mix(images, range(10), AugmentConfig(mixup=mixup, cutmix=cutmix), SEED, EPOCH, step)
        seed_timm(Operation.MIX, step)
        expected, _ = timms(images[order].clone(), labels[order])
        restored()
        torch.testing.assert_close(found.images[order], expected, rtol=1e-12, atol=1e-12)
        assert found.partner_B.tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]
        target = mixup_target(labels[order].clone(), 6, found.share, 0.1).double()
        loss = found.loss(logits, labels, labels[found.partner_B], 0.1) / 10
        # timm's targets are in single precision.
        torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits[order], target), rtol=1e-6, atol=0)
        shares.append(found.share)
        cuts += bool((found.images == images).any())
    assert len(set(shares)) > 6 and min(shares) > 0 and max(shares) <= 1
    assert (cuts > 0) == (cutmix > 0) and (cuts < 12) == (mixup > 0)


def test_the_loss_of_a_mixed_batch_in_a_plain_loop() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    labels, partner = torch.tensor([0, 3, 1, 1, 2]), torch.tensor([1, 0, 3, 2, 4])
    found = Mixed(torch.empty(5), 0.3, partner).loss(logits, labels, labels[partner], 0.1)
    expected = 0.0
    for row in range(5):
        target = torch.full((4,), 0.1 / 4, dtype=torch.float64)
        target[labels[row]] += 0.9 * 0.3
        target[labels[partner[row]]] += 0.9 * 0.7
        expected -= float((target * logits[row].log_softmax(0)).sum())
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_label_smoothing_is_timms() -> None:
    logits, labels = torch.randn(9, 5, dtype=torch.float64), torch.randint(0, 5, (9,))
    plain = mix(torch.zeros(9, 1), range(9), AugmentConfig(mixup=0.0, cutmix=0.0), SEED, EPOCH, 0)
    found = plain.loss(logits, labels, labels[plain.partner_B], 0.1) / 9
    torch.testing.assert_close(found, LabelSmoothingCrossEntropy(0.1)(logits, labels), rtol=1e-12, atol=0)
    assert torch.equal(plain.images, torch.zeros(9, 1)) and plain.share == 1


def test_half_precision_logits_give_a_full_precision_loss() -> None:
    logits, labels = torch.randn(4, 5).bfloat16(), torch.tensor([0, 1, 2, 3])
    mixed = Mixed(torch.empty(4), 0.4, torch.tensor([1, 0, 3, 2]))
    found = mixed.loss(logits, labels, labels[mixed.partner_B], 0.1)
    assert torch.equal(found, mixed.loss(logits.float(), labels, labels[mixed.partner_B], 0.1))


def test_partners_are_neighbours_where_both_could_be_read() -> None:
    assert partners(range(4)).tolist() == [1, 0, 3, 2]
    assert partners(range(5)).tolist() == [1, 0, 3, 2, 4]
    assert partners([0, 2, 3, 5]).tolist() == [0, 2, 1, 3]
    assert partners([]).tolist() == [] and partners([]).dtype == torch.int64
    image = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(mix(image, [4], AugmentConfig(), SEED, EPOCH, 0).images, image)


# --- images before and after cropping


def test_images_are_resized_before_they_are_cropped() -> None:
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    found = Preparation(resize=20).before(Decoded(image, 40, 60))
    expected = Resize(20, InterpolationMode.BICUBIC, antialias=True)(image)
    assert torch.equal(found.image, expected) and (found.height, found.width) == (20, 30)
    assert Preparation().before(Decoded(image, 40, 60)).image is image


def test_a_long_strip_does_not_fill_the_memory() -> None:
    strip = torch.zeros(3, 1, 100_000, dtype=torch.uint8)
    found = Preparation(resize=256).before(Decoded(strip, 1, 100_000))
    assert (found.height, found.width) == (256, 4096) == tuple(found.image.shape[1:])


def test_changes_do_not_depend_on_workers_or_batches(tmp_path: Path) -> None:
    source = opened(write_labelled(tmp_path), need_labels=True)
    preparation = Preparation(20, RandAugment("rand-m9-mstd0.5-inc1", SEED, MEAN))

    def crops(batch_size: int, workers: int) -> dict[tuple[int, int], Tensor]:
        found: dict[tuple[int, int], Tensor] = {}
        group = [CropGroup(1, 16, (0.2, 1.0))]
        batches: Iterator[ViewBatch] = view_batches(
            source, group, batch_size=batch_size, seed=SEED, epochs=range(2), workers=workers, preparation=preparation
        )
        for batch in batches:
            assert batch.places == list(range(batch_size))
            for sample, crop in zip(batch.sample_B.tolist(), batch.crops[0], strict=True):
                found[batch.epoch, sample] = crop
        return found

    alone = crops(12, 0)
    assert len(alone) == 96 and not torch.equal(alone[0, 3], alone[1, 3])
    for other in (crops(12, 2), crops(48, 0)):
        assert all(torch.equal(other[key], crop) for key, crop in alone.items())
