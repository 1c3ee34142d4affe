"""Image sources: copies, names, fingerprints, and sources in other processes: equality and memory."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from mimref.data.sources import FileSource, PathList
from tests.sources import growth_in_a_child, opened, write_images


def test_changing_a_read_image_leaves_the_source_alone() -> None:
    source = opened("digits")
    before = source.read(0).clone()
    image = source.read(0)
    image[0] = 77
    assert (image[1] == before[1]).all()  # the three channels do not share memory
    assert torch.equal(source.read(0), before)


@pytest.mark.skipif(os.name == "nt", reason="file names are Unicode there")
def test_odd_file_names(tmp_path: Path) -> None:
    write_images(tmp_path, "two\nlines.png", "ünï.png")
    try:
        os.rename(tmp_path / "ünï.png", os.fsencode(tmp_path) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    source = opened(tmp_path)
    assert [os.path.basename(source.path(i)) for i in range(2)] == ["two\\nlines.png", "\\udcff.png"]
    assert source.read(0).shape == source.read(1).shape == (3, 3, 4)
    assert source.fingerprint


def test_fingerprint_follows_names_sizes_and_times(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    first = opened(tmp_path).fingerprint
    assert opened(tmp_path).fingerprint == first
    os.utime(tmp_path / "a.png", (1, 1))
    touched = opened(tmp_path).fingerprint
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert len({first, touched, opened(tmp_path).fingerprint}) == 3


def test_fingerprint_does_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    write_images(tmp_path / "one", "a.png")
    first = opened(tmp_path / "one").fingerprint
    (tmp_path / "one").rename(tmp_path / "two")
    assert opened(tmp_path / "two").fingerprint == first


def test_sources_cross_process_borders(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    for spec in ("digits", tmp_path):
        source = opened(spec)
        copy = multiprocessing.reduction.ForkingPickler.loads(multiprocessing.reduction.ForkingPickler.dumps(source))
        assert torch.equal(copy.read(0), source.read(0))
        assert copy.fingerprint == source.fingerprint


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux tells the memory of a process")
def test_worker_memory_does_not_grow_with_the_number_of_files() -> None:
    count = 300_000
    paths = [f"n{index // 1300:08}/n{index // 1300:08}_{index}.JPEG" for index in range(count)]
    source = FileSource("many", "/nowhere", paths, None, None)
    assert growth_in_a_child(source.path, count) < 1024
    assert growth_in_a_child(lambda index: paths[index], count) > 8 * 1024  # what the list itself would cost


def test_path_lists_are_the_lists_they_were_made_of() -> None:
    paths = ["a/b.png", "", "ünï/two\nlines.png", "\udcff.png", "x" * 300]
    packed = PathList.pack(paths)
    assert list(packed) == paths and len(packed) == 5
    assert [packed[index] for index in range(-5, 5)] == paths + paths
    assert PathList.pack(packed) is packed
    for index in (5, -6):
        with pytest.raises(IndexError):
            packed[index]
    assert list(PathList.pack([])) == [] and len(PathList.pack([])) == 0
