"""What a command shows: a run's progress, notes and warnings on standard error, its results on standard output."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mimref.reports.progress import ProgressDisplay, show_progress
from mimref.reports.tables import (
    benchmark_table,
    best_table,
    classes_table,
    differences_table,
    inspection_table,
    view_rates_table,
)

if TYPE_CHECKING:
    from mimref.encoders.inspection import Inspection
    from mimref.features.cache.contents import CacheEntry, Listings
    from mimref.results import Row


class Terminal:
    """A listener of runs that prints to standard error; `quiet` keeps the warnings only."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._open = ExitStack()
        self._label: str | None = None
        self._bar: ProgressDisplay | None = None

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def progress(self, label: str, done: int, total: int) -> None:
        """Advance the bar of `label`; another label ends the bar before."""
        if label != self._label or self._bar is None:
            self._open.close()
            self._label, self._bar = label, self._open.enter_context(show_progress(label, quiet=self._quiet))
        self._bar.update(done, total)

    def note(self, message: str) -> None:
        """A line worth reading."""
        if not self._quiet:
            self._print(message)

    def warn(self, message: str) -> None:
        """A line that asks for attention."""
        self._print(f"warning: {message}")

    def _print(self, line: str) -> None:
        # A line printed past a live bar would tear it.
        if self._bar is not None and not self._quiet:
            self._bar.log(line)
        else:
            typer.echo(line, err=True)


def print_rows(rows: Sequence["Row"]) -> None:
    """The table that suits a run's results; nothing when there are none."""
    if rows:
        Console().print(best_table(rows))


def print_comparison(rows: Sequence["Row"], base: str) -> None:
    """Several models side by side, with their differences to `base`."""
    Console().print(differences_table(rows, base))


def print_classes(rows: Sequence["Row"]) -> None:
    """The results of single classes."""
    Console().print(classes_table(rows))


def print_blocks(rows: Sequence["Row"], heads: Mapping[str, Sequence[int]]) -> None:
    """A curve over the blocks of every model, and where heads belong; heads: recommended blocks of every model."""
    from mimref.evaluation.blocks.statistics import blocks_text
    from mimref.reports.charts import block_chart

    for model in dict.fromkeys(str(row["model"]) for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        Console().print(block_chart(of_model, heads=heads.get(model, ()), title=model))
        if model in heads:
            typer.echo(f"recommended heads: --heads {blocks_text(heads[model])}")


def print_benchmark(rows: Sequence["Row"]) -> None:
    """Ratios of two ways' times, with both times and the sizes they were measured at."""
    Console().print(benchmark_table(rows))


def print_view_rates(rows: Sequence["Row"]) -> None:
    """Pipelines that make views, and how fast each is."""
    Console().print(view_rates_table(rows))


def print_cache(entries: Sequence["CacheEntry"], folder: Path, listings: "Listings | None" = None) -> None:
    """What a cache folder holds, the newest last, and the sum of the listings."""
    table = Table()
    for name in ("key", "model", "data", "images", "columns"):
        table.add_column(name, overflow="fold")
    table.add_column("MB", justify="right")
    table.add_column("written")
    for entry in entries:
        size = f"{entry.bytes / 1e6:,.1f}"
        cells = (entry.key, entry.model, entry.data, f"{entry.rows:,}", entry.columns, size, entry.written)
        table.add_row(*map(Text, cells))
    if entries:
        Console().print(table)
    typer.echo(f"{sum(entry.bytes for entry in entries) / 1e6:,.1f} MB in {folder}")
    if listings is not None:
        kept = f"listings of folders and shards: {listings.count}"
        typer.echo(f"{listings.bytes / 1e6:,.1f} MB in {listings.folder} ({kept})")


def print_inspection(inspection: "Inspection") -> None:
    """What a weights file is."""
    architecture = inspection.architecture
    features = {
        "post-norm" if architecture.post_norm else "pre-norm": True,
        "no CLS token": not architecture.class_token,
        f"{architecture.registers} register tokens": architecture.registers > 0,
        "LayerScale": architecture.layer_scale,
        "SwiGLU": architecture.swiglu,
        "no final norm": not architecture.post_norm and not architecture.final_norm,
        "sin-cos positions" if architecture.fixed_positions else "learned positions": True,
    }
    facts = {
        "file": inspection.file,
        "format": inspection.format,
        "source": inspection.source or "not told by the weights",
        "licence": inspection.licence or "not known",
        "architecture": f"{architecture.name}, {architecture.depth} blocks of width {architecture.width}, "
        f"{architecture.num_heads} heads, patches of {architecture.patch_size} pixels, "
        f"images of {architecture.image_size}",
        "features": ", ".join(name for name, present in features.items() if present),
        "parameters": f"{inspection.parameters:,}",
    }
    facts |= {key: str(value) for key, value in inspection.header.items() if isinstance(value, str)}
    facts |= {f"dropped, {group}": _some(names) for group, names in inspection.dropped.items()}
    facts["missing"] = "nothing"
    for number, notice in enumerate(inspection.notices, start=1):
        facts[f"notice {number}"] = notice
    width = max(map(len, facts))
    for label, value in facts.items():
        typer.echo(f"{label:{width}}  {value}")
    Console().print(inspection_table(inspection))


def _some(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} tensors)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
