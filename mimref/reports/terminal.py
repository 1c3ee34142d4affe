"""Terminal output of a command: progress, notes and warnings on standard error, results on standard output."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from mimref.progress import Listener
from mimref.reports.metrics import UNDEFINED, is_undefined, spread_legend
from mimref.reports.progress import ProgressDisplay, show_progress
from mimref.reports.tables import FirstThatFits, best_table, differences_table, long_table, plain_table
from mimref.results import Row

if TYPE_CHECKING:
    from mimref.encoders.backbones import BackboneArchitecture
    from mimref.encoders.inspection import Inspection
    from mimref.features.cache.contents import CacheEntry, Listings


class Terminal(Listener):
    """A listener that prints to standard error; if `quiet`, only warnings.

    If printing fails, because the terminal is closed or a disk is full, it prints nothing and the work continues.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._open = ExitStack()
        self._warned: set[str] = set()
        self._label: str | None = None
        self._bar: ProgressDisplay | None = None

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._open.close()

    def progress(self, label: str, done: int, total: int) -> None:
        """Advance the bar of `label`; a new label ends the previous bar."""
        if self._quiet:
            return
        try:
            if label != self._label or self._bar is None:
                self._open.close()
                self._label, self._bar = label, self._open.enter_context(show_progress(label))
            self._bar.update(done, total)
        except OSError:
            self._quiet = True

    def note(self, message: str) -> None:
        """Print a line of information."""
        if not self._quiet:
            self._print(message)

    def warn(self, message: str) -> None:
        """Print a warning, each only once: several encoders may read the same images."""
        if message not in self._warned:
            self._warned.add(message)
            self._print(f"warning: {message}")

    def _print(self, line: str) -> None:
        # Printing directly would break a live bar: print through it.
        with suppress(OSError):
            if self._bar is not None:
                self._bar.log(line)
            else:
                typer.echo(line, err=True)


_KINDS = {1: "gray ", 3: ""}
"""Kinds of images by number of channels."""


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table that suits the rows; nothing if there are none."""
    if rows:
        Console().print(best_table(rows))
        _explain(rows)


def print_comparison(rows: Sequence[Row], base: str) -> None:
    """Print several models side by side, with their differences from the model `base`."""
    Console().print(FirstThatFits(differences_table(rows, base), long_table(rows, base)))
    _explain(rows)


def print_found(rows: Sequence[Row]) -> None:
    """Print the nearest images of every query."""
    names = ["rank", "similarity", "path", *(["class"] if any("class" in row for row in rows) else [])]
    for query in dict.fromkeys(str(row["query"]) for row in rows):
        lines = (
            (str(row["rank"]), f"{row['similarity']:.4f}", str(row["path"]), str(row.get("class", "")))[: len(names)]
            for row in rows
            if row["query"] == query
        )
        Console().print(Text(query, style="bold"), plain_table(names, lines, right=names[:2]), sep="\n")


def _explain(rows: Sequence[Row]) -> None:
    # Side by side, models have no spread over a clustering's runs.
    several = len({row.get("model") for row in rows}) > 1
    if legend := spread_legend([row for row in rows if not (several and "runs" in row)]):
        typer.echo(legend)
    if any(is_undefined(row) for row in rows):
        typer.echo(UNDEFINED)


def print_blocks(rows: Sequence[Row], heads: Mapping[str, Sequence[int]]) -> None:
    """Print a curve over the blocks for every model, and the blocks recommended for heads."""
    from mimref.evaluation.blocks.statistics import blocks_text
    from mimref.reports.charts import block_chart

    for model in dict.fromkeys(str(row["model"]) for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        Console().print(block_chart(of_model, heads=heads.get(model, ()), title=model))
        if model in heads:
            typer.echo(f"recommended heads: --heads {blocks_text(heads[model])}")
    _explain(rows)


def print_cache(entries: Sequence["CacheEntry"], folder: Path, listings: "Listings | None" = None) -> None:
    """Print the entries of a cache folder, newest last, and the total size of the listings."""
    names = ("key", "model", "data", "images", "columns", "MB", "written")
    lines = [
        (each.key, each.model, each.data, f"{each.rows:,}", each.columns, f"{each.bytes / 1e6:,.1f}", each.written)
        for each in entries
    ]
    if lines:
        Console().print(plain_table(names, lines, right=("MB",)))
    typer.echo(f"{sum(entry.bytes for entry in entries) / 1e6:,.1f} MB in {folder}")
    if listings is not None:
        count = f"listings of folders and shards: {listings.count}"
        typer.echo(f"{listings.bytes / 1e6:,.1f} MB in {listings.folder} ({count})")


def print_inspection(inspection: "Inspection") -> None:
    """Print facts about a weights file, and the origin, shape and type of its tensors."""
    from mimref.encoders.inspection import by_block

    facts = _facts(inspection)
    width = max(map(len, facts))
    for label, value in facts.items():
        typer.echo(f"{label:{width}}  {value}")
    Console().print(plain_table(("tensor", "in the file", "shape and type"), by_block(inspection.tensors)))


def _classifier_facts(recorded: Any) -> dict[str, str]:
    """Return the header's facts about a classifier; none if the record is missing or damaged."""
    if not isinstance(recorded, dict) or not isinstance(names := recorded.get("classes"), list):
        return {}
    from mimref.data.decode import first_of

    pooled = "the mean of the patch tokens" if recorded.get("pool") == "mean" else "the CLS token"
    return {"classifier": f"{len(names)} classes ({first_of(list(map(str, names)))}), reads {pooled}"}


