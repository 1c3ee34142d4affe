"""Speed of a loader process making evaluation crops, compared with torchvision and timm in the same run."""

import tempfile
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torchvision import transforms
from torchvision.datasets.folder import pil_loader

from mimref.benchmarks.measure import Ticks, median_seconds
from mimref.benchmarks.views import ViewSizes, photographs
from mimref.config.base import DataConfig
from mimref.data.device_crops import decoding_device
from mimref.data.jpegs import jpegs_of, pack, read_jpeg
from mimref.data.loader import crop_batches
from mimref.data.sources import FileSource
from mimref.data.transforms import EvalTransform
from mimref.devices import resolve_device
from mimref.errors import ConfigError
from mimref.progress import Progress
from mimref.results import Row

TORCHVISION = "torchvision: float32 crops"
TIMM = "timm: uint8 crops"
WORKER = "mimref: uint8 crops"
WHOLE = "mimref: float32 crops"
READER = "mimref: bytes, for data.decode=device"
DECODED = "mimref, JPEGs decoded on the device: float32 crops"

_Way = Callable[[], torch.Tensor]
"""Returns the crops of all images, (N, 3, S, S); READER returns bytes."""


def benchmark_extraction(
    *, sizes: ViewSizes | None = None, device: str = "cpu", progress: Progress | None = None
) -> list[Row]:
    """Measure the images per second (`value`, median) that a loader process prepares for an encoder on one CPU thread.

    TORCHVISION: Resize, CenterCrop, ToTensor and Normalize on PIL images, as is usual with ImageFolder. TIMM: the
    transform and collation of timm's loader, which normalises on the device. WORKER: the work of a mimref loader
    process, which also leaves normalisation to the device. WHOLE: WORKER with normalisation, for comparison with
    TORCHVISION. READER: the work of a loader process when a device decodes. DECODED, on CUDA: files are read on the
    CPU, then decoded, cropped and normalised on the device. `ratio`, `ratio_timm`: images per second relative to
    TORCHVISION and to TIMM. The number of threads is restored.
    """
    sizes = sizes or ViewSizes()
    target = resolve_device(device)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)  # as loader processes have
        try:
            ways = _pipelines(photographs(folder, sizes), EvalTransform(sizes.global_size), target)
            tick = Ticks(progress, len(ways) * (sizes.repeats + 1))
            seconds = median_seconds([*ways.values()], torch.device("cpu"), turns=sizes.repeats, tick=tick)
        finally:
            torch.set_num_threads(threads)
    per_s = {name: sizes.images / each for name, each in zip(ways, seconds, strict=True)}
    rows: list[Row] = []
    for name, value in per_s.items():
        row: Row = {"metric": "benchmark_extraction", "value": value, "pipeline": name}
        row |= {"device": str(target) if name == DECODED else "cpu", "ms": 1000 / value}
        row |= {"ratio": value / per_s[TORCHVISION], "ratio_timm": value / per_s[TIMM]}
        row |= {"width": sizes.width, "height": sizes.height, "images": sizes.images, "repeats": sizes.repeats}
        rows.append(row)
    return rows


def _pipelines(source: FileSource, transform: EvalTransform, device: torch.device) -> dict[str, _Way]:
    paths = [source.path(index) for index in range(len(source))]
    shorter = round(transform.image_size / transform.crop_fraction)
    steps = transforms.Compose(
        [
            transforms.Resize(shorter, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(transform.image_size),
            transforms.ToTensor(),
            transforms.Normalize(transform.mean, transform.std),
        ]
    )

    def torchvision() -> torch.Tensor:
        return torch.stack([steps(pil_loader(path)) for path in paths])

    def ours(decode_on: torch.device | None) -> torch.Tensor:
        return next(crop_batches(source, transform, batch_size=len(paths), decode_on=decode_on)).crops

    def read() -> torch.Tensor:
        rows, jpegs = jpegs_of([read_jpeg(source, index, None) for index in range(len(paths))])
        return pack(jpegs, rows, [transform.windows([(each.height, each.width) for each in jpegs])]).content

    def decoded() -> torch.Tensor:
        crops = transform.normalize(ours(device))
        float(crops.sum())  # waits for the device
        return crops

    ways: dict[str, _Way] = {TORCHVISION: torchvision, TIMM: _timm(paths, transform)}
    ways |= {WORKER: partial(ours, None), WHOLE: lambda: transform.normalize(ours(None)), READER: read}
    if device.type == "cuda":
        try:
            decoding_device(DataConfig(decode="device"), device)
            ways[DECODED] = decoded
        except ConfigError:  # `benchmark_views` reports why
            pass
    return ways


def _timm(paths: list[str], transform: EvalTransform) -> _Way:
    from timm.data.loader import fast_collate
    from timm.data.transforms_factory import create_transform

    steps = create_transform(
        transform.image_size,
        crop_pct=transform.crop_fraction,
        interpolation="bicubic",
        mean=transform.mean,
        std=transform.std,
        use_prefetcher=True,
    )

    def way() -> torch.Tensor:
        images = [(np.asarray(steps(pil_loader(path))), 0) for path in paths]
        crops: torch.Tensor = fast_collate(images)[0]  # type: ignore[no-untyped-call]
        return crops

    return way
