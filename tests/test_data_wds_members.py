"""Which members of a shard are an image, its label, or neither."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mimref.config.base import DataConfig
from mimref.data.open import open_source
from mimref.errors import DataError
from tests.wds_shards import Members, labels_of, numbers, opened, png, refused, samples, write_shard


def test_samples_are_named_as_webdataset_names_them(tmp_path: Path) -> None:
    members = [
        ("./dir.v2/one.seg.png", png(1)),  # not the image: its suffix is seg.png
        ("./dir.v2/one.JPG", png(2, kind="jpeg")),
        ("./dir.v2/one.png", png(3)),  # .jpg comes before .png
        ("._one.png", b"the hidden duplicate that some systems write"),
        ("two.txt", b"a caption without an image"),
        ("three.webp", png(4)),
        ("three.json", json.dumps({"label": 7, "url": "x"}).encode()),
        ("four.png", png(5)),
        ("four.cls", b"1\n"),
        ("four.json", json.dumps({"label": 8}).encode()),
    ]
    # A member belongs to the sample of its name, wherever it is in the shard.
    shard = write_shard(tmp_path / "a.tar", [*members, ("./dir.v2/one.cls", b"3")])
    source = opened(shard)
    assert [source.path(index).removeprefix(f"{shard}/") for index in range(3)] == [
        "./dir.v2/one.JPG",
        "three.webp",
        "four.png",
    ]
    assert labels_of(source) == ["3", "7", "1"]
    assert source.notices == [f"{shard}: 2 files are not used: 1 .png, 1 .seg.png"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_odd_names_in_every_format(tmp_path: Path, form: int) -> None:
    name = "d" * 90 + "/" + "n" * 90 + ".png" if form == tarfile.USTAR_FORMAT else "ünï/" * 40 + "n" * 120 + ".png"
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
        info = tarfile.TarInfo(name)
        info.size = len(png(9))
        archive.addfile(info, io.BytesIO(png(9)))
    source = opened(tmp_path / "a.tar")
    assert source.path(0) == f"{tmp_path}/a.tar/{name}" and numbers(source) == [9]


def test_parts_apart_are_joined(tmp_path: Path) -> None:
    pairs = samples(0, 8, classes=3)
    adjacent = opened(write_shard(tmp_path / "a.tar", pairs))
    shuffled = [pairs[index] for index in np.random.default_rng(1).permutation(len(pairs))]
    for members in (pairs[::2] + pairs[1::2], pairs[1::2] + pairs[::2], shuffled):
        source = opened(write_shard(tmp_path / "b.tar", members))
        found = dict(zip(numbers(source), labels_of(source), strict=True))
        assert found == dict(zip(numbers(adjacent), labels_of(adjacent), strict=True)) and not source.notices
    assert numbers(opened(write_shard(tmp_path / "b.tar", pairs[1::2] + pairs[::2]))) == list(range(8))
    # The same names in another shard denote other samples.
    write_shard(tmp_path / "c.tar", samples(0, 2, classes=3))
    assert len(opened(tmp_path / "{b,c}.tar")) == 10
    write_shard(tmp_path / "b.tar", [*pairs, ("00000.png", png())])
    refused(tmp_path / "b.tar", r"b\.tar holds 00000\.png twice")


def test_compound_names_of_images(tmp_path: Path) -> None:
    members = [("0.Image.JPG", png(1, kind="jpeg")), ("0.cls", b"a"), ("dir.v1/1.image.jpg", png(2, kind="jpeg"))]
    members.append(("dir.v1/1.cls", b"b"))
    source = opened(write_shard(tmp_path / "a.tar", members))
    assert source.path(0) == f"{tmp_path}/a.tar/0.Image.JPG" and labels_of(source) == ["a", "b"] and len(source) == 2
    both = [("0.left.png", png(1)), ("0.right.png", png(2)), ("0.cls", b"a"), ("1.left.png", png(3)), ("1.cls", b"b")]
    shard = write_shard(tmp_path / "b.tar", both)
    refused(
        shard,
        r"b\.tar/0 has several images \(.*first dot\): left\.png, right\.png; choose with --set data\.image=left\.png",
    )
    assert numbers(opened(shard, image="left.png")) == [1, 3]
    right = opened(shard, image="Right.png")
    assert numbers(right) == [2] and "1 label without an image" in right.notices[0]
    refused_image = DataConfig(spec=f"wds:{shard}", image="middle.png")
    with pytest.raises(DataError, match=r"no \.middle\.png in these shards, which data\.image names"):
        open_source(refused_image, "train")


def test_labels_that_settings_name(tmp_path: Path) -> None:
    members: Members = []
    plain = write_shard(tmp_path / "json.tar", [("0.png", png()), ("0.json", b'{"class": 1}')])
    with pytest.raises(DataError, match=r"no labels, which this command needs; give every image a \.cls"):
        open_source(DataConfig(spec=f"wds:{plain}"), "train", need_labels=True)
    for number, name in enumerate(("cat", "dog")):
        members += [(f"{number}.png", png(number)), (f"{number}.txt", name.encode())]
        members.append((f"{number}.meta.json", json.dumps({"label": number + 5}).encode()))
    shard = write_shard(tmp_path / "a.tar", members)
    assert opened(shard).labels is None
    with pytest.raises(DataError, match=r"--set data\.label=MEMBER \(txt, meta\.json\)"):
        open_source(DataConfig(spec=f"wds:{shard}"), "train", need_labels=True)
    assert labels_of(opened(shard, label="txt")) == ["cat", "dog"]
    assert labels_of(opened(shard, label="meta.json")) == ["5", "6"]
    for wrong, near in (("text", "; did you mean 'txt'?"), ("cls", "")):
        with pytest.raises(DataError) as caught:
            opened(shard, label=wrong)
        wanted = f"no image has a label in a member .{wrong}, which data.label names{near} (other members: "
        assert wanted in str(caught.value)
    write_shard(tmp_path / "b.tar", [*members, ("2.png", png(2))])
    with pytest.raises(DataError, match=r"b\.tar/2\.png has no \.txt, although other images have"):
        opened(tmp_path / "b.tar", label="txt")


def test_labels_that_nobody_chose_and_nothing_can_use_are_left_out(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [("a.png", png()), ("a.json", b'{"label": [1]}')])
    source = opened(shard)
    assert source.labels is None
    assert source.notices == [f"{shard}: 1 file is not used: 1 label of a wrong type"]
    with pytest.raises(DataError, match=r"a\.tar/a\.json: label \[1\] is neither a whole number nor a class name"):
        opened(shard, label="json")


def test_validation_without_the_chosen_labels_is_unlabelled(tmp_path: Path) -> None:
    write_shard(tmp_path / "train" / "a.tar", [("0.png", png()), ("0.txt", b"x")])
    write_shard(tmp_path / "val" / "a.tar", [("0.png", png())])
    assert labels_of(opened(tmp_path, label="txt")) == ["x"]
    assert opened(tmp_path, "val", label="txt").labels is None
    with pytest.raises(DataError, match=r"no image has a label in a member \.cls"):
        opened(tmp_path, "val", label="cls")


def test_a_table_beside_a_label_is_not_read(tmp_path: Path) -> None:
    for table in (b"{", b'{"label": [1]}'):
        for order in (1, -1):
            members = [("a.png", png()), *[("a.cls", b"x"), ("a.json", table)][::order]]
            assert labels_of(opened(write_shard(tmp_path / "a.tar", members))) == ["x"]


def test_other_formats_and_members_that_are_not_used(tmp_path: Path) -> None:
    members = [("0.bmp", png(1, kind="bmp")), ("1.TIFF", png(2, kind="tiff")), ("2.jfif", png(3, kind="jpeg"))]
    others = [
        ("3.heic", b"x"),
        ("4.heic", b"x"),
        ("5", b"x"),
        ("0.mask.png", png()),
        ("0.caption", b"x"),
        ("README", b""),
    ]
    shard = write_shard(tmp_path / "set" / "a.tar", [*members, *others, ("0.__key__", b"0"), ("._0.bmp", b"x")])
    source = opened(tmp_path / "set")
    assert len(source) == 3 and numbers(source)[:2] == [1, 2]
    assert source.notices == [f"{shard}: 5 files are not used: 2 .heic, 1 .__key__, 1 .mask.png, 1 without a suffix"]
    write_shard(tmp_path / "heic.tar", others[:2])
    refused(tmp_path / "heic.tar", r"no images in these shards .*; they hold 2 \.heic")


def test_spellings_of_labels_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = "\u00e9", "e\u0301"
    write_shard(tmp_path / "train" / "a.tar", [("0.png", png()), ("0.cls", composed.encode())])
    write_shard(tmp_path / "val" / "a.tar", [("0.png", png()), ("0.cls", decomposed.encode())])
    assert labels_of(opened(tmp_path)) == labels_of(opened(tmp_path, "val")) == [composed]