def _facts(inspection: "Inspection") -> dict[str, str]:
    from mimref.encoders.positions import RULES
    from mimref.encoders.vit import Architecture

    architecture = inspection.architecture
    if not isinstance(architecture, Architecture):
        return _backbone_facts(inspection, architecture)
    features = {
        "post-norm" if architecture.post_norm else "pre-norm": True,
        "no CLS token": not architecture.class_token,
        f"{architecture.registers} register tokens": architecture.registers > 0,
        "LayerScale": architecture.layer_scale,
        "SwiGLU": architecture.swiglu,
        "no final norm": not architecture.post_norm and not architecture.final_norm,
        "sin-cos positions" if architecture.fixed_positions else "learned positions": True,
    }
    return {
        **_origin_facts(inspection),
        "architecture": f"{architecture.name}, {architecture.depth} blocks of width {architecture.width}, "
        f"{architecture.num_heads} heads, patches of {architecture.patch_size} pixels, "
        f"{_KINDS.get(architecture.channels, f'{architecture.channels}-channel ')}images of {architecture.image_size}",
        **({} if inspection.prefix == "." else {"encoder": f"below {inspection.prefix}"}),
        **({"other encoders": ", ".join(inspection.others)} if inspection.others else {}),
        "positions": f"of {inspection.grid[0]} x {inspection.grid[1]} patches",
        "features": ", ".join(name for name, present in features.items() if present),
        "interpolation": f"{architecture.interpolation} ({RULES[architecture.interpolation]})"
        f"{', a guess' if inspection.guesses_interpolation else ''}",
        **_file_facts(inspection),
    }


def _origin_facts(inspection: "Inspection") -> dict[str, str]:
    return {
        "file": inspection.file,
        "format": inspection.format,
        "source": inspection.source or "cannot be inferred from the weights",
        "licence": inspection.licence or "unknown",
    }


def _backbone_facts(inspection: "Inspection", architecture: "BackboneArchitecture") -> dict[str, str]:
    rule = architecture.sizes
    limit = "" if rule.largest is None else f" up to {rule.largest}"
    options = ", ".join(f"{key}={value}" for key, value in architecture.options)
    return {
        **_origin_facts(inspection),
        "architecture": f"{architecture.name} of timm, {architecture.depth} blocks or stages of width "
        f"{', '.join(map(str, dict.fromkeys(architecture.widths)))}, images of {architecture.image_size}",
        **({"options": options} if options else {}),
        "image sizes": f"multiples of {rule.step} pixels{limit}",
        **_file_facts(inspection),
    }


def _file_facts(inspection: "Inspection") -> dict[str, str]:
    """Return the facts that are printed for every kind of encoder."""
    return {
        "parameters": f"{inspection.parameters:,}",
        **_classifier_facts(inspection.header.get("classifier")),
        **{key: value for key, value in inspection.header.items() if isinstance(value, str)},
        **{
            f"dropped, {group}": ", ".join(names[:3]) + (f", ... ({len(names)} tensors)" if len(names) > 3 else "")
            for group, names in inspection.dropped.items()
        },
        "missing": "nothing",
        **{f"notice {number}": notice for number, notice in enumerate(inspection.notices, start=1)},
    }
