"""`mimref cache`: features and listings of images kept on disk."""

from pathlib import Path
from typing import Annotated

import typer

from mimref.cli.options import DebugOption
from mimref.errors import ConfigError, DataError

LISTINGS = "listings"
FolderOption = Annotated[str | None, typer.Option("--cache", metavar="DIR", help="Default: the user's cache folder.")]
KeysArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY...]", help=f"As listed, or {LISTINGS}; default: all.")
]


def list_cache(cache: FolderOption = None, debug: DebugOption = False) -> None:
    """What is kept: model, images, blocks, size; and how many listings of folders and shards."""
    from mimref.features.cache.contents import list_entries, listings
    from mimref.reports.terminal import print_cache

    folder = _folder(cache)
    # A folder that was chosen holds features alone.
    print_cache(list_entries(folder), folder, None if cache else listings())


def clear_cache(keys: KeysArgument = None, cache: FolderOption = None, debug: DebugOption = False) -> None:
    """Delete kept features, and listings of folders and shards."""
    from mimref.features.cache.contents import clear, clear_listings, listings

    folder = _folder(cache)
    passes = [key for key in keys or () if key != LISTINGS]
    if passes or not keys:
        freed, busy = clear(folder, passes)
        typer.echo(f"{freed / 1e6:,.1f} MB freed in {folder}")
        for key in busy:
            typer.echo(f"{key} is being written, and was left", err=True)
    if LISTINGS in keys if keys else cache is None:
        typer.echo(f"{clear_listings() / 1e6:,.1f} MB freed in {listings().folder}")


def verify_cache(cache: FolderOption = None, debug: DebugOption = False) -> None:
    """Read all features that are kept and compare checksums; exit code 2 when something is damaged."""
    from mimref.features.cache.contents import damaged_files

    folder = _folder(cache)
    sound, damaged = 0, []
    for key, files in damaged_files(folder):
        damaged += [f"{key}/{file}" for file in files]
        sound += not files
    typer.echo(f"{sound} passes of encoders in {folder} are sound")
    if damaged:
        raise DataError(f"damaged: {', '.join(damaged)}; they are computed again when needed, or clear them")


def _folder(chosen: str | None) -> Path:
    from mimref.features.cache.contents import feature_folder

    folder = feature_folder(chosen)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--cache {folder}: is a file; give a folder")
    return folder
