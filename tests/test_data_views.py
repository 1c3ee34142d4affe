import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import ks_2samp, kstest
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tvf

from mimref.config.run import ViewsConfig
from mimref.data.decode import Decoded
from mimref.data.views import CropGroup, cut_group, draw_boxes, multi_crop, reduction

GLOBAL = CropGroup(2, 32, (0.25, 1.0))
LOCAL = CropGroup(3, 16, (0.05, 0.25), first_view=2)

# Seeds are fixed: a test that passes once always passes, and a wrong distribution misses this by orders of magnitude.
PLAUSIBLE = 1e-3


def noise(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def boxes_of(group: CropGroup, height: int, width: int, count: int, *, view: int = 0) -> NDArray[np.int64]:
    size_B2 = torch.tensor([[height, width]]).expand(count, 2)
    return draw_boxes(group, view, 0, 0, torch.arange(count), size_B2).numpy()


def torchvision_boxes(group: CropGroup, height: int, width: int, count: int) -> NDArray[np.int64]:
    torch.manual_seed(0)
    crop = RandomResizedCrop(group.size, scale=group.scale, ratio=group.aspect_ratio)
    # An expanded view of one value: only its size matters.
    image = torch.empty(1).expand(3, height, width)
    drawn = (crop.make_params([image]) for _ in range(count))
    return np.array([[box["top"], box["left"], box["height"], box["width"]] for box in drawn])


def relative(boxes: NDArray[np.int64], height: int, width: int) -> dict[str, NDArray[np.float64]]:
    top, left, tall, wide = boxes.T.astype(np.float64)
    return {
        "area": tall * wide / (height * width),
        "log_aspect": np.log(wide / tall),
        "top": top,
        "left": left,
        "height": tall,
        "width": wide,
        "relative_top": top / np.maximum(1, height - tall),
        "relative_left": left / np.maximum(1, width - wide),
    }


@pytest.mark.parametrize("group", [GLOBAL, LOCAL], ids=["global", "local"])
@pytest.mark.parametrize(("height", "width"), [(256, 256), (100, 400), (8, 8)])
def test_boxes_are_distributed_as_torchvisions(group: CropGroup, height: int, width: int) -> None:
    ours = relative(boxes_of(group, height, width, 3000), height, width)
    theirs = relative(torchvision_boxes(group, height, width, 1500), height, width)
    for name, values in ours.items():
        assert ks_2samp(values, theirs[name]).pvalue > PLAUSIBLE, name


def test_area_and_aspect_are_uniform_where_every_draw_fits() -> None:
    boxes = boxes_of(CropGroup(1, 16, (0.05, 0.25)), 10_000, 10_000, 4000)
    drawn = relative(boxes, 10_000, 10_000)
    assert kstest((drawn["area"] - 0.05) / 0.2, "uniform").pvalue > PLAUSIBLE
    low, high = math.log(3 / 4), math.log(4 / 3)
    assert kstest((drawn["log_aspect"] - low) / (high - low), "uniform").pvalue > PLAUSIBLE
    assert kstest(drawn["relative_top"], "uniform").pvalue > PLAUSIBLE
    assert kstest(drawn["relative_left"], "uniform").pvalue > PLAUSIBLE
    pairs = np.corrcoef(np.stack([drawn[name] for name in ("area", "log_aspect", "relative_top", "relative_left")]))
    assert np.abs(pairs - np.eye(4)).max() < 0.06  # about four standard errors


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (2, 7), (30, 2000), (65, 64)])
@pytest.mark.parametrize("aspect", [(3 / 4, 4 / 3), (3.0, 5.0)])
def test_boxes_lie_inside_and_hold_a_pixel(height: int, width: int, aspect: tuple[float, float]) -> None:
    for scale in [(1e-6, 1e-3), (0.05, 0.25), (1.0, 1.0)]:
        top, left, tall, wide = boxes_of(CropGroup(1, 16, scale, aspect), height, width, 300).T
        assert (tall >= 1).all()
        assert (wide >= 1).all()
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + tall <= height).all()
        assert (left + wide <= width).all()


