import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare, ks_2samp
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from mimref.config.run import ViewsConfig
from mimref.data import views as module
from mimref.data.transforms import IMAGENET_MEAN, IMAGENET_STD, PerChannel
from mimref.data.views import Photometric, gaussian_blur, shift_hue
from mimref.draws import Operation, uniform

CPU = torch.device("cpu")
OFF = ViewsConfig(
    flip=0.0,
    jitter_probability=0.0,
    gray_probability=0.0,
    solarize_probability=(0.0, 0.0, 0.0),
    blur_probability=(0.0, 0.0, 0.0),
)
NEVER, ALWAYS = 0.999, 0.0
NO_CHANGE = 0.5
# Seeds are fixed: a test that passes once always passes, and a wrong distribution misses this by orders of magnitude.
PLAUSIBLE = 1e-3

Values = Sequence[float]


def photographs(count: int, size: int) -> Tensor:
    """Noise, smooth colours, and pixels at the corners of the colour cube: (count, 3, size, size) uint8."""
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    images[:, :, : size // 2] = torch.randint(0, 256, (count, 3, 1, 1), dtype=torch.uint8, generator=generator)
    images[:, :, 0] = torch.randint(0, 2, (count, 3, size), dtype=torch.uint8, generator=generator) * 255
    images[:, :, 1] = images[:, :1, 1]  # gray
    return images


def close(got: Tensor, expected: Tensor, *, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def pin(monkeypatch: pytest.MonkeyPatch, draws: Mapping[Operation, Values]) -> None:
    """Give every sample the same draws."""

    def pinned(
        seed: int, epoch: int, operation: Operation, sample_N: Tensor, view_N: Tensor, *, count: int = 1
    ) -> Tensor:
        values = torch.tensor(draws.get(operation, [NEVER] * count))
        assert len(values) == count
        return values.expand(len(sample_N), count)

    monkeypatch.setattr(module, "uniform", pinned)


def augment(config: ViewsConfig, crops: Tensor, views: Sequence[int] = (0,), *, seed: int = 0) -> Tensor:
    """Views in [0, 1] of crops (B, V, 3, S, S) or, for one view, (B, 3, S, S)."""
    crops = crops[:, None] if crops.ndim == 4 else crops
    normalised = Photometric(config, seed, CPU)(crops, 0, torch.arange(len(crops)), views)
    return normalised * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)


def jitter_draw(factors: Values = (NO_CHANGE,) * 4, order: Values = (0.1, 0.2, 0.3, 0.4)) -> list[float]:
    return [ALWAYS, *factors, *order]


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("which", range(4))
def test_each_jitter_operation_is_torchvisions(monkeypatch: pytest.MonkeyPatch, which: int, draw: float) -> None:
    strength = 0.5 if which == 3 else 0.7
    jitter = tuple(strength if operation == which else 0.0 for operation in range(4))
    factors = [0.9] * 4  # no effect where the strength is zero
    factors[which] = draw
    pin(monkeypatch, {Operation.JITTER: jitter_draw(factors)})
    shift = (2 * draw - 1) * strength
    reference: Callable[[Tensor, float], Tensor] = [
        tvf.adjust_brightness,
        tvf.adjust_contrast,
        tvf.adjust_saturation,
        tvf.adjust_hue,
    ][which]
    crops = photographs(4, 12)
    got = augment(OFF.model_copy(update={"jitter_probability": 0.8, "jitter": jitter}), crops)[0]
    for row, image in enumerate(crops.float() / 255):
        expected = reference(image, shift if which == 3 else 1 + shift)
        close(got[row], expected)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 0, 1), (1, 3, 0, 2)])
