import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mimref.data import loader
from mimref.data import sources as data_images
from mimref.data.decode import BadImage, Decoded, Reduce, decode_file
from mimref.data.loader import ViewBatch, device_batches, loader_workers, view_batches
from mimref.data.pixels import Decoding
from mimref.data.sources import ArraySource, FileSource, ImageSource
from mimref.data.views import CropGroup, cut_group
from mimref.draws import permutation
from mimref.errors import ConfigError

GROUPS = [CropGroup(2, 12, (0.25, 1.0)), CropGroup(3, 8, (0.05, 0.25), first_view=2)]


@dataclass(eq=False)
class Images(ImageSource):
    """Noise images of many shapes; the samples in `bad` cannot be read."""

    count: int
    bad: frozenset[int] = frozenset()
    reads: list[int] = field(default_factory=list)
    name: str = "noise"
    labels: None = None
    class_names: None = None
    in_memory: bool = True
    fingerprint: str = ""

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Tensor:
        self.reads.append(index)
        if index in self.bad:
            raise BadImage(self.path(index), "broken")
        generator = torch.Generator().manual_seed(index)
        shape = (3, 8 + index % 5, 9 + index % 7)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def path(self, index: int) -> str:
        return f"image{index}"


def batches_of(
    source: ImageSource,
    *,
    batch_size: int = 4,
    epochs: range = range(1),
    skip: int = 0,
    every: int = 1,
    workers: int = 0,
    groups: Sequence[CropGroup] = GROUPS,
    reduce_jpeg: bool = False,
) -> list[ViewBatch]:
    batches = view_batches(
        source,
        groups,
        batch_size=batch_size,
        seed=3,
        epochs=epochs,
        skip=skip,
        every=every,
        workers=workers,
        reduce_jpeg=reduce_jpeg,
    )
    return list(batches)