@pytest.mark.parametrize(("height", "width"), [(10, 97), (10, 98), (97, 10), (1, 50), (51, 1)])
def test_fallback_is_torchvisions_central_crop(height: int, width: int) -> None:
    # No crop of the whole area fits, so every draw ends in the fallback; odd margins distinguish floor from rounding.
    group = CropGroup(1, 16, (1.0, 1.0))
    expected = torchvision_boxes(group, height, width, 1)[0]
    assert (boxes_of(group, height, width, 20) == expected).all()


def test_whole_image_where_its_aspect_ratio_is_allowed() -> None:
    group = CropGroup(1, 16, (5.0, 6.0))  # areas that never fit
    assert (boxes_of(group, 30, 35, 5) == [0, 0, 30, 35]).all()
    assert (torchvision_boxes(group, 30, 35, 1) == [0, 0, 30, 35]).all()


def test_a_box_depends_on_its_sample_alone() -> None:
    sample_B = torch.tensor([5, 900, 17, 0, 31])
    size_B2 = torch.tensor([[30, 40], [100, 20], [64, 64], [8, 8], [1, 9]])
    together = draw_boxes(LOCAL, 1, 7, 3, sample_B, size_B2)
    for row in range(5):
        alone = draw_boxes(LOCAL, 1, 7, 3, sample_B[row : row + 1], size_B2[row : row + 1])
        assert torch.equal(alone[0], together[row])
    turned = draw_boxes(LOCAL, 1, 7, 3, sample_B.flip(0), size_B2.flip(0))
    assert torch.equal(turned.flip(0), together)


def test_views_epochs_seeds_and_samples_have_their_own_boxes() -> None:
    sample_B, size_B2 = torch.arange(50), torch.tensor([[500, 500]]).expand(50, 2)
    base = draw_boxes(LOCAL, 0, 0, 0, sample_B, size_B2)
    others = [
        draw_boxes(LOCAL, 1, 0, 0, sample_B, size_B2),
        draw_boxes(LOCAL, 0, 1, 0, sample_B, size_B2),
        draw_boxes(LOCAL, 0, 0, 1, sample_B, size_B2),
        draw_boxes(LOCAL, 0, 0, 0, sample_B + 50, size_B2),
    ]
    for other in others:
        assert (other != base).any(dim=1).all()
    # View 0 of the local crops is view 2 of the image.
    shifted = CropGroup(1, 16, LOCAL.scale)
    assert torch.equal(draw_boxes(shifted, 2, 0, 0, sample_B, size_B2), base)
    assert not torch.equal(draw_boxes(shifted, 0, 0, 0, sample_B, size_B2), base)