def test_jitter_operations_run_in_the_drawn_order(monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]) -> None:
    rank = [0.0] * 4
    for slot, operation in enumerate(order):
        rank[operation] = 0.1 + 0.2 * slot
    pin(monkeypatch, {Operation.JITTER: jitter_draw((0.95, 0.05, 0.9, 0.85), rank)})
    crops = photographs(2, 8)
    got = augment(ViewsConfig(blur=False, flip=0.0), crops)[0]
    steps: list[Callable[[Tensor], Tensor]] = [
        lambda image: tvf.adjust_brightness(image, 1 + 0.4 * 0.9),
        lambda image: tvf.adjust_contrast(image, 1 - 0.4 * 0.9),
        lambda image: tvf.adjust_saturation(image, 1 + 0.2 * 0.8),
        lambda image: tvf.adjust_hue(image, 0.1 * 0.7),
    ]
    for row, image in enumerate(crops.float() / 255):
        for operation in order:
            image = steps[operation](image)
        close(got[row], image, atol=2e-5)


def test_every_order_of_jitter_is_equally_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2400
    done: list[list[int]] = [[] for _ in range(count)]

    def note(image: Tensor, rows: Tensor, *, operation: int, factor_N4111: Tensor) -> Tensor:
        for row in rows.tolist():
            done[row].append(operation)
        return image

    monkeypatch.setattr(module, "_adjust", note)
    augment(OFF.model_copy(update={"jitter_probability": 1.0}), torch.zeros(count, 3, 1, 1, dtype=torch.uint8))
    orders = Counter(map(tuple, done))
    assert set(orders) == set(itertools.permutations(range(4)))
    assert chisquare(list(orders.values())).pvalue > PLAUSIBLE


def test_jitter_factors_are_distributed_as_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2000
    kept: dict[int, Tensor] = {}

    def note(image: Tensor, rows: Tensor, *, operation: int, factor_N4111: Tensor) -> Tensor:
        kept[operation] = factor_N4111[:, operation].flatten()
        return image

    monkeypatch.setattr(module, "_adjust", note)
    for jitter in [(0.4, 0.4, 0.2, 0.1), (1.0, 0.8, 0.6, 0.5)]:
        config = OFF.model_copy(update={"jitter_probability": 1.0, "jitter": jitter})
        augment(config, torch.zeros(count, 3, 1, 1, dtype=torch.uint8))
        torch.manual_seed(0)
        reference = v2.ColorJitter(*jitter)
        drawn: list[dict[str, Any]] = [reference.make_params([]) for _ in range(count)]
        for operation, name in enumerate(["brightness", "contrast", "saturation", "hue"]):
            theirs = np.array([parameters[f"{name}_factor"] for parameters in drawn])
            assert ks_2samp(kept[operation].numpy(), theirs).pvalue > PLAUSIBLE, name
        pairs = np.corrcoef(torch.stack([kept[operation] for operation in range(4)]).numpy())
        assert np.abs(pairs - np.eye(4)).max() < 0.09  # four standard errors


def test_hue_of_gray_black_white_and_pure_colours() -> None:
    levels = torch.tensor([0.0, 1e-7, 0.25, 0.5, 1.0])
    grid = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 5, 25)
    for turns in [-0.5, -0.37, -1 / 6, -0.1, 0.0, 1e-4, 0.1, 1 / 3, 0.5]:
        got = shift_hue(grid, torch.full((1, 1, 1), turns))
        assert torch.isfinite(got).all()
        assert got.min() >= 0
        assert got.max() <= 1
        close(got, tvf.adjust_hue(grid, turns))
        gray = levels.view(1, 1, 1, 5).expand(1, 3, 1, 5)
        assert torch.equal(shift_hue(gray, torch.full((1, 1, 1), turns)), gray)


@pytest.mark.parametrize(("size", "taps"), [(96, 23), (23, 23), (22, 21), (3, 3)])
def test_blur_is_torchvisions(size: int, taps: int) -> None:
    images = photographs(4, size).float() / 255
    sigma = torch.tensor([0.1, 0.5, 1.3, 2.0])
    got = gaussian_blur(images, sigma)
    for row in range(4):
        expected = tvf.gaussian_blur(images[row], [taps, taps], [float(sigma[row])] * 2)
        close(got[row], expected)


