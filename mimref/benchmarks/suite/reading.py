"""Benchmarks of reading images: views, and the input path of an extraction."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mimref.benchmarks.measure import device_setting
from mimref.benchmarks.photograph import photograph
from mimref.benchmarks.stage import describe_encoder, resolve_encoder
from mimref.benchmarks.suite.lines import Found
from mimref.benchmarks.suite.training import refinement
from mimref.benchmarks.views import DEVICE, WORKER, ViewSizes, benchmark_views
from mimref.data.loader import loader_workers
from mimref.data.sources import ArraySource, FileSource, ImageSource, Subset
from mimref.data.transforms import EvalTransform
from mimref.devices import resolve_device, resolve_precision
from mimref.encoders.backbones import TokenEncoder, new_encoder
from mimref.features.encode import Column, PassSettings, extract
from mimref.results import Row


def views(device: str, *, worker: str, photometric: str, images: int, device_images: int) -> Iterator[Found]:
    """Compare a loader process's views with torchvision's on one thread, and time the photometric part on the device.

    worker, photometric: names of the lines; the second is measured only on devices other than the CPU.
    """
    sizes = ViewSizes(images=images, device_images=device_images, repeats=2)
    by_pipeline = {row["pipeline"]: row for row in benchmark_views(sizes=sizes, device=device)}
    row = by_pipeline[WORKER]
    yield Found(
        worker, float(row["ratio_pillow_blur"]), f"{row['value']:,.0f} images/s per process", {"images": images}
    )
    if (on_device := by_pipeline.get(DEVICE)) is not None:
        note = f"{on_device['views']} views of each image, on {on_device['device']}"
        yield Found(photometric, float(on_device["value"]), note, {"images": device_images})


def extraction(device: str, *, files: str, memory: str, preset: str, images: int) -> Iterator[Found]:
    """Measure images/s of an extraction from JPEG files of 500 x 375 pixels, and from decoded images in memory.

    files, memory: names of the lines. preset: names the encoder, which has random weights.
    """
    target = resolve_device(device)
    architecture, _ = resolve_encoder(refinement(preset, device, 2))
    size, name = architecture.image_size, describe_encoder(architecture)
    with torch.device(target):
        encoder = new_encoder(architecture)
    settings = PassSettings(EvalTransform(size), target, resolve_precision("auto", target), 128, workers=None)
    setting: Row = {"encoder": name, "images": images, **device_setting(target, settings.precision)}
    with tempfile.TemporaryDirectory() as folder:
        source = _photographs(Path(folder), images)
        workers = loader_workers(None, source)
        rate = _rate(encoder, source, settings)
        each = f"{workers} loader processes, {rate / workers:,.1f} each" if workers else "no loader processes"
        yield Found(files, rate, f"{name}, {each}", {**setting, "workers": workers})
    pixels = np.random.default_rng(0).integers(0, 256, (images, 3, size, size), dtype=np.uint8)
    rate = _rate(encoder, ArraySource("noise", pixels, None, None, "train", np.arange(images)), settings)
    yield Found(memory, rate, name, setting)


def _rate(encoder: TokenEncoder, source: ImageSource, settings: PassSettings) -> float:
    """Return images/s of a pass up to the last block, with the start of loader processes but not of the device."""
    column = [Column(encoder.depth, "cls")]
    extract(encoder, Subset(source, np.arange(min(len(source), settings.batch_size))), settings, column)
    started = time.perf_counter()
    extract(encoder, source, settings, column)
    return len(source) / (time.perf_counter() - started)


def _photographs(folder: Path, images: int) -> FileSource:
    files = [f"{number}.jpg" for number in range(images)]
    for file in files:
        (folder / file).write_bytes(photograph())
    return FileSource("photographs", str(folder), files, None, None)
