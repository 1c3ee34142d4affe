"""`mimref presets` and `mimref cache`: the shipped presets, and what is cached on disk."""

from pathlib import Path

import typer

from mimref.cli.execution import print_facts
from mimref.cli.options import Debug, Text
from mimref.cli.parser import argument, option
from mimref.errors import ConfigError, DataError


def list_presets(options: Debug) -> None:
    """Print the name and first line of every preset.

    Examples:
      mimref presets list
    """
    from mimref.config.presets import preset_names, preset_text

    print_facts({name: preset_text(name).partition("\n")[0].removeprefix("# ") for name in preset_names()})


class ShowOptions(Debug):
    name: str = argument("Name, as `mimref presets list` shows it.", "NAME")


def show_preset(options: ShowOptions) -> None:
    """Print a preset's file, with its comments.

    Examples:
      mimref presets show refine/mae_l16
    """
    from mimref.config.presets import preset_text

    typer.echo(preset_text(options.name), nl=False)


class CacheOptions(Debug, panel="Data"):
    cache: Text = option("Default: the user's cache folder.", "DIR")

    def folder(self) -> Path:
        """Return the folder of cached features. Raises ConfigError if it is a file."""
        from mimref.features.cache.contents import feature_folder

        folder = feature_folder(self.cache)
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--cache {folder}: is a file; choose a folder")
        return folder


def list_cache(options: CacheOptions) -> None:
    """List cached features and the size of the listings of folders and shards.

    Examples:
      mimref cache list
    """
    from mimref.features.cache.contents import list_entries, listings
    from mimref.reports.terminal import print_cache

    folder = options.folder()
    # A folder that the user names holds features only.
    print_cache(list_entries(folder), folder, None if options.cache else listings())


class ClearOptions(CacheOptions):
    keys: list[str] | None = argument(
        "Keys, as `mimref cache list` shows them, or `listings`; default: all.", "KEY", required=False
    )


def clear_cache(options: ClearOptions) -> None:
    """Delete cached features and listings of folders and shards.

    Examples:
      mimref cache clear
      mimref cache clear listings
    """
    from mimref.features.cache.contents import clear, clear_listings, listings

    folder, keys = options.folder(), options.keys or []
    passes = [key for key in keys if key != "listings"]
    if passes or not keys:
        freed, busy = clear(folder, passes)
        typer.echo(f"{freed / 1e6:,.1f} MB freed in {folder}")
        for key in busy:
            typer.echo(f"{key} is in use and was not deleted", err=True)
    if "listings" in keys if keys else options.cache is None:
        typer.echo(f"{clear_listings() / 1e6:,.1f} MB freed in {listings().folder}")


def verify_cache(options: CacheOptions) -> None:
    """Verify the checksums of all cached features; exit code 2 if any are damaged.

    Examples:
      mimref cache verify
    """
    from mimref.features.cache.contents import damaged_files

    folder = options.folder()
    found = dict(damaged_files(folder))
    typer.echo(f"{sum(not files for files in found.values())} cached passes in {folder} are intact")
    if damaged := [f"{key}/{file}" for key, files in found.items() for file in files]:
        raise DataError(f"damaged: {', '.join(damaged)} (recomputed when needed; `mimref cache clear` deletes them)")