@pytest.mark.parametrize("group", [GLOBAL, LOCAL], ids=["global", "local"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_crops_are_torchvisions_resized_crop(group: CropGroup, channels_last: bool) -> None:
    images = [noise(*size) for size in [(48, 64), (8, 8), (100, 31), (1, 40), (40, 1), (1, 1), (16, 16), (300, 17)]]
    expected = images
    if channels_last:
        images = [image[None].contiguous(memory_format=torch.channels_last)[0] for image in images]
    sample_B = torch.arange(len(images)) + 11
    decoded = [Decoded(image, *image.shape[1:]) for image in images]
    cut = cut_group(decoded, group, 4, 2, sample_B)
    assert cut.shape == (len(images), group.count, 3, group.size, group.size)
    assert cut.dtype == torch.uint8
    size_B2 = torch.tensor([image.shape[1:] for image in images])
    for view in range(group.count):
        boxes = draw_boxes(group, view, 4, 2, sample_B, size_B2).tolist()
        for row, image in enumerate(expected):
            crop = tvf.resized_crop(
                image, *boxes[row], size=[group.size] * 2, interpolation=InterpolationMode.BICUBIC, antialias=True
            )
            assert torch.equal(cut[row, view], crop), (view, image.shape)


def test_boxes_of_many_views_are_those_of_one_after_the_other() -> None:
    sample_B, size_B2 = torch.tensor([5, 900, 17]), torch.tensor([[30, 40], [100, 20], [64, 64]])
    view_N = torch.arange(3).repeat_interleave(3)
    together = draw_boxes(LOCAL, view_N, 7, 3, sample_B.repeat(3), size_B2.repeat(3, 1))
    alone = [draw_boxes(LOCAL, view, 7, 3, sample_B, size_B2) for view in range(3)]
    assert torch.equal(together, torch.cat(alone))


def largest_factor(groups: list[CropGroup], sample: int, height: int, width: int) -> int:
    """The largest allowed factor by plain loops: every factor against both sides of every crop."""
    size_12, allowed = torch.tensor([[height, width]]), [1]
    for factor in (2, 4, 8):
        sides = [
            side >= factor * group.size
            for group in groups
            for view in range(group.count)
            for side in draw_boxes(group, view, 4, 2, torch.tensor([sample]), size_12)[0, 2:].tolist()
        ]
        if all(sides):
            allowed.append(factor)
    return max(allowed)


def test_images_are_reduced_as_far_as_no_crop_is_enlarged() -> None:
    groups = [CropGroup(2, 24, (0.25, 1.0)), CropGroup(3, 10, (0.05, 0.25), first_view=2)]
    rng = np.random.default_rng(0)
    found = []
    for sample in range(60):
        height, width = (int(side) for side in rng.integers(40, 900, 2))
        found.append(reduction(groups, 4, 2, sample, height, width))
        assert found[-1] == largest_factor(groups, sample, height, width), (height, width)
    assert set(found) == {1, 2, 4, 8}
    # A single pixel of the side decides.
    whole = [CropGroup(1, 24, (1.0, 1.0), (1.0, 1.0))]
    assert [reduction(whole, 0, 0, 0, side, side) for side in (1, 47, 48, 95, 96, 191, 192, 5000)] == [
        1, 1, 2, 2, 4, 4, 8, 8,
    ]  # fmt: skip


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_boxes_on_a_reduced_image_show_the_same_and_are_not_enlarged(factor: int) -> None:
    group = CropGroup(4, 8, (0.05, 1.0))
    for sample in range(20):
        height, width = 300 + 7 * sample, 555 - 5 * sample
        small = noise(-(-height // factor), -(-width // factor))
        size_12, sample_1 = torch.tensor([[height, width]]), torch.tensor([sample])
        cut = cut_group([Decoded(small, height, width)], group, 4, 2, sample_1)
        for view in range(group.count):
            box = draw_boxes(group, view, 4, 2, sample_1, size_12)[0].tolist()
            edges = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
            ratios = [small.shape[1] / height, small.shape[2] / width] * 2
            top, left, bottom, right = (
                math.floor(edge * ratio + 0.5) for edge, ratio in zip(edges, ratios, strict=True)
            )
            assert bottom - top >= box[2] // factor
            assert right - left >= box[3] // factor
            assert bottom <= small.shape[1]
            assert right <= small.shape[2]
            crop = small[:, top:bottom, left:right]
            expected = tvf.resize(crop, [8, 8], interpolation=InterpolationMode.BICUBIC, antialias=True)
            assert torch.equal(cut[0, view], expected)


def test_groups_follow_the_settings() -> None:
    config = ViewsConfig()
    assert multi_crop(config, 224) == [
        CropGroup(2, 224, (0.25, 1.0), (3 / 4, 4 / 3), first_view=0),
        CropGroup(10, 96, (0.05, 0.25), (3 / 4, 4 / 3), first_view=2),
    ]
    small = ViewsConfig(global_size=32, global_scale=(0.08, 1.0), local_views=0, aspect_ratio=(1.0, 1.0))
    assert multi_crop(small, 224) == [CropGroup(2, 32, (0.08, 1.0), (1.0, 1.0))]
