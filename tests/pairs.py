"""Images and masks in folders, for tests."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from mimref.data.masks.sources import Pairs


def write_pair(images: Path, masks: Path, name: str, *, classes: int = 3, size: tuple[int, int] = (20, 16)) -> None:
    """Write a noisy image, coloured by the classes of its pixels, and its mask, as PNG. size: width and height."""
    rng = np.random.default_rng(sum(map(ord, name)))
    labels = rng.integers(classes, size=(2, 2)).repeat(size[1] // 2, 0).repeat(size[0] // 2, 1).astype(np.uint8)
    pixels = np.clip(80 * labels[..., None] + rng.normal(40, 15, (*labels.shape, 3)), 0, 255).astype(np.uint8)
    for folder in (images, masks):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(images / f"{name}.png")
    Image.fromarray(labels).save(masks / f"{name}.png")


def write_pairs(root: Path, *, train: int = 12, val: int = 4, classes: int = 3) -> Path:
    """Write `root/train/{images,masks}` and `root/val/{images,masks}`; return `root`."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            write_pair(root / split / "images", root / split / "masks", f"{split}{number:02}", classes=classes)
    return root


def read_pair(pairs: Pairs, index: int) -> tuple[Tensor, Tensor]:
    """Return an image, uint8 (3, H, W), and its mask."""
    decoded, mask = pairs.read(index)
    return decoded.image.contiguous(), mask
