"""Speed of making views, compared in the same run with other libraries' pipelines for the same views."""

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

from mimref.benchmarks.libraries import BLUR_TAPS, DALI, KORNIA, Way, library_ways
from mimref.benchmarks.measure import Ticks, median_seconds
from mimref.config.base import DataConfig
from mimref.config.run import ViewsConfig
from mimref.data.device_crops import decoding_device
from mimref.data.jpegs import jpegs_of, pack, read_jpeg
from mimref.data.loader import ViewBatch, view_batches
from mimref.data.sources import FileSource
from mimref.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from mimref.data.views import CropGroup, Photometric, multi_crop, reduction, view_windows
from mimref.devices import resolve_device
from mimref.errors import ConfigError
from mimref.progress import Progress
from mimref.refinement.method import views_of
from mimref.results import Row

PIL = "torchvision, PIL"
PIL_BLUR = "torchvision, PIL with Pillow's blur"
TENSORS = "torchvision v2, uint8 tensors"
WORKER = "mimref, worker's part"
WHOLE = "mimref, all on the CPU"
READER = "mimref, worker's part of data.decode=device"
DEVICE = "mimref, photometric part"
DECODED = "mimref, JPEGs decoded on the device"

_JPEG_QUALITY = 90


@dataclass(frozen=True)
class ViewSizes:
    """Sizes to measure; the defaults are the paper's 12 views and take about 20 seconds on one CPU thread."""

    width: int = 500
    """Width in pixels of the JPEG files, which are scikit-learn's two photographs; 500 x 375 is usual in ImageNet."""
    height: int = 375
    global_size: int = 224
    local_views: int = 10
    local_size: int = 96
    images: int = 32
    """Images per measurement of a CPU pipeline."""
    device_images: int = 256
    """Images per measurement of the photometric part on a device."""
    repeats: int = 5
    """Measurements of each pipeline, taken in turns after one warm-up."""


def benchmark_views(
    *,
    sizes: ViewSizes | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure images per second (`value`) and ms per image (`ms`) of every pipeline, as medians, on one CPU thread.

    PIL: torchvision's transforms on PIL images, from the file to normalised tensors. PIL_BLUR: the same with Pillow's
    faster blur, which approximates the Gaussian. TENSORS: torchvision's v2 transforms on decoded uint8 tensors. WORKER:
    the work of a mimref loader process, from the file to a batch of uint8 crops. WHOLE: WORKER and the photometric
    part, on the CPU. READER: the work of a loader process when a device decodes, from the file to its bytes and the
    boxes of its crops. KORNIA and DALI: also from the file, if installed; if not, `note` is called with the reason.
    DEVICE, unless `device` is the CPU: the photometric part on the device, of crops already there. DECODED, on CUDA:
    everything from the file, decoded and cropped on the device; `difference` and `largest_difference` are the mean and
    largest difference of its crops from WORKER's, in levels of 255. Stacking the views of a batch is not counted for
    torchvision. `ratio` and `ratio_pillow_blur`: images per second relative to PIL and PIL_BLUR. The number of threads
    and the state of torch's generator are restored.
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
            source = photographs(folder, sizes)
            ways, apart = _ways(source, groups, config, target, sizes.device_images, note)
            # Every call cuts different crops.
            calls = [partial(lambda way, epochs: way(next(epochs)), way, count()) for way in ways.values()]
            tick = Ticks(progress, len(calls) * (sizes.repeats + 1))
            seconds = median_seconds(calls, torch.device("cpu"), turns=sizes.repeats, tick=tick)
        finally:
            torch.set_num_threads(threads)
    images = {name: sizes.device_images if name == DEVICE else sizes.images for name in ways}
    per_s = {name: images[name] / seconds_each for name, seconds_each in zip(ways, seconds, strict=True)}
    on_device = {DEVICE, DECODED, KORNIA} | ({DALI} if target.type == "cuda" else set())
    rows: list[Row] = []
    for name, value in per_s.items():
        row: Row = {"metric": "benchmark_views", "value": value, "pipeline": name}
        row |= {"device": str(target) if name in on_device else "cpu", "ms": 1000 / value}
        row |= {"ratio": value / per_s[PIL], "ratio_pillow_blur": value / per_s[PIL_BLUR]}
        row |= {"views": 2 + sizes.local_views, "width": sizes.width, "height": sizes.height}
        row |= {"images": images[name], "repeats": sizes.repeats}
        row |= apart if name == DECODED else {}
        rows.append(row)
    return rows


def _ways(
    source: FileSource,
    groups: Sequence[CropGroup],
    config: ViewsConfig,
    device: torch.device,
    device_images: int,
    note: Callable[[str], None],
) -> tuple[dict[str, Way], Row]:
    """Return all pipelines to measure, and how far DECODED's crops differ from WORKER's."""
    ways = _pipelines(source, groups, config)
    others, missing = library_ways([source.path(index) for index in range(len(source))], groups, config, device)
    ways |= others
    apart: Row = {}
    if device.type != "cpu":
        ways[DEVICE] = _on_device(_crops(source, groups, 0), config, device, device_images)
    if device.type == "cuda":
        try:
            decoding_device(DataConfig(decode="device"), device)
            ways[DECODED] = _decoded(source, groups, config, device)
            apart = _differences(_crops(source, groups, 0), _crops(source, groups, 0, device))
        except ConfigError as error:
            missing.append(f"not measured: {DECODED}: {error}")
    for line in missing:
        note(line)
    return ways, apart


def photographs(folder: str, sizes: ViewSizes) -> FileSource:
    """Write scikit-learn's two photographs as JPEG files of the size to measure."""
    from sklearn.datasets import load_sample_images

    photographs = [
        Image.fromarray(np.asarray(pixels)).resize((sizes.width, sizes.height), Image.Resampling.BICUBIC)
        for pixels in load_sample_images().images
    ]
    files = [f"{number}.jpg" for number in range(sizes.images)]
    for number, file in enumerate(files):
        photographs[number % len(photographs)].save(os.path.join(folder, file), quality=_JPEG_QUALITY)
    return FileSource("photographs", folder, files, None, None)


def _pipelines(source: FileSource, groups: Sequence[CropGroup], config: ViewsConfig) -> dict[str, Way]:
    """Return the CPU pipelines that make the views of all images, by name."""
    paths = [source.path(index) for index in range(len(source))]
    photometric = Photometric(config, 0, torch.device("cpu"))

    def pil(blur: Callable[[Image.Image], Image.Image] | None) -> Way:
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
        READER: lambda epoch: [_read(source, groups, epoch)],
    }


