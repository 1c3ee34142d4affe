"""Galleries of images as a self-contained HTML page and as a PNG: results of a search, and contents of clusters."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mimref.evaluation.cluster.assignment import Assignment
from mimref.evaluation.exhibits.contents import Thumbnail
from mimref.evaluation.search.protocol import SearchResult
from mimref.files import write_bytes
from mimref.reports.figures import COLORS, DPI, INK, save_figure
from mimref.reports.html.environment import page_environment
from mimref.reports.metrics import short_name

PNG_STRIPS = 20
PNG_TILES = 13
_TITLE, _CAPTION, _GAP = 0.24, 0.3, 0.1
"""Heights, in tiles, of a strip's title and note, of a tile's caption, and of the space between strips."""
_TILE_INCHES = 0.85


Mark = Literal["", "lead", "right", "wrong"]


@dataclass(frozen=True)
class Tile:
    """One image with a caption."""

    picture: Thumbnail
    caption: Sequence[str] = ()
    """Lines of the caption."""
    mark: Mark = ""
    """`lead`: the image to which the others of its strip belong. `right`, `wrong`: of the expected class or not."""


@dataclass(frozen=True)
class Strip:
    """Images that belong together."""

    title: str
    tiles: list[Tile]
    note: str = ""


def search_strips(result: SearchResult) -> list[Strip]:
    """Return a strip per query: the query, then its nearest images, framed if both classes are known."""
    strips = []
    for query, neighbours, similarity in result.pictures:
        tiles = [Tile(query, ["query", *([query.label] if query.label is not None else [])], "lead")]
        for picture, score in zip(neighbours, similarity, strict=False):
            known = query.label is not None and picture.label is not None
            mark: Mark = "" if not known else "right" if picture.label == query.label else "wrong"
            tiles.append(Tile(picture, [f"{score:.3f}", *filter(None, [picture.label])], mark))
        strips.append(Strip(query.path, tiles))
    return strips


def search_notes(result: SearchResult) -> list[str]:
    """Return notes on what a search's gallery shows, and what it leaves out."""
    queries = len({row["query"] for row in result.rows})
    notes = ["Nearest first; the number is the cosine similarity."]
    if any(found.query.label is not None for found in result.pictures):
        notes.append("For queries with a class, a solid frame marks the same class, a dashed frame another class.")
    if len(result.pictures) < queries:
        notes.append(f"The first {len(result.pictures)} of {queries} queries; results.csv has all.")
    return notes


def cluster_strips(assignment: Assignment) -> list[Strip]:
    """Return a strip per cluster, largest first: its most central images, then its most outlying ones."""
    strips = []
    for cluster in assignment.clusters:
        if not cluster.central or cluster.central[0] not in assignment.pictures:
            break
        tiles = []
        for word, positions in (("central", cluster.central), ("outlying", cluster.outlying)):
            for position in positions:
                picture, distance = assignment.pictures[position], float(assignment.distance[position])
                mark: Mark = "" if cluster.label is None else "right" if picture.label == cluster.label else "wrong"
                tiles.append(Tile(picture, [f"{word} {distance:.2f}", *filter(None, [picture.label])], mark))
        purity = "" if cluster.purity is None else f", {100 * cluster.purity:.0f}% of class {cluster.label}"
        strips.append(Strip(f"Cluster {cluster.number}", tiles, f"{cluster.size} images{purity}"))
    return strips


def cluster_notes(assignment: Assignment) -> list[str]:
    """Return notes on what a clustering's gallery shows, and what it leaves out."""
    shown = len(cluster_strips(assignment))
    notes = ["Largest cluster first. The number is the image's distance from the centre, 0 to 2."]
    if assignment.class_names is not None:
        notes.append("A solid frame marks the cluster's most frequent class, a dashed frame another class.")
    if shown < len(assignment.clusters):
        notes.append(f"The {shown} largest of {len(assignment.clusters)} clusters; assignments.csv has all.")
    return notes


def write_gallery(path: Path, title: str, strips: Sequence[Strip], notes: Sequence[str] = ()) -> None:
    """Write an HTML page that needs no other file and no network; all text is escaped.

    Raises OutputError if the file cannot be written.
    """
    text = page_environment().get_template("gallery.html").render(title=title, strips=strips, notes=notes)
    write_bytes(path, text.encode())


def plot_gallery(path: Path, title: str, strips: Sequence[Strip]) -> None:
    """Draw at most the first 20 strips, and of each at most the first 13 images.

    Images of the expected class have a solid frame, others a dashed one. Raises OutputError if writing fails.
    """
    shown = strips[:PNG_STRIPS]
    columns = max((len(strip.tiles[:PNG_TILES]) for strip in shown), default=1)
    columns, line = max(columns, 5), _TITLE + 1 + _CAPTION + _GAP
    height = 0.4 + line * len(shown)
    figure = Figure(figsize=(_TILE_INCHES * columns, _TILE_INCHES * height), dpi=DPI, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, columns), ylim=(height, 0))
    ax.axis("off")

    def write(x: float, y: float, text: str, size: float, **style: Any) -> None:
        ax.text(x, y, text, fontsize=size, color=INK, va="top", parse_math=False, **style)

    left_out = f" (the first {len(shown)} of {len(strips)})" if len(strips) > len(shown) else ""
    write(0.08, 0.08, short_name(title, 15 * columns) + left_out, 9, fontweight="bold")
    for number, strip in enumerate(shown):
        top = 0.4 + number * line
        heading = f"{strip.title}: {strip.note}" if strip.note else strip.title
        write(0.08, top + 0.04, short_name(heading, 19 * columns), 7)
        for place, tile in enumerate(strip.tiles[:PNG_TILES]):
            at = (place + 0.07, top + _TITLE)
            if tile.picture.jpeg:
                _draw(ax, tile.picture.jpeg, at)
            if tile.mark:
                color = {"lead": INK, "right": COLORS[2], "wrong": COLORS[1]}[tile.mark]
                dashed = "--" if tile.mark == "wrong" else "-"
                ax.add_patch(Rectangle(at, 0.86, 0.9, fill=False, edgecolor=color, linewidth=1.6, linestyle=dashed))
            caption = "\n".join(short_name(part, 16) for part in tile.caption[:2])
            write(place + 0.5, top + _TITLE + 0.93, caption, 5.5, ha="center")
    save_figure(figure, path)


def _draw(ax: Any, jpeg: bytes, at: tuple[float, float]) -> None:
    """Draw a picture as large as fits into a square of side 0.86 at a place."""
    with Image.open(io.BytesIO(jpeg)) as image:
        pixels = np.asarray(image.convert("RGB"))
    tall, wide = (side / max(pixels.shape[:2]) * 0.86 for side in pixels.shape[:2])
    left, top = at[0] + (0.86 - wide) / 2, at[1] + 0.02 + (0.86 - tall) / 2
    ax.imshow(pixels, extent=(left, left + wide, top + tall, top), aspect="auto", interpolation="nearest")
