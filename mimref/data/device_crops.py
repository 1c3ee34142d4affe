"""JPEGs decoded and cropped on a device, with nvJPEG on CUDA; the CPU decodes those that the device cannot.

Everything here runs in the process that trains or evaluates, on its current stream. Only the decoded images of one part
of the batch are in memory at a time.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image
from torch import Tensor

from mimref.config.base import DataConfig
from mimref.data.decode import BadImage, Decoded, decode_content
from mimref.data.jpegs import Jpegs
from mimref.data.pixels import FLAT_LEVELS, FLAT_LOOK, Decoding, is_flat
from mimref.data.traits import FLAT, ON_CPU
from mimref.data.windows import resize_windows
from mimref.errors import ConfigError

PART_PIXELS = 4_000_000
"""Most pixels that are decoded together, where each image counts with the largest height and width among them. A larger
image is a part by itself."""
LEAST_WIDTH = 500
"""Least width that an image counts with: once resized across, a narrow image's rows are as long as all its crops."""


def decoding_device(data: DataConfig, device: torch.device) -> torch.device | None:
    """Return the device that decodes JPEGs; None if loader processes decode them.

    Raises ConfigError if `data.decode` requests a device that cannot decode, or is combined with `data.channels`.
    """
    # `auto` means the CPU until decoding on CUDA has been measured to be faster.
    if data.decode != "device":
        return None
    advice = "set data.decode=cpu"
    if device.type != "cuda":
        raise ConfigError(f"data.decode device needs CUDA, and the device is {device.type}; {advice}")
    if data.channels is not None:
        raise ConfigError(f"data.decode device yields 8-bit colour; leave out data.channels, or {advice}")
    if (reason := _trial(device)) is not None:
        raise ConfigError(f"data.decode device does not work here ({reason}); {advice}")
    return device


@cache
def _trial(device: torch.device) -> str | None:
    """Return why the device cannot decode a small JPEG; None if it can."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(stream, "JPEG")
    try:
        decode_jpegs([torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)], device)
    except (ImportError, AttributeError, RuntimeError) as error:
        return " ".join(str(error).split("\n")[0].split())
    return None


def decode_jpegs(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode files, uint8 on the CPU, to RGB (3, H, W) uint8 on the device. Raises RuntimeError if one is undecodable.

    On CUDA the process waits for the current stream, then for the decoder.
    """
    # torchvision warns that decoding will move to torchcodec, which needs torch 2.11 for it.
    from torchvision.io import ImageReadMode, decode_jpeg

    if device.type == "cuda":
        # torchvision reuses its decoder, and would not notice that another GPU is now the current one.
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        # torchvision decodes on its own stream, into memory that the current stream may still be reading.
        torch.cuda.current_stream(device).synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded: list[Tensor] = decode_jpeg(contents, mode=ImageReadMode.RGB, device=device)
    return decoded


@dataclass
class Completed:
    """A batch whose JPEGs are decoded."""

    crops: list[Tensor]
    """For each group (B, V, 3, S, S) uint8 on the device: crops of the decoded images, in the batch's order."""
    traits: dict[int, int]
    """By place in the batch: traits that decoding has found in the JPEGs."""
    bad: dict[int, tuple[str, str]]
    """By place in the batch: path and reason of the JPEGs that could not be decoded, and are left out."""


def complete(
    jpegs: Jpegs,
    others: Sequence[Tensor],
    device: torch.device,
    decoding: Decoding,
    cut: Callable[[int, Decoded], list[Tensor]],
) -> Completed:
    """Decode a batch's JPEGs on the device, cut their crops, and merge them with the crops of its other images.

    others: for each group (B - J, V, 3, S, S), crops of the images that a loader process has decoded. cut: returns the
    crops of the image at a place in the batch, (V, 3, S, S) for each group; called if the device cannot decode it.
    """
    count = len(jpegs) + len(others[0])
    rest = torch.tensor(sorted({*range(count)} - {*jpegs.rows}), dtype=torch.int64, device=device)
    found = Completed([], {}, {})
    for crops in others:
        whole = torch.empty(count, *crops.shape[1:], dtype=torch.uint8, device=device)
        whole[rest] = crops.to(device, non_blocking=True)
        found.crops.append(whole)
    contents = jpegs.contents()
    for part in _parts(jpegs.sizes):
        for number in sorted({*part} - {*_cut_part(jpegs, contents, part, device, found)}):
            _cut_alone(jpegs, contents, number, decoding, cut, found)
    if found.bad:
        kept = torch.tensor([row not in found.bad for row in range(count)], device=device)
        found.crops = [crops[kept] for crops in found.crops]
    return found


