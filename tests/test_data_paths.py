"""Lists of paths without one object per path."""

import numpy as np
import pytest

from mimref.data.index import paths as data_paths
from mimref.data.index.paths import PathList


def test_path_lists_are_the_lists_they_were_made_of() -> None:
    paths = ["a/b.png", "", "ünï/two\nlines.png", "\udcff.png", "x" * 300]
    packed = PathList.pack(paths)
    assert list(packed) == paths and len(packed) == 5
    assert [packed[index] for index in range(-5, 5)] == paths + paths
    assert list(packed.take(np.array([4, 0, 0]))) == [paths[4], paths[0], paths[0]]
    assert PathList.pack(packed) is packed
    for index in (5, -6):
        with pytest.raises(IndexError):
            packed[index]
    assert list(PathList.pack([])) == [] and len(PathList.pack([])) == 0


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_chosen_paths_equal_a_plain_loop(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_paths, "CHUNK", at_once)
    draw = np.random.default_rng(0)
    paths = ["é" * int(length) + str(number) * int(number % 2) for number, length in enumerate(draw.integers(0, 9, 50))]
    packed = PathList.pack(paths)
    # Bytes before the first path and after the last, as a table's buffers have them.
    within = PathList(np.concatenate([packed.content[:7], packed.content, packed.content[:5]]), packed.ends + 7)
    for rows in (np.arange(50), np.arange(50)[::-3], draw.integers(0, 50, 200), np.arange(0), np.array([0])):
        for source in (packed, within):
            assert list(source.take(rows)) == [paths[row] for row in rows]
    with pytest.raises(IndexError):
        packed.take(np.array([50]))
