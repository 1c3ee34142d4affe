"""How fast views are made, against torchvision's pipelines with the same views, measured in the same run."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import ModuleType

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import v2

from mimref.benchmarks.measure import Ticks, median_seconds
from mimref.config.run import ViewsConfig
from mimref.data.loader import ViewBatch, view_batches
from mimref.data.sources import FileSource
from mimref.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from mimref.data.views import CropGroup, Photometric, multi_crop
from mimref.devices import resolve_device
from mimref.progress import Progress
from mimref.refinement.method import views_of
from mimref.results import Row

PIL = "torchvision, PIL"
PIL_BLUR = "torchvision, PIL with Pillow's blur"
TENSORS = "torchvision v2, uint8 tensors"
WORKER = "mimref, worker's part"
WHOLE = "mimref, all on the CPU"
DEVICE = "mimref, photometric part"

_JPEG_QUALITY = 90
_BLUR_TAPS = 23  # as in BYOL, and in `mimref.data.views`

_Way = Callable[[int], list[Tensor]]
"""Makes the views of an epoch, each (..., 3, S, S)."""


@dataclass(frozen=True)
class ViewSizes:
    """What is measured; the defaults are the paper's 12 views, and take about 20 seconds on one CPU thread."""

    width: int = 500
    """Of the JPEG files in pixels, which are scikit-learn's two photographs; 500 x 375 is usual in ImageNet."""
    height: int = 375
    global_size: int = 224
    local_views: int = 10
    local_size: int = 96
    images: int = 32
    """Per measurement of a CPU pipeline."""
    device_images: int = 256
    """Per measurement of the photometric part on a device."""
    repeats: int = 5
    """Measurements of each pipeline, taken in turns after one that does not count."""


def benchmark_views(
    *, sizes: ViewSizes | None = None, device: str = "cpu", progress: Progress | None = None
) -> list[Row]:
    """Images per second (`value`) and milliseconds per image (`ms`) of every pipeline, medians, on one CPU thread.

    PIL: torchvision's transforms on PIL images, from the file to normalised tensors. PIL_BLUR: the same with Pillow's
    faster blur, which approximates the Gaussian. TENSORS: torchvision's v2 transforms on decoded uint8 tensors. WORKER:
    what a loader process does here, from the file to a batch of uint8 crops. WHOLE: that and the photometric part, on
    the CPU. DEVICE, unless `device` is the CPU: the photometric part there, of crops that have arrived. Stacking the
    views of a batch counts here and not for torchvision. `ratio` and `ratio_pillow_blur`: images per second over those
    of PIL and PIL_BLUR. The number of threads and the state of torch's generator are restored.
    """
    sizes = sizes or ViewSizes()
    target = resolve_device(device)
    config = ViewsConfig(local_views=sizes.local_views, local_size=sizes.local_size)
    groups = multi_crop(config, sizes.global_size)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_num_threads(1)  # as loader processes have
        try:
            source = _photographs(folder, sizes)
            ways = _pipelines(source, groups, config)
            if target.type != "cpu":
                ways[DEVICE] = _on_device(_crops(source, groups, 0), config, target, sizes.device_images)
            # Every call cuts other crops.
            calls = [partial(lambda way, epochs: way(next(epochs)), way, count()) for way in ways.values()]
            tick = Ticks(progress, len(calls) * (sizes.repeats + 1))
            seconds = median_seconds(calls, torch.device("cpu"), turns=sizes.repeats, tick=tick)
        finally:
            torch.set_num_threads(threads)
    images = {name: sizes.device_images if name == DEVICE else sizes.images for name in ways}
    per_s = {name: images[name] / seconds_each for name, seconds_each in zip(ways, seconds, strict=True)}
    rows: list[Row] = []
    for name, value in per_s.items():
        row: Row = {"metric": "benchmark_views", "value": value, "pipeline": name}
        row |= {"device": str(target) if name == DEVICE else "cpu", "ms": 1000 / value}
        row |= {"ratio": value / per_s[PIL], "ratio_pillow_blur": value / per_s[PIL_BLUR]}
        row |= {"views": 2 + sizes.local_views, "width": sizes.width, "height": sizes.height}
        rows.append(row | {"images": images[name], "repeats": sizes.repeats})
    return rows


