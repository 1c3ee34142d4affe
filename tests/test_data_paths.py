"""Lists of paths without one object per path."""

import pytest

from mimref.data.sources import PathList


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
