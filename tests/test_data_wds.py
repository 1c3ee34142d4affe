"""WebDataset shards: which ones are read, every sample once, and what is refused."""

import io
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimref.config.base import DataConfig
from mimref.data import loader
from mimref.data.decode import BadImage
from mimref.data.index import cache as index_cache
from mimref.data.index import tar as archive
from mimref.data.loader import view_batches
from mimref.data.open import open_source
from mimref.data.sources import EncodedSource
from mimref.data.views import CropGroup
from mimref.errors import DataError
from mimref.files import cache_folder
from tests.sources import decode_image
from tests.wds_shards import Members, labels_of, numbers, opened, png, refused, samples, write_shard

GROUPS = [CropGroup(1, 8, (0.5, 1.0))]


# --- which shards, which images


def test_a_folder_with_splits(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / "train" / f"{number:02}.tar", samples(10 * number, 10, classes=4))
    write_shard(tmp_path / "val" / "00.tar", samples(500, 6, classes=3))
    (tmp_path / "train" / "notes.txt").write_text("no shard")
    train, val = opened(tmp_path), opened(tmp_path, "val")
    assert numbers(train) == list(range(30)) and numbers(val) == list(range(500, 506))
    assert labels_of(train) == [str(number % 4) for number in range(30)]
    assert labels_of(val) == [str(number % 3) for number in range(500, 506)]
    assert train.class_names == val.class_names == ["0", "1", "2", "3"]
    assert train.path(10) == f"{tmp_path}/train/01.tar/00010.png"
    assert not train.in_memory and train.name == f"wds:{tmp_path}" and isinstance(train, EncodedSource)


@pytest.mark.parametrize("held", ["validation", "test"])
def test_other_names_of_the_validation_images(tmp_path: Path, held: str) -> None:
    write_shard(tmp_path / "set-train-0.tar", samples(0, 2))
    write_shard(tmp_path / f"set-{held}-0.tar", samples(9, 1))
    assert numbers(opened(tmp_path / "set-{split}-*.tar", "val")) == [9]
    assert numbers(opened(tmp_path / "set-{split}-{0..0}.tar")) == [0, 1]
    write_shard(tmp_path / "folders" / "train" / "a.tar", samples(0, 2))
    write_shard(tmp_path / "folders" / held / "a.tar", samples(4, 1))
    assert numbers(opened(tmp_path / "folders", "val")) == [4]


@pytest.mark.parametrize(
    "spec",
    ["", "*.tar", "s-{000..002}.tar", "s-{000,001,002}.tar", "s-00{0..1}.tar*", "{s,s}-*", "s-{00{0,1},002}.tar"],
)
def test_patterns_without_splits(tmp_path: Path, spec: str) -> None:
    for number in range(3):
        write_shard(tmp_path / f"s-{number:03}.tar", samples(10 * number, 10, classes=4))
    expected = list(range(20 if "1}.tar*" in spec else 30))
    train, val = opened(tmp_path / spec), opened(tmp_path / spec, "val")
    assert numbers(train) == numbers(val) == expected
    assert train.labels is not None and val.labels is None


def test_folders_whose_names_look_like_patterns(tmp_path: Path) -> None:
    write_shard(tmp_path / "set[1]*" / "a.tar", samples(3, 1))
    assert numbers(opened(tmp_path / "set[1]*")) == [3]


def test_files_beside_shards(tmp_path: Path) -> None:
    for name in ("train/a.tar", "val/a.tar", "extra/a.tar", "top.tar"):
        write_shard(tmp_path / name, samples(0, 1))
    (tmp_path / "train" / "b.tar.gz").write_bytes(b"x")
    (tmp_path / "train" / "index.json").write_bytes(b"{}")
    assert opened(tmp_path).notices == [
        f"{tmp_path}/train: 1 file is not used: 1 .gz",
        f"{tmp_path}: shards that are not used: extra, top.tar",
    ]
    assert opened(tmp_path, "val").notices == [f"{tmp_path}: shards that are not used: extra, top.tar"]


