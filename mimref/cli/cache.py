"""`mimref cache`: cached features, and listings of images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from mimref.cli.options import Debug
from mimref.cli.parser import Argument, Option
from mimref.errors import ConfigError, DataError

LISTINGS = "listings"


@dataclass(kw_only=True)
class CacheOptions(Debug):
    """Of every `mimref cache` command."""

    panel: ClassVar[str] = "Data"
    cache: Annotated[str | None, Option("Default: the user's cache folder.", "DIR")] = None

    def folder(self) -> Path:
        """The folder of features. Raises ConfigError for a file."""
        from mimref.features.cache.contents import feature_folder

        folder = feature_folder(self.cache)
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--cache {folder}: is a file; choose a folder")
        return folder


def list_cache(options: CacheOptions) -> None:
    """List cached features: model, images, blocks and size.

    The last line counts the listings of large folders and of shards.

    Examples:
      mimref cache list
    """
    from mimref.features.cache.contents import list_entries, listings
    from mimref.reports.terminal import print_cache

    folder = options.folder()
    # A folder of the user's choice holds features only.
    print_cache(list_entries(folder), folder, None if options.cache else listings())


@dataclass(kw_only=True)
class ClearOptions(CacheOptions):
    """Of `mimref cache clear`."""

    keys: Annotated[list[str] | None, Argument(f"As listed, or {LISTINGS}; default: all.", "[KEY...]")] = None


def clear_cache(options: ClearOptions) -> None:
    """Delete cached features, and listings of folders and shards.

    Examples:
      mimref cache clear
      mimref cache clear listings
    """
    from mimref.features.cache.contents import clear, clear_listings, listings

    folder, keys = options.folder(), options.keys or []
    passes = [key for key in keys if key != LISTINGS]
    if passes or not keys:
        freed, busy = clear(folder, passes)
        typer.echo(f"{freed / 1e6:,.1f} MB freed in {folder}")
        for key in busy:
            typer.echo(f"{key} is being written and stays", err=True)
    if LISTINGS in keys if keys else options.cache is None:
        typer.echo(f"{clear_listings() / 1e6:,.1f} MB freed in {listings().folder}")


def verify_cache(options: CacheOptions) -> None:
    """Compare the checksums of all cached features; exit code 2 when something is damaged.

    Examples:
      mimref cache verify
    """
    from mimref.features.cache.contents import damaged_files

    folder = options.folder()
    intact, damaged = 0, []
    for key, files in damaged_files(folder):
        damaged += [f"{key}/{file}" for file in files]
        intact += not files
    typer.echo(f"{intact} encoder passes in {folder} are intact")
    if damaged:
        raise DataError(f"damaged: {', '.join(damaged)}; they are computed again when needed, or clear them")
