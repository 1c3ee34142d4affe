"""exhibits.json: written, read back, and refused when damaged."""

import json

import numpy as np
import pytest

from mimref.errors import OutputError
from mimref.evaluation.exhibits.contents import Cluster, Confusion, Exhibits, Query, Thumbnail

HOSTILE = ["<script>alert(1)</script>.png", '"quo\'ted".jpg', "x" * 250, "half\udc80.png", "\n\0"]


def example():
    images = [Thumbnail(path, "a" if n % 2 else None, b"\xff\xd8" + bytes([n])) for n, path in enumerate(HOSTILE)]
    return Exhibits(
        images=images,
        map_images=[0, 2, 4],
        maps={"base": np.array([[0.125, -3.5], [1e3, 0.001], [7, 8]], dtype=np.float32)},
        queries=[Query(1, {"base": [0, 2], "<b>": []})],
        confusions={"base": [Confusion("a", "</td>", 3, 0.25, [4, 3])]},
        clusters={"base": [Cluster(0, 5, "a", 0.6, [0], [4]), Cluster(1, 1, None, None, [2], [2])]},
        notes=["UMAP of all images."],
    )


def test_what_is_written_is_read_again(tmp_path):
    example().write(tmp_path)
    found, wanted = Exhibits.read(tmp_path), example()
    assert found is not None
    np.testing.assert_array_equal(found.maps["base"], wanted.maps["base"])
    assert found.maps["base"].dtype == np.float32
    for part in ("images", "map_images", "queries", "confusions", "clusters", "notes"):
        assert getattr(found, part) == getattr(wanted, part), part
    assert [each.name for each in tmp_path.iterdir()] == ["exhibits.json"]


def test_a_folder_without_exhibits_has_none(tmp_path):
    assert Exhibits.read(tmp_path) is None


def test_empty_exhibits_are_read_again(tmp_path):
    Exhibits([], [], {"base": np.empty((0, 2), dtype=np.float32)}, [], {}, {}, []).write(tmp_path)
    found = Exhibits.read(tmp_path)
    assert found is not None and found.maps["base"].shape == (0, 2)


def cut(document):
    return json.dumps(document)[:-40]


def changed(part, value):
    return lambda document: json.dumps({**document, part: value})


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda document: "",
        lambda document: "[" * 200_000,
        lambda document: "{}",
        lambda document: "\xff",
        changed("images", [{"path": "a", "label": None, "jpeg": "not base64!"}]),
        changed("images", [{"path": "a", "label": None, "jpeg": "AAAA"}]),
        changed("images", []),
        changed("map_images", [0, 1, 5]),
        changed("map_images", [0, 1, -1]),
        changed("maps", {"base": [[0, 1]]}),
        changed("maps", {"base": [[0, 1], [0, float("nan")], [0, 1]]}),
        changed("maps", {"base": [[0, 1], [0, 1, 2], [0, 1]]}),
        changed("queries", [{"image": 0}]),
        changed("queries", [{"image": 0, "neighbours": {"base": [9]}}]),
        changed("confusions", {"base": [[]]}),
        changed("clusters", {"base": [{"number": 0}]}),
        changed("notes", None),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    file = tmp_path / "exhibits.json"
    file.write_bytes(damage(json.loads(example().to_json())).encode("latin-1"))
    with pytest.raises(OutputError) as caught:
        Exhibits.read(tmp_path)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    (tmp_path / "exhibits.json").mkdir()
    with pytest.raises(OutputError, match="exhibits"):
        Exhibits.read(tmp_path)
