"""What a command shows: a run's progress, notes and warnings on standard error, its results on standard output."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from mimref.report import ProgressDisplay, best_table, inspection_table, show_progress

if TYPE_CHECKING:
    from mimref.encoders.inspection import Inspection
    from mimref.evaluation.metrics import Row


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
