"""Presets: TOML files, shipped with mimref or the user's own, which may build on a `base`."""

import json
import tomllib
from pathlib import Path
from typing import Any

from mimref.errors import ConfigError, did_you_mean

Table = dict[str, Any]


def preset_names(command: str | None = None) -> list[str]:
    """Return the full names (`refine/quickstart`) of the shipped presets of one command, or of all."""
    folder = _preset_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.toml"))
    return sorted(name for name in names if command is None or name.startswith(f"{command}/"))


def preset_text(name: str) -> str:
    """Return the TOML text of a shipped preset, with comments; a short name works if only one command has it."""
    return (_preset_folder() / f"{_full_name(name)}.toml").read_text(encoding="utf-8")


RECIPE = "recipe"
"""Given in place of a preset's name to derive the settings from encoder and images."""


def choose_refine_preset(
    preset: str | None, arch: str | None, source: str | None, weights: str | None, data: str | None = None
) -> str | None:
    """Choose the preset for the options of `mimref refine`; None if a recipe derives the settings.

    The given preset; else that of `--arch` and `--source` (default mae) or, if the paper has none, MAE's of the same
    size; else `quickstart` for the packaged encoder on digits. Raises ConfigError for `--source` alone.
    """
    if preset is not None:
        return None if preset == RECIPE else preset
    if arch is not None:
        size = arch.removeprefix("vit_")
        candidates = [f"refine/{source or 'mae'}_{size}", f"refine/mae_{size}"]
        known = preset_names("refine")
        return next((name for name in candidates if name in known), None)
    if source is not None and weights is None:
        raise ConfigError("--source does not name an encoder: give --arch NAME, --weights FILE or --preset NAME")
    packaged = source is None and weights in (None, "quickstart")
    return "refine/quickstart" if packaged and data in (None, "digits") else None


def choose_pretrain_preset(
    preset: str | None, arch: str | None, data: str | None = None, objective: str | None = None
) -> str | None:
    """Choose the preset for the options of `mimref pretrain`; None if a recipe derives the settings.

    The given preset; else, for the objective `mae`, MAE's if `--arch` is given, and `quickstart` for digits.
    """
    if preset is not None:
        return None if preset == RECIPE else preset
    if objective == "simmim":
        return None
    if arch is None:
        return "pretrain/quickstart" if data in (None, "digits") else None
    # MAE trains all sizes with one recipe.
    name = f"pretrain/mae_{arch.removeprefix('vit_')}"
    return name if name in preset_names("pretrain") else "pretrain/mae_l16"


def choose_finetune_preset(
    preset: str | None, arch: str | None, weights: str | None, data: str | None = None
) -> str | None:
    """Choose the preset for the options of `mimref finetune`; None if a recipe derives the settings.

    The given preset; else `quickstart` for the packaged encoder on digits.
    """
    if preset is not None:
        return None if preset == RECIPE else preset
    packaged = weights == "quickstart" or (weights is None and arch is None)
    return "finetune/quickstart" if packaged and data in (None, "digits") else None


def _preset_folder() -> Path:
    package = Path(__file__).parents[1]
    # A wheel carries the presets inside the package; a source checkout has them beside it.
    return package / "presets" if (package / "presets").is_dir() else package.parent / "presets"


def maker_of(path: str | Path) -> str:
    """Return the command that creates a folder named by presets only, such as `runs/pretrain-peak`; else `""`."""
    name = Path(path).name.removeprefix("pretrain-")
    if Path(path) != Path("runs", f"pretrain-{name}") or f"pretrain/{name}" not in preset_names("pretrain"):
        return ""
    return f"mimref pretrain --preset {name} --out {Path(path).as_posix()}"


def find_preset(name: str, command: str, folder: Path | None = None) -> tuple[str, Path]:
    """Find name and file of a preset; a path ending in .toml is relative to `folder` (default: the current one)."""
    if name.endswith(".toml"):
        return name, (folder or Path()) / Path(name).expanduser()
    full = _full_name(name, command)
    return full, _preset_folder() / f"{full}.toml"


def _full_name(name: str, command: str | None = None) -> str:
    known = preset_names(command)
    matches = [name] if name in known else [full for full in known if full.endswith(f"/{name}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"Preset {name!r} is ambiguous: {' or '.join(matches)}")
    if name in preset_names():
        raise ConfigError(f"Preset {name!r} belongs to `mimref {name.split('/')[0]}`, not to `mimref {command}`")
    hint = did_you_mean(name, [*known, *(full.partition("/")[2] for full in known)])
    raise ConfigError(f"Unknown preset {name!r}{hint or '; `mimref presets list` shows all'}")


def read_preset(path: Path, command: str, above: tuple[Path, ...] = ()) -> Table:
    """Read a preset file and merge it over its bases. above: the files that have it as a base."""
    resolved = path.resolve()
    if resolved in above:
        chain = " -> ".join(file.stem for file in (*above, resolved))
        raise ConfigError(f"Preset {path} has itself as a base: {chain}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Preset file {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Preset file {str(path)!r} is not valid TOML: {error}") from None
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base = {show_value(base)}: expected the name of a preset")
    _, base_path = find_preset(base, command, path.parent)
    return merge_tables(read_preset(base_path, command, (*above, resolved)), table)


def merge_tables(below: Table, above: Table) -> Table:
    """Return a new table with the keys of both; tables are merged key by key, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge_tables(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def show_value(value: Any) -> str:
    """Format a value for messages."""
    return json.dumps(value, default=str, ensure_ascii=False)
