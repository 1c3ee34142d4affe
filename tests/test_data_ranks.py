"""Two processes with two loader processes each deliver every sample of shards once per epoch, with interruptions."""

from collections import Counter
from pathlib import Path

from mimref.config.base import DataConfig
from mimref.data.loader import view_batches
from mimref.data.open import open_source
from mimref.data.views import CropGroup
from tests.ranks import run_ranks
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
