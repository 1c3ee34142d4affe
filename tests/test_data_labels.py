"""Which training images `data.train_limit` keeps."""

from pathlib import Path

import pytest
import torch

from mimref.errors import ConfigError
from tests.sources import names, opened, write_images


def take_turns(labels: list[int], limit: int) -> list[int]:
    """Take one image of every class in turn, in data order, by a plain loop."""
    waiting = {label: [i for i, each in enumerate(labels) if each == label] for label in sorted(set(labels))}
    taken: list[int] = []
    while len(taken) < limit:
        for queue in waiting.values():
            if queue and len(taken) < limit:
                taken.append(queue.pop(0))
    return sorted(taken)


@pytest.mark.parametrize("limit", [1, 4, 10, 99, 100, 1436, 1437])
def test_limit_takes_classes_in_turn(limit: int) -> None:
    whole, cut = opened("digits"), opened("digits", train_limit=limit)
    assert whole.labels is not None and cut.labels is not None
    kept = take_turns(whole.labels.tolist(), limit)
    assert cut.labels.tolist() == whole.labels[kept].tolist()
    assert [cut.path(i) for i in range(limit)] == [whole.path(i) for i in kept]
    assert all(torch.equal(cut.read(i), whole.read(k)) for i, k in enumerate(kept[:20]))


def test_limit_with_a_class_that_runs_out(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "a/1.png", *(f"b/{i}.png" for i in range(5)), *(f"c/{i}.png" for i in range(3)))
    write_images(tmp_path / "val", *(f"a/{i}.png" for i in range(9)))
    assert names(opened(tmp_path, train_limit=6), tmp_path / "train") == [
        "a/1.png",
        "b/0.png",
        "b/1.png",
        "b/2.png",
        "c/0.png",
        "c/1.png",
    ]
    assert len(opened(tmp_path, "val", train_limit=6)) == 9


def test_limit_without_labels_is_the_first_images(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{i}.png" for i in range(5)))
    assert names(opened(tmp_path, train_limit=2), tmp_path) == ["0.png", "1.png"]


def test_limit_beyond_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"data\.train_limit is 1438, but there are 1437 training images"):
        opened("digits", train_limit=1438)
