"""`mimref presets`: the settings that ship."""

from dataclasses import dataclass
from typing import Annotated

import typer

from mimref.cli.options import Debug
from mimref.cli.parser import Argument


def list_presets(options: Debug) -> None:
    """Print the name and first line of every preset.

    Examples:
      mimref presets list
    """
    from mimref.config.presets import preset_names, preset_text

    names = preset_names()
    width = max(map(len, names), default=0)
    for name in names:
        first_line = preset_text(name).partition("\n")[0]
        comment = first_line.removeprefix("#").strip() if first_line.startswith("#") else ""
        typer.echo(f"{name:{width}}  {comment}".rstrip())


@dataclass(kw_only=True)
class ShowOptions(Debug):
    """Of `mimref presets show`."""

    name: Annotated[str, Argument("As listed.", "NAME")]


def show_preset(options: ShowOptions) -> None:
    """Print a preset's file, with its comments.

    Examples:
      mimref presets show refine/mae_l16
    """
    from mimref.config.presets import preset_text

    typer.echo(preset_text(options.name), nl=False)
