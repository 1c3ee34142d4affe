"""Synthetic exhibits: any number of noisy thumbnails, random maps, and galleries of random images."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mimref.evaluation.exhibits.contents import Cluster, Confusion, Exhibits, Query, Thumbnail


def make_exhibits(
    count: int = 30,
    *,
    labels: Sequence[str] | None = ("a", "b"),
    models: Sequence[str] = ("base", "refined"),
    paths: Sequence[str] = (),
    side: int = 8,
    quality: int = 60,
    map_images: int | None = None,
    noise: float = 40.0,
) -> Exhibits:
    """Make exhibits of `count` images, classes in turn; the first are named by `paths`, the others `val/7.png`."""
    rng = np.random.default_rng(0)
    classes = [labels[number % len(labels)] if labels else None for number in range(count)]
    names = [*paths, *(f"val/{number}.png" for number in range(len(paths), count))]
    images = [
        Thumbnail(names[number], classes[number], _jpeg(rng, number, side, quality, noise)) for number in range(count)
    ]
    on_map = list(range(min(count, map_images or 2000)))

    def some(most: int) -> list[int]:
        return [int(each) for each in rng.integers(0, count, min(most, count))]

    return Exhibits(
        images=images,
        map_images=on_map,
        maps={model: rng.normal(size=(len(on_map), 2)).astype(np.float32) * 5 for model in models},
        queries=[Query(number, {model: some(12) for model in models}) for number in range(min(12, count))],
        confusions={
            model: [Confusion(each, labels[0], 3, 0.25, some(6)) for each in labels[1:]] if labels else []
            for model in models
        },
        clusters={
            model: [
                Cluster(number, 7, labels[0] if labels else None, 0.5 if labels else None, some(6), some(6))
                for number in range(max(2, len(labels or ())))
            ]
            for model in models
        },
        notes=["Drawn by hand."],
    )


def _jpeg(rng: np.random.Generator, number: int, side: int, quality: int, noise: float) -> bytes:
    colour = [(37 * number) % 256, (91 * number) % 256, (151 * number) % 256]
    pixels = np.clip(rng.normal(colour, noise, (side, side, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()
