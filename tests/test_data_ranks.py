"""Two processes with two loader processes each deliver every sample of shards once per epoch, with interruptions."""

from collections import Counter
from pathlib import Path

import numpy as np

from mimref.config.base import DataConfig
from mimref.data.loader import crop_batches, view_batches
from mimref.data.open import open_source
from mimref.data.sources import Subset
from mimref.data.transforms import EvalTransform
from mimref.data.views import CropGroup
from mimref.distributed.group import own_rank, world_size
from tests.ranks import run_ranks
from tests.tiny import turn, write_images
from tests.wds_shards import samples, write_shard

BATCH, IMAGES = 10, 37  # 7 per shard, 2 in the last one; the last 7 of an epoch do not fill a batch


def delivered(spec: str, skip: int, stop: int) -> list[tuple[int, list[int]]]:
    """The epoch and the colours of all images, for the batches from `skip` to `stop` of two epochs."""
    per_epoch = IMAGES // BATCH
    batches = view_batches(
        open_source(DataConfig(spec=spec), "train"),
        [CropGroup(1, 8, (0.9, 1.0))],
        batch_size=BATCH,
        seed=0,
        epochs=range(skip // per_epoch, 2),
        skip=skip % per_epoch,
        workers=2,
    )
    found = []
    for _, batch in zip(range(skip, stop), batches, strict=False):
        # The pixels show which images arrive.
        found.append((batch.epoch, batch.crops[0][:, 0, 0, 0, 0].tolist()))
    return found


def delivered_in_parts(spec: str) -> list[tuple[int, list[int]]]:
    """The same from loaders that are stopped within the first epoch, and within the second."""
    return [batch for skip, stop in ((0, 2), (2, 5), (5, 6)) for batch in delivered(spec, skip, stop)]


def told(folder: str) -> list[str]:
    """What each rank can report after it has read every other image."""
    source = open_source(DataConfig(spec=folder), "val")
    list(crop_batches(source, EvalTransform(4), batch_size=1, start=own_rank(), every=world_size()))
    source.share_traits()
    return Subset(source, np.arange(2)).peculiarities()


def test_every_rank_knows_what_all_have_read(tmp_path: Path) -> None:
    write_images(tmp_path / "images", per_class=3)
    for number in range(3):
        turn(tmp_path / "images" / "a" / f"{number:03}.png")
    alone = told(str(tmp_path / "images"))
    assert alone[0].startswith("3 of 6 images have an EXIF orientation")
    assert run_ranks(told, 2, tmp_path / "group", str(tmp_path / "images")) == [alone, alone]


def test_every_sample_once_per_epoch(tmp_path: Path) -> None:
    for number in range(0, IMAGES, 7):
        write_shard(tmp_path / f"{number:02}.tar", samples(number, min(7, IMAGES - number), classes=3))
    spec = f"wds:{tmp_path}"
    first, second = run_ranks(delivered_in_parts, 2, tmp_path / "group", spec)
    alone = delivered(spec, 0, 6)
    together = [(one[0], one[1] + other[1]) for one, other in zip(first, second, strict=True)]
    assert together == alone
    assert all(len(images) == BATCH // 2 for _, images in first + second)
    for epoch in range(2):
        seen = Counter(image for number, batch in together if number == epoch for image in batch)
        assert set(seen.values()) == {1} and len(seen) == IMAGES // BATCH * BATCH and seen.keys() <= set(range(IMAGES))
    assert together[0] != together[3]
