"""`mimref cache`: features kept on disk."""

from typing import Annotated

import typer

from mimref.cli.options import DebugOption
from mimref.errors import DataError

FolderOption = Annotated[str | None, typer.Option("--cache", metavar="DIR", help="Default: the user's cache folder.")]
KeysArgument = Annotated[list[str] | None, typer.Argument(metavar="[KEY...]", help="As listed; default: all.")]


def list_cache(cache: FolderOption = None, debug: DebugOption = False) -> None:
    """What is kept: model, images, blocks, size."""
    from mimref.features.shelf import feature_folder, list_entries
    from mimref.terminal import print_cache

    folder = feature_folder(cache)
    print_cache(list_entries(folder), folder)


def clear_cache(keys: KeysArgument = None, cache: FolderOption = None, debug: DebugOption = False) -> None:
    """Delete kept features."""
    from mimref.features.shelf import clear, feature_folder

    folder = feature_folder(cache)
    freed, busy = clear(folder, keys or [])
    typer.echo(f"{freed / 1e6:,.1f} MB freed in {folder}")
    for key in busy:
        typer.echo(f"{key} is being written, and was left", err=True)


def verify_cache(cache: FolderOption = None, debug: DebugOption = False) -> None:
    """Read all that is kept and compare checksums; exit code 2 when something is damaged."""
    from mimref.features.shelf import damaged_files, feature_folder

    folder = feature_folder(cache)
    sound, damaged = 0, []
    for key, files in damaged_files(folder):
        damaged += [f"{key}/{file}" for file in files]
        sound += not files
    typer.echo(f"{sound} passes of encoders in {folder} are sound")
    if damaged:
        raise DataError(f"damaged: {', '.join(damaged)}; they are computed again when needed, or clear them")