def _cut_part(
    jpegs: Jpegs, contents: Sequence[Tensor], part: Sequence[int], device: torch.device, found: Completed
) -> list[int]:
    """Decode some images together, and cut their crops. Returns the numbers of those that were decoded."""
    images = [
        (number, image)
        for number, image in zip(part, _decoded([contents[number] for number in part], device), strict=True)
        if image is not None and _shown_size(image, jpegs.orientations[number]) == jpegs.sizes[number]
    ]
    if not images:
        return []
    numbers = [number for number, _ in images]
    rows = torch.tensor([jpegs.rows[number] for number in numbers], device=device)
    for number, flat in zip(numbers, _flat([image for _, image in images]), strict=True):
        found.traits[jpegs.rows[number]] = FLAT * flat
    stacked = _stacked([_turned(image, jpegs.orientations[number]) for number, image in images])
    for crops, windows in zip(found.crops, jpegs.windows, strict=True):
        crops[rows] = resize_windows(stacked, windows[numbers], crops.shape[-1])
    return numbers


def _cut_alone(
    jpegs: Jpegs,
    contents: Sequence[Tensor],
    number: int,
    decoding: Decoding,
    cut: Callable[[int, Decoded], list[Tensor]],
    found: Completed,
) -> None:
    """Decode one image on the CPU, and cut its crops."""
    row = jpegs.rows[number]
    try:
        decoded = decode_content(contents[number].numpy().tobytes(), jpegs.names[number], None, decoding)
    except BadImage as error:
        found.bad[row] = (error.path, error.reason)
        return
    found.traits[row] = decoded.traits | ON_CPU
    for crops, own in zip(found.crops, cut(row, decoded), strict=True):
        crops[row] = own.to(crops.device)


def _parts(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Yield the numbers of images to decode together. Their sizes are similar, as smaller ones are padded."""
    part: list[int] = []
    high = wide = 0
    for number in sorted(range(len(sizes)), key=lambda number: sizes[number]):
        height, width = max(high, sizes[number][0]), max(wide, sizes[number][1])
        if part and (len(part) + 1) * height * max(width, LEAST_WIDTH) > PART_PIXELS:
            yield part
            part, (height, width) = [], sizes[number]
        part.append(number)
        high, wide = height, width
    if part:
        yield part


def _decoded(contents: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Return the images as stored; None for those that the device cannot decode."""
    try:
        return [*decode_jpegs(contents, device)]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # torchvision then returns none of the images in a list, and does not report which one is at fault.
        return [None] if len(contents) == 1 else [each for one in contents for each in _decoded([one], device)]


def _shown_size(image: Tensor, orientation: int) -> tuple[int, int]:
    """Return the height and width of an image after its orientation is applied."""
    _, height, width = image.shape
    return (width, height) if orientation >= 5 else (height, width)


def _turned(image: Tensor, orientation: int) -> Tensor:
    """Return the image with its orientation applied."""
    if orientation >= 5:
        image = image.transpose(1, 2)
    return image.flip([axis for axis, which in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in which])


def _flat(images: Sequence[Tensor]) -> list[bool]:
    """Return whether each image is nearly of one colour. Waits for the current stream."""
    steps = [[max(1, side // FLAT_LOOK) for side in image.shape[1:]] for image in images]
    looks = [
        image[:, ::down, ::across].flatten(1).float().var(dim=1, correction=0).amax()
        for image, (down, across) in zip(images, steps, strict=True)
    ]
    may_be = (torch.stack(looks) < FLAT_LEVELS**2).tolist()
    return [look and is_flat(image.permute(1, 2, 0).cpu().numpy()) for look, image in zip(may_be, images, strict=True)]


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """Stack images into one batch (J, 3, H, W) float32, padded at the right and at the bottom."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    stacked = torch.zeros(len(images), 3, height, width, device=images[0].device)
    for row, image in zip(stacked, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return stacked
