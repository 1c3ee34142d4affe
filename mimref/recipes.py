"""From presets and the command line to a config: TOML files that build on a `base`, options, and `--set a.b=value`."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mimref.config import CommandConfig
from mimref.errors import ConfigError, did_you_mean

Table = dict[str, Any]
C = TypeVar("C", bound=CommandConfig)


def load_config(
    model: type[C], preset: str | None = None, overrides: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> C:
    """Build a checked config: defaults, then the preset and its bases, then `overrides`, then `sets`.

    preset: a name (`quickstart` or `refine/quickstart` for RefineConfig) or the path of a `.toml` file.
    overrides: dotted key to value; None does not override; text for a setting of another type is read as in `sets`.
    sets: `a.b=value`, values written as in TOML, bare words as strings, `none` to unset.
    Raises ConfigError with one line that names the setting or preset at fault.
    """
    table: Table = {}
    if preset is not None:
        name, path = _find_preset(preset, model.command)
        table = _read_preset(path, model.command, ())
        table.setdefault("preset", name)
    for key, value in (overrides or {}).items():
        if value is not None:
            field = _find_field(model, key)
            parsed = _parse_value(field, value) if isinstance(value, str) and not _takes_text(field) else value
            table = _merge(table, _nest(model, key, parsed))
    for assignment in sets:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set {assignment!r} is not of the form KEY=VALUE, such as heads.temperature=0.3")
        table = _merge(table, _nest(model, key, _parse_value(_find_field(model, key), text.strip())))
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise ConfigError(_describe(error, model, table)) from None


def preset_names(command: str | None = None) -> list[str]:
    """Full names (`refine/quickstart`) of the shipped presets of one command, or of all."""
    folder = _preset_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.toml"))
    return sorted(name for name in names if command is None or name.startswith(f"{command}/"))


def preset_text(name: str) -> str:
    """The TOML text of a shipped preset, comments included; a short name works where only one command has it."""
    matches = [known for known in preset_names() if name == known or known.endswith(f"/{name}")]
    if name in matches:
        matches = [name]
    if not matches:
        raise ConfigError(_unknown_preset(name, None))
    if len(matches) > 1:
        raise ConfigError(f"Preset {name!r} is ambiguous: {' or '.join(matches)}")
    return (_preset_folder() / f"{matches[0]}.toml").read_text(encoding="utf-8")


def choose_refine_preset(preset: str | None, arch: str | None, source: str | None, weights: str | None) -> str:
    """The preset that the options of `mimref refine` ask for.

    The given one; else `quickstart` when nothing else is given; else that of the pair of `--arch` and `--source`
    (default mae), or where the paper has none, MAE's of the same size, or of ViT-B for timm's names. `arch` and
    `source` still override the preset's own. Raises ConfigError for `--weights` without a hint at their settings.
    """
    if preset is not None:
        return preset
    if arch is None:
        if source is None and weights in (None, "quickstart"):
            return "refine/quickstart"
        raise ConfigError("Give --preset NAME (`mimref presets list` shows all) or --arch with --weights or --source")
    size = arch.removeprefix("vit_")
    candidates = [f"refine/{source or 'mae'}_{size}", f"refine/mae_{size}", "refine/mae_b16"]
    known = preset_names("refine")
    return next((name for name in candidates if name in known), candidates[-1])


def choose_pretrain_preset(preset: str | None, arch: str | None) -> str:
    """The given preset; else `quickstart`, or MAE's recipe where `--arch` is given."""
    if preset is not None:
        return preset
    if arch is None:
        return "pretrain/quickstart"
    # MAE trains all sizes with one recipe.
    name = f"pretrain/mae_{arch.removeprefix('vit_')}"
    return name if name in preset_names("pretrain") else "pretrain/mae_l16"


def _preset_folder() -> Path:
    package = Path(__file__).parent
    # A wheel carries the presets inside the package; a source checkout has them beside it.
    return package / "presets" if (package / "presets").is_dir() else package.parent / "presets"


def _find_preset(name: str, command: str, folder: Path | None = None) -> tuple[str, Path]:
    """The full name and file of a preset; a path ending in .toml is relative to `folder` (default: where we run)."""
    if name.endswith(".toml"):
        return name, (folder or Path()) / Path(name).expanduser()
    known = preset_names()
    for full in (f"{command}/{name}", name):
        if full in known and full.startswith(f"{command}/"):
            return full, _preset_folder() / f"{full}.toml"
    if name in known:
        raise ConfigError(f"Preset {name!r} is one of `mimref {name.split('/')[0]}`, not of `mimref {command}`")
    raise ConfigError(_unknown_preset(name, command))


