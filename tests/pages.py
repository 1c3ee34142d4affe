"""Run folders with made-up results, and the content of their pages."""

import json
import math
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mimref.evaluation.config import CompareConfig
from mimref.reports.html.page import make_page
from mimref.reports.html.runs import read_run
from mimref.results import Row, write_results

ROWS: list[Row] = [
    {"model": "base", "metric": "knn_top1", "value": 81.25, "k": 10},
    {"model": "refined", "metric": "knn_top1", "value": 84.0, "k": 10},
    {"model": "base", "metric": "lowshot_top1", "value": 57.64, "shots": 1, "mean": 57.64, "std": 4.66, "splits": 20},
    {"model": "refined", "metric": "lowshot_top1", "value": 58.7, "shots": 1, "mean": 58.7, "std": 4.3, "splits": 20},
    {"model": "base", "metric": "cluster_acc", "value": 61.9, "mean": 60.9, "std": 2.4, "runs": 100},
    {"model": "refined", "metric": "cluster_acc", "value": 66.6, "mean": 60.2, "std": 4.1, "runs": 100},
    {"model": "base", "metric": "davies_bouldin", "value": 2.5},
    {"model": "refined", "metric": "davies_bouldin", "value": 1.75},
    {"model": "refined", "metric": "lowshot_top1", "value": 11.1, "shots": 1, "split": 1},
]


class Parsed(HTMLParser):
    """Elements and attributes of a page, cells of its tables by row, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.lines: list[list[str]] = []
        self.text: list[str] = []
        self.data = ""
        self.policy = ""
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._in.append("data" if dict(attrs).get("id") == "data" else tag)
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th") and self.lines:
            self.lines[-1].append("")
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = str(dict(attrs)["content"])

    def handle_endtag(self, tag: str) -> None:
        while self._in and self._in.pop() not in (tag, "data"):
            pass

    def handle_data(self, data: str) -> None:
        if "data" in self._in[-1:]:
            self.data += data
        elif not {"script", "style"} & set(self._in[-1:]):
            self.text.append(data)
            if {"td", "th"} & set(self._in):
                self.lines[-1][-1] += data


def write_run(
    folder: Path,
    rows: Sequence[Row] = ROWS,
    command: str = "compare",
    config: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    config = config or CompareConfig(base="base", refined=["refined"]).model_dump(mode="json")
    write_results(folder, command, config, 75.4, rows, **more)
    return folder


def write_log(folder: Path) -> list[dict[str, Any]]:
    """Write and return the log of two stages: 2 epochs of heads, 3 of the encoder."""
    lines: list[dict[str, Any]] = []
    for stage, epochs in (("heads", 2), ("encoder", 3)):
        for epoch in range(1, epochs + 1):
            loss = 9.5 / (1 + len(lines))
            lines.append(
                {"step": 4 * epoch, "epoch": epoch, "stage": stage, "loss": loss, "head_loss": [loss, loss / 3]}
            )
        lines.append({"step": 4 * epoch, "epoch": epoch, "stage": stage, "knn_top1": 50.0 + epochs, "rankme": math.nan})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def parsed(*folders: Path) -> Parsed:
    return Parsed(make_page([read_run(folder) for folder in folders]))


def charts(page: Parsed) -> dict[str, list[dict[str, Any]]]:
    """Return the data of every chart by its title."""
    found = {}
    for name, spec in json.loads(page.data)["charts"].items():
        found["map" if name.startswith("map") else spec["description"].split(". ")[0]] = spec["datasets"]["points"]
    return found
