"""Search against loops in float64 over all pairs, and the exclusion of the queries themselves."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mimref
from mimref.api import extract, load
from mimref.data.sources import FileSource
from mimref.errors import ConfigError, DataError, UserErrors
from mimref.evaluation.search import protocol
from mimref.evaluation.search.config import SearchConfig
from mimref.evaluation.search.protocol import SearchResult, search
from mimref.features.matrix import OneAfterAnother
from mimref.progress import Listener
from tests.tiny import write_images, write_labelled, write_unlabelled, write_weights


class Heard(Listener):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("search")
    write_weights(made / "base.safetensors")
    write_labelled(made / "data")
    write_unlabelled(made / "plain")
    write_images(made, per_class=3, classes=("queries",))
    return made


def find(here: Path, *queries: str | Path, data: str = "data", **changes: Any) -> SearchResult:
    images = {"spec": data if ":" in data else str(here / data), "orientation": changes.pop("orientation", None)}
    options = {key: changes.pop(key) for key in ("listener", "pictures") if key in changes}
    table = {"checkpoint": str(here / "base.safetensors"), "data": images, "device": "cpu"}
    config = SearchConfig.model_validate(table | {"workers": 0, "queries": [str(each) for each in queries]} | changes)
    return search(config, **options)


@pytest.mark.parametrize("standardize", [True, False])
def test_plain_loops(here: Path, standardize: bool) -> None:
    encoder = load(here / "base.safetensors")
    parts = [extract(encoder, here / "data", split=split, device="cpu", workers=0) for split in ("train", "val")]
    paths = [path for part in parts for path in part.paths]
    gallery = np.concatenate([part.x for part in parts]).astype(np.float64)
    files = sorted((here / "queries").iterdir())
    query = extract(encoder, here / "queries", device="cpu", workers=0).x.astype(np.float64)
    mean, std = (gallery.mean(0), gallery.std(0)) if standardize else (0.0, 1.0)
    gallery, query = ((each - mean) / std for each in (gallery, query))
    result = find(here, *files, k=7, standardize=standardize)
    assert len(result.rows) == 3 * 7
    for number, file in enumerate(files):
        similarity = [
            float(row @ query[number] / np.linalg.norm(row) / np.linalg.norm(query[number])) for row in gallery
        ]
        best = sorted(range(len(gallery)), key=lambda i: -similarity[i])[:7]
        rows = [row for row in result.rows if row["query"] == str(file)]
        assert [row["path"] for row in rows] == [paths[at] for at in best]
        assert [row["similarity"] for row in rows] == pytest.approx([similarity[at] for at in best], abs=1e-5)
        assert [row["rank"] for row in rows] == list(range(1, 8))
        for row in rows:
            assert f"/{row['split']}/{row['class']}/" in str(row["path"])
    assert list(result.frame.columns) == ["model", "query", "rank", "path", "similarity", "split", "class"]


def test_images_without_labels_or_splits_are_searched_once(here: Path) -> None:
    heard = Heard()
    result = find(here, here / "queries" / "000.png", data="plain", k=100, listener=heard)
    paths = [str(row["path"]) for row in result.rows]
    assert sorted(paths) == sorted(str(each) for each in (here / "plain").rglob("*.png"))
    assert "class" not in result.frame.columns and {row["split"] for row in result.rows} == {"train"}
    assert any("k 100" in line and "48" in line for line in heard.warnings)


def test_one_split(here: Path) -> None:
    result = find(here, here / "queries" / "000.png", split="val", k=16)
    assert {row["split"] for row in result.rows} == {"val"} and len(result.rows) == 16


def test_a_folder_with_one_split_alone(here: Path, tmp_path: Path) -> None:
    write_images(tmp_path, per_class=2, split="train")
    assert len(find(here, here / "queries" / "000.png", data=str(tmp_path)).rows) == 4


def test_an_image_of_the_data_is_not_its_own_neighbour(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image is recognised by its path in results, another path, or a link; a copy elsewhere is another image."""
    image = here / "data" / "val" / "a" / "003.png"
    link = tmp_path / "link.png"
    link.symlink_to(image)
    copy = shutil.copy(image, tmp_path / "copy.png")
    monkeypatch.chdir(here / "data")
    expected = [(row["path"], row["similarity"]) for row in find(here, image, k=5).rows]
    assert str(image) not in {path for path, _ in expected}
    for same in ("val/a/003.png", "../data/./val/a/003.png", link):
        assert [(row["path"], row["similarity"]) for row in find(here, same, k=5).rows] == expected
    rows = find(here, copy, k=6).rows
    assert rows[0]["path"] == str(image) and rows[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert [row["path"] for row in rows[1:]] == [path for path, _ in expected]


def test_an_image_in_both_splits_is_the_same_image(here: Path, tmp_path: Path) -> None:
    files = sorted((here / "plain").rglob("*.png"))[:9]
    rows = [f"{files[number]},{split}" for split, most in (("train", 6), ("val", 9)) for number in range(most)]
    (tmp_path / "list.csv").write_text("\n".join(["path,split", *rows[:6], *rows[11:]]))
    found = find(here, files[5], data=f"list:{tmp_path}/list.csv", k=20).rows
    assert sorted(str(row["path"]) for row in found) == sorted(map(str, [*files[:5], *files[6:9]]))


def test_a_limit_leaves_no_image_twice(here: Path) -> None:
    """Without splits, all images are validation images, and a limit keeps some of them for training."""
    images = {"spec": str(here / "plain"), "train_limit": 10}
    table = {"checkpoint": str(here / "base.safetensors"), "data": images, "device": "cpu", "workers": 0, "k": 100}
    rows = search(SearchConfig.model_validate(table | {"queries": [str(here / "queries" / "000.png")]})).rows
    assert len({row["path"] for row in rows}) == len(rows) == 48


def test_rows_of_several_matrices() -> None:
    whole = np.arange(21.0).reshape(7, 3)
    matrix = OneAfterAnother([whole[:2].astype(np.float32), whole[2:2], whole[2:]])
    assert matrix.shape == (7, 3) and len(matrix) == 7 and matrix.dtype == np.float64
    for rows in (slice(0, 3), slice(None), slice(5, 50), np.array([6, 0, 2, 2]), np.array([], dtype=np.int64)):
        assert np.array_equal(matrix[rows], whole[rows])


def test_a_name_of_an_image_in_memory(tmp_path: Path) -> None:
    table = {"queries": ["digits/val/21"], "data": {"spec": "digits"}, "split": "val", "k": 359, "device": "cpu"}
    config = SearchConfig.model_validate(table)
    rows = search(config).rows
    assert len(rows) == 359 and "digits/val/21" not in {row["path"] for row in rows}
    assert rows[0]["class"] == "1"


def test_queries_are_decoded_as_the_images_are(here: Path, tmp_path: Path) -> None:
    """A query is rotated by its EXIF data only if the images are."""
    image = Image.open(here / "data" / "val" / "a" / "000.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    alike, other = (
        find(here, tmp_path / "turned.png", k=1, orientation=orientation).rows[0] for orientation in ("file", "exif")
    )
    assert alike["similarity"] == pytest.approx(1, abs=1e-5) and other["similarity"] < 0.99


def test_queries_are_searched_for_once(here: Path) -> None:
    heard, file = Heard(), here / "queries" / "000.png"
    assert len(find(here, file, file, k=2, listener=heard).rows) == 2
    assert any("more than once" in line and "000.png" in line for line in heard.warnings)


def test_python_gets_it_too() -> None:
    assert mimref.search is search and mimref.SearchConfig is SearchConfig


def test_what_is_no_query(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for query, reason in {
        tmp_path / "text.png": "not an image",
        tmp_path / "empty.png": "empty file",
        tmp_path / "gone.png": "neither a file",
        tmp_path: "a folder",
        "https://example.org/cat.jpg": "download it",
    }.items():
        with pytest.raises(DataError, match=reason):
            find(here, here / "queries" / "000.png", query)
    with pytest.raises(ConfigError, match="--query"):
        find(here)
    with pytest.raises(UserErrors) as caught:
        find(here, tmp_path / "text.png", data="nowhere", blocks="all")
    assert [part in str(caught.value) for part in ("nowhere", "--blocks all", "text.png")] == [True] * 3


def test_collapsed_features_are_reported(here: Path, tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    for number in range(3):
        shutil.copy(here / "queries" / "000.png", tmp_path / "same" / f"{number}.png")
    heard = Heard()
    assert len(find(here, here / "queries" / "001.png", data=str(tmp_path / "same"), listener=heard).rows) == 3
    assert any("same features" in line for line in heard.warnings)


def test_an_only_image_has_no_neighbours(here: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(here / "queries" / "000.png", tmp_path / "only.png"))
    heard = Heard()
    result = find(here, file, data=str(tmp_path), listener=heard, pictures=True)
    assert result.rows == [] and any("0 images" in line for line in heard.warnings)
    assert [len(found.neighbours) for found in result.pictures] == [0]


# --- pictures


def test_pictures_are_of_the_rows(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = here / "data" / "train" / "b" / "000.png", here / "queries" / "001.png"
    result = find(here, inside, outside, k=4, pictures=True)
    first, second = result.pictures
    assert [each.path for each in (*first.neighbours, *second.neighbours)] == [row["path"] for row in result.rows]
    assert [first.similarity, second.similarity] == [
        [row["similarity"] for row in result.rows[n : n + 4]] for n in (0, 4)
    ]
    assert (first.query.label, second.query.label) == ("b", None)
    assert all(each.jpeg.startswith(b"\xff\xd8") for each in (first.query, second.query, *second.neighbours))
    monkeypatch.setattr(protocol, "MOST_PICTURES", 9)
    assert [found.query.path for found in find(here, inside, outside, k=4, pictures=True).pictures] == [str(inside)]
    assert [len(found.neighbours) for found in find(here, inside, k=20, pictures=True).pictures] == [8]


# --- images found by name


def test_find(tmp_path: Path) -> None:
    write_images(tmp_path / "data", per_class=2, classes=("a", "b\n"))
    (tmp_path / "data" / "a" / "link.png").symlink_to(tmp_path / "data" / "a" / "001.png")
    files = ["a/000.png", "a/001.png", "b\n/000.png", "a/link.png", "gone.png"]
    source = FileSource("x", str(tmp_path / "data"), files, None, None, np.array([1, 2, 3, 4]))
    names = [
        f"{tmp_path}/data/a/001.png",
        f"{tmp_path}/data/a/000.png",
        f"{tmp_path}/data/b\n/000.png",
        f"{tmp_path}/data/b\\n/000.png",
        f"{tmp_path}/data/gone.png",
        "x",
    ]
    assert source.find(names) == [0, None, 1, 1, 3, None] and source.find([]) == []
    assert source.find([os.path.relpath(names[0])]) == [0]