def test_images_are_those_of_files(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    members = []
    for number in range(4):
        content = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (64, 48, 3), dtype=np.uint8)).save(content, "jpeg")
        (tmp_path / f"{number}.jpg").write_bytes(content.getvalue())
        members.append((f"{number}.jpg", content.getvalue()))
    source = opened(write_shard(tmp_path / "a.tar", members))
    for number in range(4):
        assert torch.equal(source.read(number), decode_image(str(tmp_path / f"{number}.jpg")))
    reduced = source.read_reduced(0, lambda height, width: 2)
    assert reduced.image.shape == (3, 32, 24) and (reduced.height, reduced.width) == (64, 48)


# --- every sample exactly once


@pytest.mark.parametrize("world", [1, 3])
def test_every_sample_exactly_once_over_ranks_and_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    for number, size in enumerate((13, 1, 30, 17)):  # shards of uneven length
        write_shard(tmp_path / f"{number}.tar", samples(100 * number, size))
    source = opened(tmp_path)
    everyone = sorted(numbers(source))
    batch, epochs = 6, range(2)
    steps = len(source) // batch
    monkeypatch.setattr(loader, "world_size", lambda: world)

    def delivered(*, skip: int = 0, workers: int = 2) -> list[list[int]]:
        """The sample numbers of every batch over all ranks, read from the crops' pixels."""
        parts = []
        for rank in range(world):
            monkeypatch.setattr(loader, "own_rank", lambda rank=rank: rank)
            batches = view_batches(source, GROUPS, batch_size=batch, seed=5, epochs=epochs, skip=skip, workers=workers)
            parts.append([batch.crops[0][:, 0, :2, 0, 0].to(torch.int64) for batch in batches])
        return [
            [int(low) + 256 * int(high) for part in ranks for low, high in part] for ranks in zip(*parts, strict=True)
        ]

    whole = delivered()
    assert len(whole) == steps * len(epochs) and all(len(each) == batch for each in whole)
    for epoch in epochs:
        seen = [number for each in whole[epoch * steps : (epoch + 1) * steps] for number in each]
        assert len(set(seen)) == len(seen) == steps * batch
        assert set(seen) <= set(everyone) and len(everyone) - len(seen) == len(everyone) % batch
    # Resumed after four steps with another number of workers: the remaining batches arrive in the same order.
    assert delivered(skip=4, workers=1) == whole[4:]


# --- cached scans


def test_shards_are_read_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "SAVE_FROM_IMAGES", 1)
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", samples(10 * number, 10, classes=4))
        os.utime(tmp_path / f"{number}.tar", (1e9, 1e9))
    scans: list[str] = []
    scan = archive._read

    def note(file: Any, where: str, choice: archive.Choice, arrays: bool) -> Any:
        scans.append(where)
        return scan(file, where, choice, arrays)

    monkeypatch.setattr(archive, "_read", note)
    first = opened(tmp_path)
    again = opened(tmp_path)
    assert len(scans) == 3
    assert numbers(again) == numbers(first) and labels_of(again) == labels_of(first)
    assert again.fingerprint == first.fingerprint
    write_shard(tmp_path / "1.tar", samples(50, 3, classes=4))
    changed = opened(tmp_path)
    assert numbers(changed) == [*range(10), 50, 51, 52, *range(20, 30)]
    assert changed.fingerprint != first.fingerprint
    # The changed shard is too fresh to be trusted, so the shards are scanned again.
    scans.clear()
    opened(tmp_path)
    assert len(scans) == 3
    (file,) = (cache_folder() / "listings").iterdir()
    file.write_bytes(file.read_bytes()[:-50])
    assert numbers(opened(tmp_path)) == numbers(changed)


def test_limit_and_processes(tmp_path: Path) -> None:
    source = opened(write_shard(tmp_path / "a.tar", samples(0, 9, classes=3)), train_limit=4)
    assert numbers(source) == [0, 1, 2, 3] and labels_of(source) == ["0", "1", "2", "0"]
    copy = pickle.loads(pickle.dumps(source))
    assert numbers(copy) == numbers(source) and copy.fingerprint == source.fingerprint


# --- what is refused


