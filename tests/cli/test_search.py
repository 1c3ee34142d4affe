"""`mimref search` from the command line to its files: galleries, queries by the dozen, and hostile names."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from mimref.cli import run
from tests.cli.evaluations import line
from tests.tiny import results, write_images

HOSTILE = ('<script>alert("x")</script>'.replace("/", "\u2215"), "a'b\"c&d", "x\u202egnp", "new\nline", "n" * 246)


class Page(HTMLParser):
    """Elements of a page with their attributes, and the page's text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for each, attributes in self.elements if each == tag]


@pytest.fixture
def queries(tmp_path: Path) -> list[Path]:
    return sorted((write_images(tmp_path, per_class=3, classes=("queries",)) / "queries").iterdir())


def test_search(folder: Path, tmp_path: Path, queries: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """One --query takes several values, as a shell's pattern gives them, or several take one each."""
    out = tmp_path / "out"
    files = [str(each) for each in queries]
    assert (
        run([*line("search", folder, "--query", *files[:2], "--k", "5"), "--query", files[2], "--out", str(out)]) == 0
    )
    printed = capsys.readouterr()
    assert all(file in printed.out.replace("\n", "") for file in files) and f"gallery in {out}" in printed.err
    table = pd.read_csv(out / "results.csv")
    assert table["query"].tolist() == [file for file in files for _ in range(5)]
    assert table["rank"].tolist() == [1, 2, 3, 4, 5] * 3
    document = results(out)
    assert document["command"] == "search" and document["config"]["queries"] == files
    assert [row["path"] for row in document["metrics"]] == table["path"].tolist()
    page = Page(out / "gallery.html")
    assert len(page.of("img")) == 3 * 6 and not page.of("script") and not page.of("link")
    assert all(str(each["src"]).startswith("data:image/jpeg;base64,") for each in page.of("img"))
    shown = [str(each["title"]) for each in page.of("figure") if each["class"] != "lead"]
    assert shown == table["path"].tolist()
    with Image.open(out / "gallery.png") as image:
        image.verify()
    assert run([*line("search", folder, "--query", files[0]), "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err


def test_an_image_of_the_data_has_a_class(folder: Path, tmp_path: Path) -> None:
    query = folder / "data" / "val" / "a" / "000.png"
    assert (
        run(line("search", folder, "--query", str(query), "--k", "60", "--out", str(tmp_path / "out"), "--quiet")) == 0
    )
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    marks = [str(each["class"]) for each in Page(tmp_path / "out" / "gallery.html").of("figure")]
    assert marks == ["lead", *("right" if label == "a" else "wrong" for label in table["class"])]
    assert {"right", "wrong"} < set(marks) and str(query) not in set(table["path"])


def test_hostile_names_are_escaped(folder: Path, tmp_path: Path, queries: list[Path]) -> None:
    data = tmp_path / "data"
    for split in ("train", "val"):
        for number, name in enumerate(("<b>one</b>".replace("/", "\u2215"), "two & 'three'")):
            (data / split / name).mkdir(parents=True)
            for hostile in HOSTILE:
                shutil.copy(queries[number], data / split / name / f"{hostile}.png")
    query = tmp_path / f"{HOSTILE[0]}.png"
    shutil.copy(queries[2], query)
    out = tmp_path / "out"
    more = ["--data", str(data), "--query", str(query), "--k", "20", "--out", str(out), "--quiet"]
    assert run(line("search", folder, *more)) == 0
    page = Page(out / "gallery.html")
    assert {tag for tag, _ in page.elements} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "section", "div"),
        *("figure", "img", "figcaption", "b"),
    }
    assert len(page.of("img")) == 21
    assert "\u202e" not in (out / "gallery.html").read_text(encoding="utf-8")
    titles = {str(each["title"]) for each in page.of("figure")}
    assert (
        len(titles) == 21 and any(HOSTILE[1] in title for title in titles) and any("\\n" in title for title in titles)
    )
    assert "<b>one" in page.text and len(pd.read_csv(out / "results.csv")) == 20


def test_mistakes(folder: Path, tmp_path: Path, queries: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    for words, said in {
        (): "--query",
        ("--query", str(tmp_path / "text.jpg")): "text.jpg",
        ("--query", "gone.jpg", str(queries[0])): "gone.jpg",
        ("--query", str(queries[0]), "--k", "0"): "--k 0",
        ("--query", str(queries[0]), "--split", "test"): "--split test",
        ("--query", str(queries[0]), "--blocks", "1,2"): "--blocks 1,2",
        # CKPT has to come first: after --query it is read as a query.
        ("--query", str(queries[0]), str(tmp_path)): "a folder",
    }.items():
        assert run(line("search", folder, *words)) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error


def test_more_neighbours_than_images(
    folder: Path, tmp_path: Path, queries: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--data", str(folder / "unlabelled"), "--query", str(queries[0]), "--k", "1000"]
    assert run(line("search", folder, *more, "--out", str(tmp_path / "out"))) == 0
    (warning,) = [text for text in capsys.readouterr().err.splitlines() if "warning" in text]
    assert "k 1000" in warning and "48" in warning
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert len(rows) == 48 and "class" not in rows[0]


def test_a_gallery_that_fails_costs_no_results(
    folder: Path,
    tmp_path: Path,
    queries: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mimref.reports.galleries.plot_gallery", fail)
    assert run(line("search", folder, "--query", str(queries[0]), "--out", str(tmp_path / "out"))) == 0
    (warning,) = [text for text in capsys.readouterr().err.splitlines() if "warning" in text]
    assert "no gallery" in warning and "No space left" in warning
    assert (tmp_path / "out" / "results.csv").exists() and (tmp_path / "out" / "gallery.html").exists()


# --- clusters of images without labels


def test_clusters_without_labels(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "out", ["--data", str(folder / "unlabelled")]
    assert run(line("cluster", folder, *data)) == 2
    error = capsys.readouterr().err
    assert "no labels" in error and "--clusters N" in error and error.count("\n") == 1
    assert run(line("cluster", folder, *data, "--clusters", "4", "--runs", "2", "--out", str(out))) == 0
    printed = capsys.readouterr()
    assert "acc, nmi, ami, ari" in printed.err and "left out" in printed.err
    rows = results(out)["metrics"]
    assert [row["metric"] for row in rows] == ["cluster_silhouette", "cluster_davies_bouldin"]
    assert {row["clusters"] for row in rows} == {4}
    table = pd.read_csv(out / "assignments.csv")
    assert list(table.columns) == ["path", "cluster", "distance", "rank"] and len(table) == 48
    for _, members in table.groupby("cluster"):
        assert sorted(members["rank"]) == list(range(1, len(members) + 1))
        assert members.sort_values("rank")["distance"].is_monotonic_increasing
    page = Page(out / "gallery.html")
    assert len(page.of("section")) == table["cluster"].nunique() and len(page.of("img")) == len(page.of("figure"))
    first = table[table["cluster"] == table["cluster"].value_counts().index[0]].sort_values("rank")["path"].tolist()
    assert [each["title"] for each in page.of("figure")][:6] == first[:6]
    assert (out / "gallery.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--clusters 48", "--clusters 48"),
        ("--clusters 1", "--clusters 1"),
        ("--clusters 3 --classes a", "--classes a"),
        ("--clusters 3 --metrics acc,nmi", "--metrics acc,nmi"),
    ],
)
def test_what_clusters_without_labels_cannot(
    words: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line("cluster", folder, "--data", str(folder / "unlabelled"), *words.split())) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_more_clusters_than_classes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--clusters", "5", "--runs", "2", "--metrics", "acc,sil", "--out", str(out), "--quiet"]
    assert run(line("cluster", folder, *more)) == 0
    metrics = [row["metric"] for row in results(out)["metrics"]]
    assert metrics == ["cluster_acc", "silhouette", "cluster_silhouette"]
    table = pd.read_csv(out / "assignments.csv")
    assert table["class"].tolist() == ["a"] * 8 + ["b"] * 8 and table["cluster"].between(0, 4).all()