def _augmentations(
    groups: Sequence[CropGroup],
    config: ViewsConfig,
    library: ModuleType,
    to_tensor: Callable[..., Tensor],
    blur: Callable[[Image.Image], Image.Image] | None = None,
) -> list[Callable[..., Tensor]]:
    """Build BYOL's augmentations of every view from torchvision's transforms v1 or v2; blur: replaces the library's."""
    views = []
    bicubic = library.InterpolationMode.BICUBIC
    for view, group in enumerate(own for own in groups for _ in range(own.count)):
        kind = min(view, 2)
        taps = min(BLUR_TAPS, 2 * ((group.size - 1) // 2) + 1)
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
    """Blur as many self-supervised pipelines do: by three box filters, whose time does not depend on the width."""
    low, high = ViewsConfig().blur_sigma
    return image.filter(ImageFilter.GaussianBlur(low + (high - low) * float(torch.rand(()))))


def _crops(
    source: FileSource, groups: Sequence[CropGroup], epoch: int, decode_on: torch.device | None = None
) -> ViewBatch:
    """Return all images in one batch, as training reads them; every epoch has different crops."""
    batches = view_batches(
        *(source, groups),
        batch_size=len(source),
        seed=0,
        epochs=range(epoch, epoch + 1),
        reduce_jpeg=True,
        decode_on=decode_on,
    )
    return next(batches)


def _read(source: FileSource, groups: Sequence[CropGroup], epoch: int) -> Tensor:
    """Return all files as bytes, (bytes,) uint8, after drawing their crops."""
    read = [read_jpeg(source, index, partial(reduction, groups, 0, epoch, index)) for index in range(len(source))]
    rows, jpegs = jpegs_of(read)
    sizes, sample_J = [(each.height, each.width) for each in jpegs], torch.tensor(rows)
    return pack(jpegs, rows, [view_windows(sizes, group, 0, epoch, sample_J) for group in groups]).content


def _decoded(source: FileSource, groups: Sequence[CropGroup], config: ViewsConfig, device: torch.device) -> Way:
    """Return the pipeline for all views that decodes and crops the files on the device."""
    photometric = Photometric(config, 0, device)

    def way(epoch: int) -> list[Tensor]:
        views = views_of(_crops(source, groups, epoch, device), photometric)
        float(views[-1].sum())  # waits for the device
        return views

    return way


def _differences(usual: ViewBatch, decoded: ViewBatch) -> Row:
    """Return how far the two versions of a batch's crops differ, in levels of 255."""
    pairs = zip(usual.crops, decoded.crops, strict=True)
    apart = torch.cat([(one.float() - other.cpu().float()).abs().flatten() for one, other in pairs])
    return {"difference": float(apart.mean()), "largest_difference": float(apart.max())}


def _on_device(batch: ViewBatch, config: ViewsConfig, device: torch.device, images: int) -> Way:
    """Return the photometric part for `images` images whose crops, taken from `batch`, are already on the device."""
    sample_B = torch.arange(images)
    crops = [of_size[sample_B % len(of_size)].to(device) for of_size in batch.crops]
    photometric = Photometric(config, 0, device)

    def way(epoch: int) -> list[Tensor]:
        views = views_of(ViewBatch(epoch, sample_B, crops, []), photometric)
        float(views[-1].sum())  # waits for the device
        return views

    return way
