"""From presets and the command line to a checked config, with one line for the setting at fault."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

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
    overrides: dotted key to value; None does not override; text for a setting of another type is read as in `sets`.
    sets: `a.b=value`, values written as in TOML, bare words as strings, `none` to unset.
    Raises ConfigError with one line that names the setting or preset at fault.
    """
    table: Table = {}
    if preset is not None:
        name, path = find_preset(preset, model.command)
        table = read_preset(path, model.command, ())
        table.setdefault("preset", name)
    for key, value in (overrides or {}).items():
        if value is not None:
            field = _find_field(model, key)
            parsed = _parse_value(field, value) if isinstance(value, str) and not _takes_text(field) else value
            table = merge_tables(table, _nest(model, key, parsed))
    for assignment in sets:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set {assignment!r} is not of the form KEY=VALUE, such as heads.temperature=0.3")
        table = merge_tables(table, _nest(model, key, _parse_value(_find_field(model, key), text.strip())))
    return validated(model, table)


def validated(model: type[M], table: Mapping[str, Any]) -> M:
    """A table of settings as a checked model. Raises ConfigError with one line that names the setting at fault."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise ConfigError(_describe(error, model, table)) from None


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


def _describe(error: ValidationError, model: type[BaseModel], table: Mapping[str, Any]) -> str:
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
    return f"{key} = {show_value(value)}: expected {expected}{_literal_hint(first, value)}"


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