@pytest.mark.parametrize("size", [1, 2])
def test_blur_leaves_images_without_room_for_a_kernel(size: int) -> None:
    images = torch.rand(2, 3, size, size)
    assert torch.equal(gaussian_blur(images, torch.tensor([0.1, 2.0])), images)


def test_the_rest_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    crops = photographs(3, 32)
    crops[:, :, 2, :3] = torch.tensor([127, 128, 129], dtype=torch.uint8)
    images = crops.float() / 255
    pin(monkeypatch, {})
    close(augment(ViewsConfig(), crops, [2])[0], images)
    pin(monkeypatch, {Operation.FLIP: [ALWAYS]})
    close(augment(ViewsConfig(), crops, [2])[0], tvf.horizontal_flip(images))
    pin(monkeypatch, {Operation.GRAY: [ALWAYS]})
    close(augment(ViewsConfig(), crops, [2])[0], tvf.rgb_to_grayscale(images, 3))
    pin(monkeypatch, {Operation.SOLARIZE: [ALWAYS]})
    close(augment(ViewsConfig(), crops, [1])[0], tvf.solarize(images, 128 / 255))
    # The threshold is the one that torchvision applies to bytes.
    as_bytes = tvf.solarize(crops, 128).float() / 255
    close(augment(ViewsConfig(), crops, [1])[0], as_bytes)
    pin(monkeypatch, {Operation.BLUR: [ALWAYS, 0.3]})
    sigma = 0.1 + 1.9 * 0.3
    close(augment(ViewsConfig(), crops, [2])[0], tvf.gaussian_blur(images, [23, 23], [sigma]))


def test_operations_follow_each_other_as_in_byol(monkeypatch: pytest.MonkeyPatch) -> None:
    pin(
        monkeypatch,
        {
            Operation.FLIP: [ALWAYS],
            Operation.JITTER: jitter_draw((0.9, 0.5, 0.8, 0.7)),
            Operation.BLUR: [ALWAYS, 0.5],
            Operation.GRAY: [ALWAYS],
            Operation.SOLARIZE: [ALWAYS],
        },
    )
    crops = photographs(2, 24)
    image = tvf.horizontal_flip(crops.float() / 255)
    image = tvf.adjust_brightness(image, 1 + 0.4 * 0.8)
    image = tvf.adjust_saturation(image, 1 + 0.2 * 0.6)
    image = tvf.adjust_hue(image, 0.1 * 0.4)
    image = tvf.gaussian_blur(image, [23, 23], [0.1 + 1.9 * 0.5])
    image = tvf.solarize(tvf.rgb_to_grayscale(image, 3), 128 / 255)
    close(augment(ViewsConfig(), crops, [1])[0], image, atol=2e-5)


# Each operation alone, at its default settings, and its probability in views 0, 1, 2 and 5.
_ONLY: dict[str, dict[str, Any]] = {
    "flip": {"flip": 0.5},
    "jitter": {"jitter_probability": 0.8},
    "gray": {"gray_probability": 0.2},
    "solarize": {"solarize_probability": (0.0, 0.2, 0.0)},
    "blur": {"blur_probability": (1.0, 0.1, 0.5)},
}
_EXPECTED = {
    "flip": (0.5, 0.5, 0.5, 0.5),
    "jitter": (0.8, 0.8, 0.8, 0.8),
    "gray": (0.2, 0.2, 0.2, 0.2),
    "solarize": (0.0, 0.2, 0.0, 0.0),
    "blur": (1.0, 0.1, 0.5, 0.5),
}