def test_shards_that_are_cut_off(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "a.tar", samples(0, 5, classes=2)).read_bytes()
    end = 10 * 1024  # ten members, each a header and a block
    for length in (0, 100, 512, 700, 1024, 5 * 1024, end - 1, end, end + 100):
        (tmp_path / "a.tar").write_bytes(whole[:length])
        refused(tmp_path, r"a\.tar is not an intact, uncompressed tar file \(.*\); get it again, or leave it out")
    (tmp_path / "a.tar").write_bytes(whole[: end + 512])
    assert len(opened(tmp_path)) == 5
    # Joined by `cat`: tar readers see only the first part.
    (tmp_path / "a.tar").write_bytes(whole + whole)
    refused(tmp_path, r"a\.tar is not an intact, .* \(.* 10 members\)")


def test_shards_that_are_damaged_or_no_shards(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", samples(0, 5))
    whole = path.read_bytes()
    path.write_bytes(whole[:2048] + b"damage" + whole[2054:])  # in the third member's header
    refused(tmp_path, "is not an intact, uncompressed tar file")
    path.write_bytes(b"text " * 1000)
    refused(tmp_path, "is not an intact, uncompressed tar file")
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    refused(tmp_path, "is not an intact, uncompressed tar file")
    path.unlink()
    path.mkdir()
    refused(tmp_path, "a directory")


@pytest.mark.parametrize("name", ["/etc/passwd.png", "../up.png", "a/../../up.png", ".."])
def test_names_that_lead_out_of_the_archive(tmp_path: Path, name: str) -> None:
    write_shard(tmp_path / "a.tar", [*samples(0, 2), (name, png())])
    refused(tmp_path, r"a\.tar is refused: its member .*")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("passwords.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    what = "a link" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else "not a regular file"
    refused(tmp_path, rf"a\.tar is refused: its member passwords\.png is {what}")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", png()), ("a.cls", b"1"), ("b.png", png())], r"a\.tar/b\.png has no label \(\.cls, or label in"),
        ([("a.png", png()), ("a.cls", b"\xff")], r"a\.tar/a\.cls cannot be read"),
        ([("a.png", png()), ("a.cls", b"")], r"a\.tar/a\.cls: label '' is neither a whole number nor a class name"),
        ([("a.png", png()), ("a.json", b"{")], r"a\.tar/a\.json cannot be read"),
        ([("a.png", png()), ("a.png", png())], r"a\.tar holds a\.png twice"),
        ([("a.txt", b"text")], r"no images in these shards \(\*\.jpg"),
        ([], r"no images in these shards|is not an intact"),
    ],
)
def test_shards_that_make_no_data_set(tmp_path: Path, members: Members, message: str) -> None:
    write_shard(tmp_path / "a.tar", members)
    refused(tmp_path, message)


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    refused(tmp_path, r"no shards .*\*\.tar")
    refused(tmp_path / "a.tar", "no such shard: .*a.tar")
    refused(tmp_path / "*.tar", "no file")
    write_shard(tmp_path / "set-train-0.tar", samples(0, 2, classes=2))
    refused(tmp_path / "set-{split}-{0..1}.tar", "no such shard: .*set-train-1.tar")
    refused(tmp_path / "set-{split}-0.tar", "no shards of val, validation or test", "val")
    write_shard(tmp_path / "set-val-0.tar", samples(0, 3, classes=3))
    refused(tmp_path / "set-{split}-0.tar", "class '2' of the validation images is not in the training images", "val")
    with pytest.raises(
        DataError, match=r"no labels, which this command needs; give every image a \.cls, and keep shards of"
    ):
        open_source(DataConfig(spec=f"wds:{tmp_path}/set-val-0.tar"), "val", need_labels=True)


def test_samples_that_cannot_be_read_are_told_apart(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    members = [("a.png", png(1)), ("b.png", b""), ("c.png", b"text"), ("d.jpg", png()[:40]), ("e.png", bomb)]
    source = opened(write_shard(tmp_path / "a.tar", members))
    for index, reason in ((1, "empty file"), (2, "not an image"), (3, "."), (4, "more than .* pixels")):
        with pytest.raises(BadImage, match=reason) as caught:
            source.read(index)
        assert caught.value.path == source.path(index) and "\n" not in str(caught.value)
    assert source.read(0).shape == (3, 3, 4)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:600])
    with pytest.raises(BadImage, match=r"a\.tar/c\.png \(its shard is shorter"):
        source.read(2)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BadImage, match="no such file or directory"):
        source.read(0)
