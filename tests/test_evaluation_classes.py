"""Classes selected by name or number, and their rows."""

from pathlib import Path

import numpy as np
import pytest

from mimref.errors import ConfigError
from mimref.evaluation.cluster.classes import choose_classes
from mimref.evaluation.cluster.config import ClusterConfig
from mimref.evaluation.cluster.protocol import cluster, evaluate_cluster

NAMES = ["apple", "Bread", "bread", "Cake", "7", "empty"]
LABELS = np.array([0, 1, 2, 3, 4, 0, 3])


@pytest.mark.parametrize(
    ("asked", "classes"),
    [
        ("apple,Cake", [0, 3]),
        (" cake , APPLE,apple ", [0, 3]),  # case matters only if two names differ in nothing else
        ("bread,Bread", [1, 2]),
        ("3,0", [0, 3]),
        ("7,1", [1, 4]),  # a class name takes precedence over a number
    ],
)
def test_names_and_numbers(asked: str, classes: list[int]) -> None:
    chosen = choose_classes(asked, NAMES, LABELS)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == classes


def test_a_file_of_names(tmp_path: Path) -> None:
    file = tmp_path / "food.txt"
    file.write_text("# sweet\ncake  # with icing\n\n  apple\n2\n")
    assert choose_classes(str(file), NAMES, LABELS).tolist() == [0, 2, 3]
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        choose_classes(str(file), NAMES, LABELS)
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="is 0 class"):
        choose_classes(str(file), NAMES, LABELS)


def test_the_name_of_a_class_is_not_taken_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("apple").write_text("Cake\nBread\n")
    with pytest.raises(ConfigError, match="'apple' is 1 class"):
        choose_classes("apple", NAMES, LABELS)


def test_labels_without_names() -> None:
    assert choose_classes("-1,12", None, np.array([12, -1, 5])).tolist() == [-1, 12]
    with pytest.raises(ConfigError, match="no class 3; labels are -1 to 12"):
        choose_classes("3,12", None, np.array([12, -1, 5]))
    with pytest.raises(ConfigError, match="no class names, so 'cake' is unknown"):
        choose_classes("cake,5", None, np.array([12, -1, 5]))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("aple,Cake", r"'aple' is not a class here; did you mean 'apple'\?"),
        ("xyzzy,Cake", "'xyzzy' is not a class here; classes have names like 'apple'"),
        ("lists/food.txt", "'lists/food.txt' is not a class and no file here"),
        ("BREAD,Cake", "'BREAD' may be any of Bread, bread"),
        ("empty,Cake", "'empty' has no images here"),
        ("9,Cake", "no class 9"),
        ("Cake,cake", "is 1 class; give at least two"),
        (",", "is 0 class"),
        ("", "is 0 class"),
    ],
)
def test_refuses_classes_that_are_not_there(asked: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        choose_classes(asked, NAMES, LABELS)
    assert str(caught.value).startswith("--classes")


def test_rows_of_the_chosen_classes_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 2, 5)).astype(np.float16), rng.permutation(np.arange(60) % 4)
    np.savez(tmp_path / "x.npz", x=x, y=y)
    files = (str(tmp_path / "x.npz"), str(tmp_path / "x.npz"))
    config = ClusterConfig(features=files, blocks="2", classes="3,0", metrics=["acc", "sil"], runs=3)
    result, _ = evaluate_cluster(config)
    kept = (y == 0) | (y == 3)
    expected = cluster(x[kept, 1], y[kept], metrics=["acc", "sil"], runs=3)
    assert [row["value"] for row in result.rows] == [row["value"] for row in expected]
    assert {row["classes"] for row in result.rows} == {2}