def _photographs(folder: str, sizes: ViewSizes) -> FileSource:
    from sklearn.datasets import load_sample_images

    photographs = [
        Image.fromarray(np.asarray(pixels)).resize((sizes.width, sizes.height), Image.Resampling.BICUBIC)
        for pixels in load_sample_images().images
    ]
    files = [f"{number}.jpg" for number in range(sizes.images)]
    for number, file in enumerate(files):
        photographs[number % len(photographs)].save(os.path.join(folder, file), quality=_JPEG_QUALITY)
    return FileSource("photographs", folder, files, None, None)


def _pipelines(source: FileSource, groups: Sequence[CropGroup], config: ViewsConfig) -> dict[str, _Way]:
    """Ways to the views of all images on the CPU, by name."""
    paths = [source.path(index) for index in range(len(source))]
    photometric = Photometric(config, 0, torch.device("cpu"))

    def pil(blur: Callable[[Image.Image], Image.Image] | None) -> _Way:
        views = _augmentations(groups, config, transforms, transforms.ToTensor(), blur)
        return lambda _: [view(image) for image in map(pil_loader, paths) for view in views]

    def tensors(_: int) -> list[Tensor]:
        images = (v2.functional.pil_to_tensor(pil_loader(path)) for path in paths)
        return [view(image) for image in images for view in tensor_views]

    tensor_views = _augmentations(groups, config, v2, v2.ToDtype(torch.float32, scale=True))
    return {
        PIL: pil(None),
        PIL_BLUR: pil(_pillow_blur),
        TENSORS: tensors,
        WORKER: lambda epoch: _crops(source, groups, epoch).crops,
        WHOLE: lambda epoch: views_of(_crops(source, groups, epoch), photometric),
    }


def _augmentations(
    groups: Sequence[CropGroup],
    config: ViewsConfig,
    library: ModuleType,
    to_tensor: Callable[..., Tensor],
    blur: Callable[[Image.Image], Image.Image] | None = None,
) -> list[Callable[..., Tensor]]:
    """BYOL's augmentations of every view by torchvision's transforms v1 or v2; blur: in place of the library's."""
    views = []
    bicubic = library.InterpolationMode.BICUBIC
    for view, group in enumerate(own for own in groups for _ in range(own.count)):
        kind = min(view, 2)
        taps = min(_BLUR_TAPS, 2 * ((group.size - 1) // 2) + 1)
        own_blur = blur or library.GaussianBlur(taps, config.blur_sigma)
        steps = [
            library.RandomResizedCrop(group.size, group.scale, config.aspect_ratio, interpolation=bicubic),
            library.RandomHorizontalFlip(config.flip),
            library.RandomApply([library.ColorJitter(*config.jitter)], config.jitter_probability),
            library.RandomApply([own_blur], config.blur_probability[kind]),
            library.RandomGrayscale(config.gray_probability),
            library.RandomSolarize(128, config.solarize_probability[kind]),
            to_tensor,
            library.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
        views.append(library.Compose(steps))
    return views


def _pillow_blur(image: Image.Image) -> Image.Image:
    """As many self-supervised pipelines blur: three box filters, whose time does not depend on the width."""
    low, high = ViewsConfig().blur_sigma
    return image.filter(ImageFilter.GaussianBlur(low + (high - low) * float(torch.rand(()))))


def _crops(source: FileSource, groups: Sequence[CropGroup], epoch: int) -> ViewBatch:
    """All images in one batch, as training reads them; every epoch has other crops."""
    epochs = range(epoch, epoch + 1)
    return next(view_batches(source, groups, batch_size=len(source), seed=0, epochs=epochs, reduce_jpeg=True))


def _on_device(batch: ViewBatch, config: ViewsConfig, device: torch.device, images: int) -> _Way:
    """The photometric part of `images` images whose crops, those of `batch`, are on the device already."""
    sample_B = torch.arange(images)
    crops = [of_size[sample_B % len(of_size)].to(device) for of_size in batch.crops]
    photometric = Photometric(config, 0, device)

    def way(epoch: int) -> list[Tensor]:
        views = views_of(ViewBatch(epoch, sample_B, crops, []), photometric)
        float(views[-1].sum())  # waits for the device
        return views

    return way
