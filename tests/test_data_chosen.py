"""Subsets of a source's images as sources of their own."""

from typing import Any

import numpy as np
import pytest
import torch

from mimref.data.sources import ArraySource, ImageSource, Subset


def numbered(labels: np.ndarray[Any, Any] | None) -> ArraySource:
    """A source of 100 images of 2 x 2 pixels, each filled with its own number."""
    images = np.arange(100, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    names = None if labels is None else [f"class{number}" for number in range(10)]
    return ArraySource("set", images, labels, names, "train", np.arange(100))


@pytest.mark.parametrize("rows", [[], [7], [99, 3, 3, 40]])
def test_chosen_images_are_those_of_the_source(rows: list[int]) -> None:
    whole = numbered(np.arange(100) % 10)
    some: ImageSource = Subset(whole, np.array(rows, dtype=np.int64))
    assert len(some) == len(rows)
    for at, row in enumerate(rows):
        assert torch.equal(some.read(at), whole.read(row))
        assert some.path(at) == f"set/train/{row}"
    assert some.labels is not None and some.labels.tolist() == [row % 10 for row in rows]
    assert (some.name, some.class_names, some.in_memory) == (whole.name, whole.class_names, True)
    assert Subset(numbered(None), np.array(rows, dtype=np.int64)).labels is None


def test_fingerprints_tell_choices_apart() -> None:
    rows = np.array([1, 2, 3])
    sources = [numbered(None), numbered(np.arange(100) % 10)]
    chosen = [Subset(source, each) for source in sources for each in (rows, rows[::-1], rows[:2])]
    assert len({some.fingerprint for some in [*sources, *chosen]}) == 8
    assert Subset(sources[0], rows.copy()).fingerprint == chosen[0].fingerprint