@pytest.mark.parametrize("operation", list(_ONLY))
def test_probabilities_by_view(operation: str) -> None:
    count = 1000
    assert all(getattr(ViewsConfig(), name) == value for name, value in _ONLY[operation].items())
    crops = photographs(1, 4).expand(count, 4, -1, -1, -1)
    config = OFF.model_copy(update={**_ONLY[operation], "blur_sigma": (1.0, 2.0)})
    views = augment(config, crops, [0, 1, 2, 5])
    changed = (views - crops[0, 0].float() / 255).abs().amax(dim=(2, 3, 4)) > 1e-3
    for view, probability in enumerate(_EXPECTED[operation]):
        number = int(changed[view].sum())
        if probability in (0.0, 1.0):
            assert number == probability * count
        else:
            assert binomtest(number, count, probability).pvalue > PLAUSIBLE
    if operation != "solarize":
        assert not torch.equal(changed[2], changed[3])


def test_operations_are_drawn_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 4000
    drawn: dict[Operation, Tensor] = {}

    def note(seed: int, epoch: int, operation: Operation, *args: Any, **kwargs: Any) -> Tensor:
        drawn[operation] = uniform(seed, epoch, operation, *args, **kwargs)
        return drawn[operation]

    monkeypatch.setattr(module, "uniform", note)
    augment(ViewsConfig(), torch.zeros(count, 3, 1, 1, dtype=torch.uint8))
    assert set(drawn) == {Operation.FLIP, Operation.JITTER, Operation.BLUR, Operation.GRAY, Operation.SOLARIZE}
    columns = torch.cat([drawn[operation] for operation in sorted(drawn)], dim=1).T
    assert len(columns) == 14
    assert (torch.corrcoef(columns) - torch.eye(14)).abs().max() < 0.065  # four standard errors


def test_blur_sigma_is_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []

    def note(image: Tensor, sigma: Tensor) -> Tensor:
        kept.append(sigma)
        return image

    monkeypatch.setattr(module, "gaussian_blur", note)
    augment(ViewsConfig(), torch.zeros(2000, 3, 1, 1, dtype=torch.uint8))
    torch.manual_seed(0)
    reference = v2.GaussianBlur(23, (0.1, 2.0))
    theirs = [reference.make_params([])["sigma"][0] for _ in range(2000)]
    assert ks_2samp(kept[0].numpy(), theirs).pvalue > PLAUSIBLE


@pytest.mark.parametrize("draw", [0.0, 0.1])
def test_toggles_remove_exactly_their_operations(monkeypatch: pytest.MonkeyPatch, draw: float) -> None:
    colours = {
        Operation.JITTER: [draw, *(0.9,) * 4, 0.1, 0.2, 0.3, 0.4],
        Operation.GRAY: [draw],
        Operation.SOLARIZE: [draw],
    }
    rest = {Operation.FLIP: [draw], Operation.BLUR: [draw * 0.9, 0.4]}
    crops = photographs(3, 16)
    pin(monkeypatch, rest)
    colourless = augment(ViewsConfig(), crops, [1])
    pin(monkeypatch, {**colours, Operation.FLIP: [draw]})
    unblurred = augment(ViewsConfig(), crops, [1])
    pin(monkeypatch, {Operation.FLIP: [draw]})
    flipped = augment(ViewsConfig(), crops, [1])
    pin(monkeypatch, {**colours, **rest})
    everything = augment(ViewsConfig(), crops, [1])
    assert torch.equal(augment(ViewsConfig(color=False), crops, [1]), colourless)
    assert torch.equal(augment(ViewsConfig(blur=False), crops, [1]), unblurred)
    assert torch.equal(augment(ViewsConfig(color=False, blur=False), crops, [1]), flipped)
    assert not torch.equal(everything, colourless)
    assert not torch.equal(everything, unblurred)
    assert not torch.equal(colourless, flipped)


