"""Images corrupted as they are read: the package's corruptions, the same in every process."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mimref.data.labels import Indices
from mimref.data.loader import crop_batches
from mimref.data.sources import ArraySource
from mimref.data.transforms import EvalTransform
from mimref.draws import Operation, seeded
from mimref.encoders.vit import Architecture
from mimref.errors import ConfigError
from mimref.transfer.robustness import corruptions
from mimref.transfer.robustness.corruptions import CORRUPTIONS, CorruptedSource, corrupt, corruption_package
from mimref.transfer.robustness.protocol import evaluate_robustness
from tests.test_transfer_robustness import config, values, write_classifier, write_noise

SIDE = 40
TRANSFORM = EvalTransform(SIDE)
ARCHITECTURE = Architecture("custom", SIDE, width=32, depth=2, num_heads=2, patch_size=8)


@pytest.fixture
def package() -> Any:
    return pytest.importorskip("imagecorruptions")


def source(count: int = 6) -> ArraySource:
    rng = np.random.default_rng(0)
    colours = rng.uniform(0, 200, (count, 3, 1, 1)) + rng.normal(0, 40, (count, 3, 52, 48)).cumsum(axis=3) / 3
    images = np.clip(colours, 0, 255).astype(np.uint8)
    labels: Indices = np.arange(count, dtype=np.int64) % 3
    return ArraySource("made", images, labels, ["a", "b", "c"], "val", np.arange(count))


def read(each: CorruptedSource, workers: int, batch_size: int) -> Tensor:
    uncut = EvalTransform(SIDE, 1.0)
    return torch.cat([batch.crops for batch in crop_batches(each, uncut, batch_size=batch_size, workers=workers)])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_crop_is_corrupted_by_the_package_alone(name: str, package: Any) -> None:
    images, severity = source(), 2
    made = read(CorruptedSource(images, TRANSFORM, name, severity, seed=5), workers=0, batch_size=4)
    for index in range(len(images)):
        crop = TRANSFORM.crop(images.read(index))
        with seeded(5, 5 * CORRUPTIONS.index(name) + severity, Operation.CORRUPTION, index) as seed:
            own = {"seed": seed} if name in ("impulse_noise", "glass_blur") else {}
            expected = package.corrupt(crop.permute(1, 2, 0).numpy(), severity, name, **own)
        assert np.array_equal(made[index].permute(1, 2, 0).numpy(), expected)
        assert not torch.equal(made[index], crop)


def test_the_cheap_ones_are_their_formulas(package: Any) -> None:
    crop = TRANSFORM.crop(source().read(0))
    image = crop.permute(1, 2, 0).numpy() / 255.0
    means = image.mean(axis=(0, 1))
    contrast = np.clip((image - means) * 0.3 + means, 0, 1) * 255
    assert np.array_equal(corrupt(crop, "contrast", 2, 0).permute(1, 2, 0).numpy(), np.uint8(contrast))
    np.random.seed(3)
    made = corrupt(crop, "gaussian_noise", 5, 0).permute(1, 2, 0).numpy()
    noise = np.random.RandomState(3).normal(size=image.shape, scale=0.38)
    assert np.array_equal(made, np.uint8(np.clip(image + noise, 0, 1) * 255))


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_compiled_glass_blur_is_the_loop_of_imagenet_c(severity: int, package: Any) -> None:
    """Source of the loop: hendrycks/robustness, ImageNet-C/create_c/make_imagenet_c.py."""
    from skimage.filters import gaussian

    crop = TRANSFORM.crop(source().read(1))
    sigma, reach, rounds = [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)][severity - 1]
    image = np.uint8(gaussian(crop.permute(1, 2, 0).numpy() / 255.0, sigma=sigma, channel_axis=-1) * 255)
    draws = np.random.RandomState(17)
    for _ in range(rounds):
        for row in range(SIDE - reach, reach, -1):
            for column in range(SIDE - reach, reach, -1):
                right, down = draws.randint(-reach, reach, size=2)
                # The reference intends a swap, but its pixels are views of one array: one overwrites the other.
                image[row, column] = image[row + down, column + right]
    expected = np.uint8(np.clip(gaussian(image / 255.0, sigma=sigma, channel_axis=-1), 0, 1) * 255)
    assert np.array_equal(corrupt(crop, "glass_blur", severity, 17).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("name", ["impulse_noise", "glass_blur", "frost", "motion_blur", "elastic_transform"])
def test_draws_do_not_depend_on_who_reads(name: str, package: Any) -> None:
    def made(severity: int = 3, seed: int = 0, workers: int = 0, batch_size: int = 6) -> Tensor:
        return read(CorruptedSource(source(), TRANSFORM, name, severity, seed), workers, batch_size)

    before = np.random.get_state()[1].copy()
    first = made()
    assert torch.equal(made(workers=2, batch_size=1), first) and torch.equal(made(batch_size=4), first)
    assert not torch.equal(made(seed=1), first) and not torch.equal(made(severity=4), first)
    assert np.array_equal(np.random.get_state()[1], before)
    same = ArraySource("same", source().images[[0, 0]], None, None, "val", np.arange(2))
    twice = read(CorruptedSource(same, TRANSFORM, name, 3, 0), 0, 2)
    assert not torch.equal(twice[0], twice[1])


def test_spatter_without_a_drop_leaves_the_image(package: Any) -> None:
    crop = torch.full((3, 32, 32), 90, dtype=torch.uint8)
    made = []
    for seed in range(200):
        np.random.seed(seed)
        made.append(corrupt(crop, "spatter", 1, 0))
    assert any(torch.equal(each, crop) for each in made) and not all(torch.equal(each, crop) for each in made)
    assert all(int(each.min()) >= 90 for each in made)  # water only brightens an image, and is never black


def test_own_images_are_corrupted_and_compared_with_the_clean_ones(package: Any, tmp_path: Path) -> None:
    write_classifier(tmp_path, architecture=ARCHITECTURE)
    write_noise(tmp_path / "clean", 0, per_class=4)
    given: dict[str, Any] = {"corrupt": "fog,contrast", "severities": [5, 1]}
    result = evaluate_robustness(config(tmp_path, **given))
    name = f"{tmp_path / 'clean'}, corrupted"
    (clean,) = values(result.rows, "clean_top1", set=str(tmp_path / "clean"))
    found = [
        values(result.rows, "robust_top1", set=name, corruption=each, severity=level)[0]
        for each in ("fog", "contrast")
        for level in (1, 5)
    ]
    common: dict[str, Any] = {"set": name, "corruptions": 2, "severities": "1,5"}
    assert values(result.rows, "robust_mean_top1", **common) == [pytest.approx(sum(found) / 4)]
    assert values(result.rows, "robust_drop", **common) == [pytest.approx(100 * (1 - sum(found) / 4 / clean))]
    assert evaluate_robustness(config(tmp_path, **given, workers=2)).rows == result.rows
    assert result.data is not None and result.data.spec == str(tmp_path / "clean")


def test_images_that_are_too_small(tmp_path: Path) -> None:
    write_classifier(tmp_path)
    write_noise(tmp_path / "clean", 0)
    with pytest.raises(ConfigError, match=r"32.*16.*--resolution"):
        evaluate_robustness(config(tmp_path, corrupt="15"))


@pytest.mark.parametrize("missing", ["the fork", "a library"])
def test_a_missing_package_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corruption_package.cache_clear()
    if missing == "a library":
        monkeypatch.setattr(corruptions, "version", lambda name: "1.1.5")
        monkeypatch.setitem(sys.modules, "cv2", None)
    else:
        from importlib.metadata import PackageNotFoundError

        def version(name: str) -> str:
            raise PackageNotFoundError(name)

        monkeypatch.setattr(corruptions, "version", version)
    with pytest.raises(ConfigError, match=r"mimref\[corruptions\]"):
        corruption_package()
