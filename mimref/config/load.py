"""From presets and the command line to a checked config, with one line for the setting at fault."""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mimref.config.base import CommandConfig
from mimref.config.presets import Table, find_preset, merge_tables, read_preset, show_value
from mimref.errors import ConfigError, did_you_mean

C = TypeVar("C", bound=CommandConfig)
M = TypeVar("M", bound=BaseModel)


def load_config(
    model: type[C], preset: str | None = None, overrides: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> C:
    """Build a checked config: defaults, then the preset and its bases, then `overrides`, then `sets`.

    preset: a name (`quickstart` or `refine/quickstart` for RefineConfig) or the path of a `.toml` file.
    overrides: dotted key to value; None does not override. sets: `a.b=value`.
    Text is read as TOML where the setting takes more than text: bare words are strings, `none` unsets, and a list
    needs no brackets (`1,2,5`). Raises ConfigError with one line that names the setting or preset at fault.
    """
    table: Table = {}
    if preset is not None:
        name, path = find_preset(preset, model.command)
        table = {"preset": name} | read_preset(path, model.command)
    for key, value in [*(overrides or {}).items(), *map(_split, sets)]:
        if value is not None:
            table = merge_tables(table, _nest(model, key, value))
    return validated(model, table)


def validated(model: type[M], table: Mapping[str, Any]) -> M:
    """A table of settings as a checked model. Raises ConfigError with one line that names the setting at fault."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise ConfigError(_describe(error.errors(), model, table)) from None


def _split(assignment: str) -> tuple[str, str]:
    key, equals, text = map(str.strip, assignment.partition("="))
    if not equals or not key:
        raise ConfigError(f"--set {assignment!r} is not of the form KEY=VALUE, such as heads.temperature=0.3")
    return key, text


def _nest(model: type[BaseModel], key: str, value: Any) -> Table:
    """`a.b` and a value as the table {a: {b: value}}."""
    field = setting_fields(model).get(key)
    if field is None:
        raise ConfigError(_unknown_setting(model, key))
    if isinstance(value, str):
        value = _read(field.annotation, value)
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _read(kind: Any, text: str) -> Any:
    """The value of a setting of this type; the text itself where it is not TOML, or where `20` must stay '20'."""
    is_list = get_origin(kind) is list
    if is_list and not text.startswith("["):
        return [_read(get_args(kind)[0], part.strip()) for part in text.split(",")]
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"] if len(table) == 1 else text
    takes_text = not is_list and str in (kind, *get_args(kind))
    return text if takes_text and not isinstance(value, str) else value


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def setting_fields(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """The fields of a model and of its sections, by dotted key."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        if section := _section(field):
            found |= setting_fields(section, f"{prefix}{name}.")
    return found


def _unknown_setting(model: type[BaseModel], key: str) -> str:
    known = [name for name, field in setting_fields(model).items() if not _section(field)]
    return f"Unknown setting {key!r}{did_you_mean(key, known)}"


def _describe(errors: Sequence[ErrorDetails], model: type[BaseModel], table: Mapping[str, Any]) -> str:
    """One line about the first wrong setting: its dotted key, its value and what is expected."""
    first, key = errors[0], _setting_key(model, errors[0]["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown_setting(model, key)
    field = setting_fields(model).get(key)
    if first["type"] == "value_error" and (field is None or _section(field)):
        # The message of a check across several settings is complete.
        return str(first["ctx"]["error"])
    wrong = [error for error in errors if _setting_key(model, error["loc"]) == key]
    # Of alternatives such as `number or list`, only the one that fits the value's type helps.
    fitting = [error for error in wrong if not error["type"].endswith("_type")]
    if all(error["type"] == "literal_error" for error in fitting):
        fitting = wrong
    value: Any = table
    for part in key.split("."):
        value = value[part]
    expected = " or ".join(dict.fromkeys(map(_expectation, fitting)))
    is_word = first["type"] == "literal_error" and isinstance(value, str)
    hint = did_you_mean(value, first["ctx"]["expected"].split("'")[1::2]) if is_word else ""
    return f"{key} = {show_value(value)}: expected {expected}{hint}"


def _setting_key(model: type[BaseModel], loc: Sequence[str | int]) -> str:
    """The dotted key of an error's location, without list positions and the names of a union's members."""
    fields = setting_fields(model)
    for end in range(1, len(loc)):
        key = ".".join(map(str, loc[:end]))
        if key not in fields or not _section(fields[key]):
            return key
    return ".".join(map(str, loc))


def _expectation(error: ErrorDetails) -> str:
    text = _EXPECTED.get(error["type"])
    return error["msg"] if text is None else text.format(**error.get("ctx", {}))


_EXPECTED = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number greater than {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "a number less than {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "missing": "a longer list",
    "model_type": "a table of settings",
    "string_type": "text",
    "too_long": "a list of {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
    "value_error": "{error}",
}