@pytest.mark.parametrize("statistics", [{}, {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}])
def test_layout_and_normalisation(statistics: dict[str, PerChannel]) -> None:
    crops = torch.stack([photographs(5, 8), photographs(5, 8).flip(0)], dim=1)
    before = crops.clone()
    got = Photometric(OFF, 0, CPU, **statistics)(crops, 0, torch.arange(5), [4, 9])
    assert got.shape == (2, 5, 3, 8, 8)
    assert got.dtype == torch.float32
    assert torch.equal(crops, before)
    reference = v2.Normalize(statistics.get("mean", IMAGENET_MEAN), statistics.get("std", IMAGENET_STD))
    for view in range(2):
        for row in range(5):
            expected = reference(crops[row, view].float() / 255)
            close(got[view, row], expected, atol=1e-6)


@pytest.mark.parametrize(("size", "jitter"), [(8, (1.0, 1.0, 1.0, 0.5))])
def test_a_batch_equals_its_samples_one_by_one(size: int, jitter: tuple[float, float, float, float]) -> None:
    crops = torch.stack([photographs(12, size), photographs(12, size).flip(0)], dim=1)
    sample_B = torch.arange(12) * 7
    apply = Photometric(ViewsConfig(jitter=jitter, solarize_probability=(0.3, 0.3, 0.3)), 5, CPU)
    for views in ([0, 1], [3, 8]):
        together = apply(crops, 2, sample_B, views)
        for row in range(12):
            for column, view in enumerate(views):
                alone = apply(crops[row : row + 1, column : column + 1], 2, sample_B[row : row + 1], [view])
                close(alone[0, 0], together[column, row])


def test_colours_depend_on_seed_epoch_sample_and_view() -> None:
    crops = photographs(1, 8).expand(20, 1, -1, -1, -1)
    config = ViewsConfig(jitter_probability=1.0)
    sample_B = torch.arange(20)
    base = Photometric(config, 0, CPU)(crops, 0, sample_B, [2])[0]
    assert torch.equal(Photometric(config, 0, CPU)(crops, 0, sample_B, [2])[0], base)
    for other in (
        Photometric(config, 1, CPU)(crops, 0, sample_B, [2])[0],
        Photometric(config, 0, CPU)(crops, 1, sample_B, [2])[0],
        Photometric(config, 0, CPU)(crops, 0, sample_B + 20, [2])[0],
        Photometric(config, 0, CPU)(crops, 0, sample_B, [3])[0],
        base.roll(1, 0),
    ):
        assert ((other - base).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


def test_gray_images_keep_their_gray() -> None:
    digits = torch.randint(0, 256, (40, 1, 1, 8, 8), dtype=torch.uint8).expand(-1, 2, 3, -1, -1)
    got = augment(ViewsConfig(jitter=(0.4, 0.4, 1.0, 0.5)), digits, [0, 1])
    assert torch.isfinite(got).all()
    assert (got.amax(dim=2) - got.amin(dim=2)).max() < 1e-5
    assert got.min() > -1e-6
    assert got.max() < 1 + 1e-6


def test_no_strength_no_jitter() -> None:
    crops = photographs(20, 8)
    still = OFF.model_copy(update={"jitter_probability": 1.0, "jitter": (0.0, 0.0, 0.0, 0.0)})
    assert torch.equal(augment(still, crops), augment(OFF, crops))


def test_batch_of_none() -> None:
    assert augment(ViewsConfig(), torch.empty(0, 2, 3, 8, 8, dtype=torch.uint8), [0, 1]).shape == (2, 0, 3, 8, 8)


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    crops = torch.stack([photographs(64, 96), photographs(64, 96).flip(0)], dim=1)
    sample_B = torch.arange(64)
    for views in ([0, 1], [3, 8]):
        on_cpu = Photometric(ViewsConfig(), 0, CPU)(crops, 0, sample_B, views)
        on_cuda = Photometric(ViewsConfig(), 0, torch.device("cuda"))(crops, 0, sample_B, views).cpu()
        # Solarize inverts values that round to the other side of its threshold.
        far = (on_cpu - on_cuda).abs() > 1e-4
        assert far.double().mean() < 1e-4
