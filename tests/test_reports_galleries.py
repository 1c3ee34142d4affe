"""Galleries: contents of pages and pictures, whatever the names of the images."""

import base64
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from mimref.evaluation.cluster.assignment import Assignment
from mimref.evaluation.exhibits.contents import Cluster, Thumbnail
from mimref.evaluation.search.protocol import Found, SearchResult
from mimref.reports.galleries import (
    PNG_STRIPS,
    PNG_TILES,
    Strip,
    Tile,
    cluster_notes,
    cluster_strips,
    plot_gallery,
    search_notes,
    search_strips,
    write_gallery,
)


def picture(path: str, label: str | None = None, size: tuple[int, int] = (40, 30)) -> Thumbnail:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, "JPEG")
    return Thumbnail(path, label, file.getvalue())


def test_a_page_holds_the_pictures_and_escapes_all_text(tmp_path: Path) -> None:
    red, hostile = picture("a.png"), '"><script>x</script>\u202e\udcff'
    tiles = [Tile(red, ["0.5", hostile], "right"), Tile(Thumbnail(hostile, None, b""), [hostile])]
    write_gallery(tmp_path / "page.html", hostile, [Strip(hostile, tiles, hostile)], [hostile])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text and "\u202e" not in text and text.count("&lt;script&gt;") == 8
    (src,) = re.findall(r'<img src="data:image/jpeg;base64,([^"]*)"', text)
    assert base64.b64decode(src) == red.jpeg and "cannot be read" in text
    assert not re.search(r'(src|href)="(?!data:)', text) and "default-src 'none'" in text


def test_pictures_of_any_shape_are_drawn(tmp_path: Path) -> None:
    shapes = [picture("$a_b$" * 40, "$x", size) for size in ((1, 200), (200, 1), (8, 8), (112, 84))]
    strips = [Strip("s", [Tile(each, ["0.5", "$"], "lead") for each in shapes * 4]) for _ in range(PNG_STRIPS + 5)]
    for name, shown in (
        ("many.png", strips),
        ("one.png", [Strip("s", [Tile(Thumbnail("x", None, b""))])]),
        ("no.png", []),
    ):
        plot_gallery(tmp_path / name, "title", shown)
        with Image.open(tmp_path / name) as image:
            image.load()
            if name == "many.png":
                assert abs(image.width - 0.85 * 150 * PNG_TILES) < 2
    pixels = np.asarray(Image.open(tmp_path / "many.png").convert("RGB")).reshape(-1, 3)
    assert (np.abs(pixels.astype(int) - (200, 30, 30)).max(axis=1) < 12).mean() > 0.1


def test_strips_of_a_search() -> None:
    near = [picture("1", "a"), picture("2", "b"), picture("3")]
    found = [Found(picture("q", "a"), near, [0.9, 0.8, 0.7]), Found(picture("p"), near, [0.9, 0.8, 0.7])]
    result = SearchResult([{"query": name} for name in "qpr"], 0.0, pictures=found)
    first, second = search_strips(result)
    assert [tile.mark for tile in first.tiles] == ["lead", "right", "wrong", ""]
    assert [tile.mark for tile in second.tiles] == ["lead", "", "", ""]
    assert [list(tile.caption) for tile in first.tiles] == [["query", "a"], ["0.900", "a"], ["0.800", "b"], ["0.700"]]
    assert any("2 of 3 queries" in note for note in search_notes(result))


def test_strips_of_clusters() -> None:
    clusters = [Cluster(4, 3, "a", 2 / 3, [0, 1], [2]), Cluster(1, 1, "b", 1.0, [3], [])]
    pictures = {0: picture("0", "a"), 1: picture("1", "b"), 2: picture("2", "a")}
    labels, cluster, distance = ["a", "b", "a", "b"], np.array([4, 4, 4, 1]), np.array([0.1, 0.2, 0.4, 0.0])
    assignment = Assignment(list("0123"), labels, cluster, distance, clusters, pictures)
    (strip,) = cluster_strips(assignment)
    assert (strip.title, strip.note) == ("Cluster 4", "3 images, 67% of class a")
    assert [tile.mark for tile in strip.tiles] == ["right", "wrong", "right"]
    assert [tile.caption[0] for tile in strip.tiles] == ["central 0.10", "central 0.20", "outlying 0.40"]
    assert any("1 largest of 2" in note for note in cluster_notes(assignment))
    assert assignment.rank().tolist() == [1, 2, 3, 1]
    assert assignment.table().decode().splitlines() == [
        "path,cluster,distance,rank,class",
        "0,4,0.100000,1,a",
        "1,4,0.200000,2,b",
        "2,4,0.400000,3,a",
        "3,1,0.000000,1,b",
    ]
