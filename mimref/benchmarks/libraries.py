"""The same views made by Kornia and NVIDIA DALI, if installed, for `mimref benchmark views`.

Both differ in detail: Kornia resizes crops without antialiasing, and DALI always changes colours in the same order.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.v2.functional import pil_to_tensor

from mimref.config.run import ViewsConfig
from mimref.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from mimref.data.views import CropGroup

KORNIA = "Kornia, decoded by PIL"
DALI = "NVIDIA DALI"

BLUR_TAPS = 23  # as in BYOL, and in `mimref.data.views`

Way = Callable[[int], list[Tensor]]
"""Returns the views of an epoch, each (..., 3, S, S)."""

_INSTALL = {KORNIA: "kornia", DALI: "nvidia-dali-cuda120"}
_MODULES = {KORNIA: "kornia", DALI: "nvidia.dali"}


def library_ways(
    paths: Sequence[str], groups: Sequence[CropGroup], config: ViewsConfig, device: torch.device
) -> tuple[dict[str, Way], list[str]]:
    """Return a pipeline for each library that works here, and a message for each that does not.

    All images have the same size. device: where Kornia runs, and DALI if it is CUDA; otherwise DALI runs on the CPU.
    """
    ways: dict[str, Way] = {}
    missing: list[str] = []
    for name, make in ((KORNIA, _kornia), (DALI, _dali)):
        try:
            if not _installed(_MODULES[name]):
                raise ImportError(f"pip install {_INSTALL[name]}")
            way = make(paths, groups, config, device)
            way(0)
        except Exception as error:  # a library may raise anything
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            missing.append(f"not compared with {name}: {reason}")
        else:
            ways[name] = way
    return ways, missing


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _kornia(paths: Sequence[str], groups: Sequence[CropGroup], config: ViewsConfig, device: torch.device) -> Way:
    from kornia import augmentation

    mean, std = (torch.tensor(each, device=device) for each in (IMAGENET_MEAN, IMAGENET_STD))

    def view(group: CropGroup, kind: int) -> Any:
        """Build a map from images (B, 3, H, W) in [0, 1] to normalised views (B, 3, S, S); kind: see `_kinds`."""
        taps = min(BLUR_TAPS, 2 * ((group.size - 1) // 2) + 1)
        size, ratio = (group.size, group.size), config.aspect_ratio
        return augmentation.AugmentationSequential(
            augmentation.RandomResizedCrop(size, group.scale, ratio, resample="bicubic", p=1.0),
            augmentation.RandomHorizontalFlip(p=config.flip),
            augmentation.ColorJitter(*config.jitter, p=config.jitter_probability),
            augmentation.RandomGaussianBlur((taps, taps), config.blur_sigma, p=config.blur_probability[kind]),
            augmentation.RandomGrayscale(p=config.gray_probability),
            augmentation.RandomSolarize(0.0, 0.0, p=config.solarize_probability[kind]),
            augmentation.Normalize(mean, std),
        )

    views = [view(group, kind) for group, kind in _kinds(groups)]

    def way(_: int) -> list[Tensor]:
        pixels = torch.stack([pil_to_tensor(pil_loader(path)) for path in paths]).to(device)
        images = pixels.float() / 255
        made = [each(images) for each in views]
        float(made[-1].sum())  # waits for the device
        return made

    return way


def _dali(paths: Sequence[str], groups: Sequence[CropGroup], config: ViewsConfig, device: torch.device) -> Way:
    from nvidia.dali import fn, pipeline_def, types

    kinds = _kinds(groups)
    on_gpu = device.type == "cuda"
    brightness, contrast, saturation, hue = config.jitter

    # DALI compiles the conditions of these functions into its pipeline.
    def view(images: Any, group: CropGroup, kind: int) -> Any:
        """Make the same view of DALI images, (H, W, 3) uint8."""
        pixels = fn.random_resized_crop(
            images,
            size=(group.size, group.size),
            random_area=group.scale,
            random_aspect_ratio=config.aspect_ratio,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )
        if fn.random.coin_flip(probability=config.jitter_probability, dtype=types.BOOL):
            pixels = fn.color_twist(
                pixels,
                brightness=fn.random.uniform(range=(1 - brightness, 1 + brightness)),
                contrast=fn.random.uniform(range=(1 - contrast, 1 + contrast)),
                saturation=fn.random.uniform(range=(1 - saturation, 1 + saturation)),
                hue=fn.random.uniform(range=(-360 * hue, 360 * hue)),
            )
        if fn.random.coin_flip(probability=config.blur_probability[kind], dtype=types.BOOL):
            taps = min(BLUR_TAPS, 2 * ((group.size - 1) // 2) + 1)
            pixels = fn.gaussian_blur(pixels, sigma=fn.random.uniform(range=config.blur_sigma), window_size=taps)
        if fn.random.coin_flip(probability=config.gray_probability, dtype=types.BOOL):
            pixels = fn.saturation(pixels, saturation=0.0)
        if fn.random.coin_flip(probability=config.solarize_probability[kind], dtype=types.BOOL):
            light = pixels >= 128
            pixels = fn.cast(light * (255 - pixels) + (light ^ True) * pixels, dtype=types.UINT8)
        return fn.crop_mirror_normalize(
            pixels,
            mirror=fn.random.coin_flip(probability=config.flip),
            mean=[255 * value for value in IMAGENET_MEAN],
            std=[255 * value for value in IMAGENET_STD],
            dtype=types.FLOAT,
            output_layout="CHW",
        )

    @pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
    def views() -> tuple[Any, ...]:
        encoded, _ = fn.readers.file(files=list(paths))
        images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        return tuple(view(images, group, kind) for group, kind in kinds)

    device_id = (device.index or 0) if on_gpu else None
    pipeline = views(batch_size=len(paths), num_threads=1, device_id=device_id, seed=0, prefetch_queue_depth=1)
    pipeline.build()

    def way(_: int) -> list[Tensor]:
        made = [from_dlpack(batch.as_tensor()) for batch in pipeline.run()]  # memory the next run overwrites
        float(made[-1].sum())  # waits for the device
        return made

    return way


def _kinds(groups: Sequence[CropGroup]) -> list[tuple[CropGroup, int]]:
    """Return group and kind of every view; kinds 0 and 1 are the global views, 2 all others."""
    return [(group, min(view, 2)) for view, group in enumerate(own for own in groups for _ in range(own.count))]