def assert_same(left: list[ViewBatch], right: list[ViewBatch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one.epoch, one.bad) == (other.epoch, other.bad)
        assert torch.equal(one.sample_B, other.sample_B)
        assert len(one.crops) == len(other.crops)
        assert all(torch.equal(a, b) for a, b in zip(one.crops, other.crops, strict=True))


@pytest.mark.parametrize("workers", [2])
def test_batches_are_the_same_for_every_number_of_workers(workers: int) -> None:
    source = Images(14, bad=frozenset({2, 9}))
    assert_same(
        batches_of(source, epochs=range(5, 7), workers=workers, skip=1), batches_of(source, epochs=range(5, 7), skip=1)
    )


def test_order_is_the_epochs_permutation_and_the_last_partial_batch_is_dropped() -> None:
    batches = batches_of(Images(11), batch_size=4, epochs=range(2, 4))
    assert [batch.epoch for batch in batches] == [2, 2, 3, 3]
    for epoch in (2, 3):
        visited = torch.cat([batch.sample_B for batch in batches if batch.epoch == epoch])
        assert visited.dtype == torch.int64
        assert torch.equal(visited, permutation(3, epoch, 11)[:8])
    assert not torch.equal(permutation(3, 2, 11), permutation(3, 3, 11))
    assert len(batches_of(Images(12), batch_size=4)) == 3
    assert batches_of(Images(3), batch_size=4) == []
    assert batches_of(Images(12), epochs=range(2, 2)) == []


def test_crops_are_those_of_the_sample_in_the_epoch() -> None:
    source = Images(8)
    for batch in batches_of(source, epochs=range(1, 3)):
        images = [source.read_reduced(index, None) for index in batch.sample_B.tolist()]
        assert [crops.shape for crops in batch.crops] == [(4, 2, 3, 12, 12), (4, 3, 3, 8, 8)]
        for crops, group in zip(batch.crops, GROUPS, strict=True):
            assert torch.equal(crops, cut_group(images, group, 3, batch.epoch, batch.sample_B))


@pytest.mark.parametrize("skip", [1, 3, 5])
def test_skip_resumes_within_an_epoch(skip: int) -> None:
    source = Images(13)
    whole = batches_of(source, epochs=range(2))
    assert len(whole) == 6
    # As when training resumes: `epochs` leaves out whole epochs, `skip` the rest.
    rest = batches_of(source, epochs=range(skip // 3, 2), skip=skip % 3)
    assert_same(rest, whole[skip:])


@pytest.mark.parametrize("every", [2, 7])
def test_batches_by_turns_go_on_over_epochs(every: int) -> None:
    whole = batches_of(Images(21), epochs=range(3), skip=1)  # 4 + 5 + 5 batches
    for turn in range(every):
        first = 1 + turn
        own = batches_of(Images(21), epochs=range(first // 5, 3), skip=first % 5, every=every)
        assert_same(own, whole[turn::every])


def test_skipped_batches_are_not_read() -> None:
    source = Images(12)
    batches_of(source, skip=2)
    assert source.reads == permutation(3, 0, 12)[8:].tolist()


def test_bad_images_are_left_out_and_named() -> None:
    order = permutation(3, 0, 12).tolist()
    bad = frozenset({order[1], order[3], order[8], order[9], order[10], order[11]})
    first, second, third = batches_of(Images(12, bad=bad))
    assert first.sample_B.tolist() == [order[0], order[2]]
    assert first.bad == [(f"image{order[1]}", "broken"), (f"image{order[3]}", "broken")]
    assert [len(crops) for crops in first.crops] == [2, 2]
    whole = batches_of(Images(12))[0]
    for crops, all_crops in zip(first.crops, whole.crops, strict=True):
        assert torch.equal(crops, all_crops[[0, 2]])
    assert second.bad == []
    assert len(second.sample_B) == 4
    assert third.sample_B.tolist() == []
    assert third.sample_B.dtype == torch.int64
    assert third.crops and not any(map(len, third.crops))
    assert len(third.bad) == 4


def file_source(folder: Path, count: int) -> FileSource:
    files = []
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (10 + index, 20, 3), dtype=np.uint8)
        files.append(f"{index}.png")
        Image.fromarray(pixels).save(folder / files[-1])
    return FileSource(str(folder), str(folder), files, None, None)


def test_files_are_decoded_once_per_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = file_source(tmp_path, 6)
    decoded: Counter[str] = Counter()

    def count(path: str, reduce: Reduce | None, decoding: Decoding) -> Decoded:
        decoded[os.path.basename(path)] += 1
        return decode_file(path, reduce, decoding)

    monkeypatch.setattr(data_images, "decode_file", count)
    batches_of(source, batch_size=3, epochs=range(2))
    assert decoded == Counter({f"{index}.png": 2 for index in range(6)})


def test_files_and_arrays_through_workers(tmp_path: Path) -> None:
    source = file_source(tmp_path, 4)
    (tmp_path / "1.png").write_bytes(b"")
    with_worker = batches_of(source, workers=1)
    assert_same(with_worker, batches_of(source))
    assert with_worker[0].bad == [(str(tmp_path / "1.png"), "empty file")]
    gray = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    digits = ArraySource("digits", gray, None, None, "train", np.arange(4))
    assert_same(batches_of(digits, workers=1), batches_of(digits))


def test_loading_does_not_depend_on_the_global_generator() -> None:
    torch.manual_seed(0)
    first = batches_of(Images(8))
    torch.manual_seed(1)
    assert_same(batches_of(Images(8)), first)


def test_every_process_needs_an_image_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "world_size", lambda: 4)
    loader.check_batch_size(4, 100)
    with pytest.raises(ConfigError, match="batch_size 3 leaves some of the 4 processes without"):
        loader.check_batch_size(3, 100)
    # The purpose of the check: every process has a part of every batch.
    for rank in range(4):
        monkeypatch.setattr(loader, "own_rank", lambda rank=rank: rank)
        assert [len(batch.sample_B) for batch in batches_of(Images(9), batch_size=4)] == [1, 1]


def test_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory, on_disk = Images(1), Images(1, in_memory=False)
    assert loader_workers(None, in_memory) == 0
    for cores, expected in ((1, 1), (6, 6), (64, 16)):
        monkeypatch.setattr(loader, "own_cores", lambda cores=cores: cores)
        assert loader_workers(None, on_disk) == expected
    assert loader_workers(3, in_memory) == 3
    assert loader_workers(0, on_disk) == 0


def test_pinning_reaches_every_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    # DataLoader asks each batch to pin itself; without a GPU nothing can be pinned, so the request is what counts.
    pinned: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        pinned.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", note)
    batch = batches_of(Images(4))[0]
    again = batch.pin_memory()
    assert_same([again], [batch])
    assert pinned == [tuple(crops.shape) for crops in batch.crops]


@pytest.mark.gpu
def test_batches_arrive_pinned() -> None:
    batches = view_batches(Images(4), GROUPS, batch_size=4, seed=3, epochs=range(1), pin_memory=True, workers=1)
    assert all(crops.is_pinned() for crops in next(batches).crops)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    """scikit-learn's two photographs at 640 x 427, and at two and four times that size."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photographs")
    files = []
    for number, pixels in enumerate(load_sample_images().images):
        for scale in (1, 2, 4):
            image = Image.fromarray(pixels).resize((640 * scale, 427 * scale), Image.Resampling.BICUBIC)
            files.append(f"{number}_{scale}.jpg")
            image.save(folder / files[-1], quality=90)
    return FileSource("photographs", str(folder), files, None, None)


def test_crops_of_reduced_jpegs_are_close_to_those_of_whole_ones(
    photographs: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [CropGroup(2, 80, (0.25, 1.0)), CropGroup(4, 40, (0.05, 0.25), first_view=2)]
    factors: Counter[int] = Counter()

    def note(path: str, reduce: Reduce | None, decoding: Decoding) -> Decoded:
        decoded = decode_file(path, reduce, decoding)
        factors[round(decoded.height / decoded.image.shape[1])] += 1
        return decoded

    monkeypatch.setattr(data_images, "decode_file", note)
    whole = batches_of(photographs, batch_size=6, epochs=range(4), groups=groups)
    assert set(factors) == {1}
    reduced = batches_of(photographs, batch_size=6, epochs=range(4), groups=groups, reduce_jpeg=True)
    assert set(factors) == {1, 2, 4, 8}
    for size in range(len(groups)):
        left, right = (torch.cat([batch.crops[size] for batch in batches]).float() for batches in (whole, reduced))
        apart = (left - right).abs().mean(dim=(2, 3, 4))
        assert 0 < apart.mean() < 3
        assert apart.max() < 15
        # Brightness and colours stay the same: only texture differs.
        assert (left.mean(dim=(3, 4)) - right.mean(dim=(3, 4))).abs().max() < 4


def test_images_that_are_not_reduced_give_the_same_crops(photographs: FileSource, tmp_path: Path) -> None:
    large = [CropGroup(1, 300, (0.25, 1.0)), CropGroup(2, 16, (0.05, 0.25), first_view=1)]
    small = FileSource("small", photographs.folder, ["0_1.jpg", "1_1.jpg"], None, None)
    for source in (small, file_source(tmp_path, 4), Images(4)):
        assert_same(
            batches_of(source, batch_size=2, groups=large, reduce_jpeg=True),
            batches_of(source, batch_size=2, groups=large),
        )


@dataclass(eq=False)
class Threads(Images):
    def read(self, index: int) -> Tensor:
        return torch.full((3, 16, 16), torch.get_num_threads(), dtype=torch.uint8)


def test_workers_compute_on_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here, there = batches_of(Threads(4))[0], batches_of(Threads(4), workers=1)[0]
    finally:
        torch.set_num_threads(before)
    assert all((crops == 2).all() for crops in here.crops)
    assert all((crops == 1).all() for crops in there.crops)


def test_batches_pass_through_where_there_is_nothing_to_copy_to() -> None:
    batches = batches_of(Images(8), batch_size=2)
    for given, expected in zip(device_batches(iter(batches), torch.device("cpu")), batches, strict=True):
        assert given is expected


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_next_item_is_taken_before_one_is_given_out(count: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(count):
            taken.append(item)
            yield item

    given = []
    for item in loader._one_ahead(items()):
        given.append(item)
        assert taken == list(range(min(item + 2, count)))
    assert given == taken == list(range(count))


@pytest.mark.gpu
def test_batches_reach_the_device_whole_and_in_order() -> None:
    device = torch.device("cuda")
    # Batches of 40 MB, which take a while to copy.
    groups = [CropGroup(4, 320, (0.25, 1.0)), CropGroup(2, 64, (0.05, 0.25), first_view=4)]
    settings: dict[str, Any] = {"batch_size": 32, "seed": 3, "epochs": range(2), "pin_memory": True}
    expected = batches_of(Images(128), batch_size=32, epochs=range(2), groups=groups)
    matrix = torch.randn(4096, 4096, device=device)
    sums = []
    for batch, reference in zip(
        device_batches(view_batches(Images(128), groups, **settings), device), expected, strict=True
    ):
        assert (batch.epoch, batch.bad) == (reference.epoch, reference.bad)
        assert torch.equal(batch.sample_B, reference.sample_B)
        assert batch.sample_B.device.type == "cpu"
        assert all(crops.device.type == "cuda" for crops in batch.crops)
        # Long work before the crops are read: memory released too early would be overwritten by later copies.
        for _ in range(20):
            matrix = (matrix @ matrix).clamp_(-1, 1)
        sums.append([crops.long().sum() + 0 * matrix[0, 0].long() for crops in batch.crops])
    for on_device, reference in zip(sums, expected, strict=True):
        assert [int(total) for total in on_device] == [int(crops.long().sum()) for crops in reference.crops]