def _unknown_preset(name: str, command: str | None) -> str:
    full = preset_names(command)
    hint = did_you_mean(name, [*full, *(known.split("/", 1)[1] for known in full)])
    return f"Unknown preset {name!r}{hint or '; `mimref presets list` shows all'}"


def _read_preset(path: Path, command: str, above: tuple[Path, ...]) -> Table:
    """One preset file merged over its bases, the farthest first. above: the files that led here."""
    resolved = path.resolve()
    if resolved in above:
        chain = " -> ".join(file.stem for file in (*above, resolved))
        raise ConfigError(f"Preset {path} has itself as a base: {chain}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"Preset file {str(path)!r} does not exist") from None
    except OSError as error:
        raise ConfigError(f"Preset file {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Preset file {str(path)!r} is not valid TOML: {error}") from None
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base = {_show(base)}: expected the name of a preset")
    _, base_path = _find_preset(base, command, path.parent)
    return _merge(_read_preset(base_path, command, (*above, resolved)), table)


def _merge(below: Table, above: Table) -> Table:
    """A new table with the keys of both; tables are merged key by key, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _nest(model: type[BaseModel], key: str, value: Any) -> Table:
    """`a.b` and a value as the table {a: {b: value}}."""
    if _find_field(model, key) is None:
        raise ConfigError(_unknown_setting(model, key))
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _find_field(model: type[BaseModel], key: str) -> FieldInfo | None:
    head, _, rest = key.partition(".")
    field = model.model_fields.get(head)
    if field is None or not rest:
        return field
    section = _section(field)
    return None if section is None else _find_field(section, rest)


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = _section(field)
        if section is None:
            yield prefix + name
        else:
            yield from _dotted_keys(section, f"{prefix}{name}.")


def _unknown_setting(model: type[BaseModel], key: str) -> str:
    return f"Unknown setting {key!r}{did_you_mean(key, _dotted_keys(model))}"


def _parse_value(field: FieldInfo | None, text: str) -> Any:
    """A TOML value, or the text itself where it is no TOML or where the setting takes text (so `20` stays '20')."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"] if len(table) == 1 else text
    return text if _takes_text(field) and not isinstance(value, str) else value


def _takes_text(field: FieldInfo | None) -> bool:
    return field is not None and str in (field.annotation, *get_args(field.annotation))


def _describe(error: ValidationError, model: type[BaseModel], table: Table) -> str:
    """One line for the first setting that is wrong: its dotted key, its value and what is expected."""
    first = error.errors()[0]
    key = _setting_key(model, first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown_setting(model, key)
    field = _find_field(model, key)
    if first["type"] == "value_error" and (field is None or _section(field) is not None):
        # A check across several settings says everything itself.
        return str(first["ctx"]["error"])
    wrong = [e for e in error.errors() if _setting_key(model, e["loc"]) == key]
    # Of the alternatives `number or list` only the one that the value's type fits has something to say.
    fitting = [e for e in wrong if not e["type"].endswith("_type")]
    if all(e["type"] == "literal_error" for e in fitting):
        fitting = wrong
    value: Any = table
    for part in key.split("."):
        value = value[part]
    expected = " or ".join(dict.fromkeys(_expectation(e) for e in fitting))
    return f"{key} = {_show(value)}: expected {expected}{_literal_hint(first, value)}"


def _setting_key(model: type[BaseModel], loc: Sequence[str | int]) -> str:
    """The dotted key of an error's location, without list positions and the names of a union's members."""
    parts: list[str] = []
    section: type[BaseModel] | None = model
    for step in loc:
        if section is None:
            break
        parts.append(str(step))
        field = section.model_fields.get(str(step))
        section = None if field is None else _section(field)
    return ".".join(parts)


_EXPECTED = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "list_type": "a list",
    "missing": "a longer list",
    "model_type": "a table of settings",
    "string_type": "text",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def _expectation(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _BOUNDS:
        name, relation = _BOUNDS[kind]
        return f"a number {relation} {context[name]:g}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "value_error":
        return str(context["error"])
    if kind == "too_long":
        return f"a list of {context['max_length']}"
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    return error["msg"]


def _literal_hint(error: ErrorDetails, value: Any) -> str:
    if error["type"] != "literal_error" or not isinstance(value, str):
        return ""
    return did_you_mean(value, [word for word in error["ctx"]["expected"].split("'") if word.strip(" ,or")])


def _show(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)
