"""Build a checked config from presets and the command line, with a one-line error for every setting at fault."""

import re
import tomllib
from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mimref.config.base import CommandConfig
from mimref.config.presets import Table, find_preset, merge_tables, read_preset, show_value
from mimref.errors import Checks, ConfigError, Typed, did_you_mean

C = TypeVar("C", bound=CommandConfig)
M = TypeVar("M", bound=BaseModel)


def load_config(
    model: type[C],
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    checks: Checks | None = None,
) -> C:
    """Build a checked config: defaults, then the preset and its bases, then `overrides`, then `sets`.

    preset: a name (`quickstart` or `refine/quickstart` for RefineConfig) or the path of a `.toml` file.
    overrides: dotted key to value; None does not override. sets: `a.b=value`.
    Text is read as TOML if the setting accepts more than text: bare words are strings, `none` unsets, and a list
    needs no brackets (`1,2,5`). Raises ConfigError, or UserErrors for several mistakes, with one line that names the
    setting or preset at fault. checks: collects the mistakes instead; the config then lacks the settings at fault.
    """
    collected = checks or Checks()
    table: Table = {}
    if preset is not None:
        table = collected.run("preset", lambda: _preset_table(preset, model.presets_of or model.command)) or {}
        if not table:
            collected.unusable.add("preset")
    given: set[str] = set()
    for key, value in (overrides or {}).items():
        if value is not None:
            given.add(key)
            table = merge_tables(table, collected.run(key, partial(_nest, model, key, value)) or {})
    for pair in filter(None, (collected.run("sets", partial(_split, assignment)) for assignment in sets)):
        if pair[0] == "preset":
            collected.add("sets", ConfigError(f"--set preset={pair[1]} loads no preset; use --preset {pair[1]}"))
            continue
        given.add(pair[0])
        collected.typed.pop(pair[0], None)  # the option's value is replaced
        table = merge_tables(table, collected.run("sets", partial(_nest, model, *pair)) or {})
    if "preset" in collected.unusable:
        # The other settings would come from the unknown preset.
        collected.unusable |= setting_fields(model).keys() - given
    config = _usable(model, table, collected, preset, given)
    config._given = frozenset(given)
    if checks is None:
        collected.finish()
    return config


def _preset_table(preset: str, command: str) -> Table:
    name, path = find_preset(preset, command)
    return {"preset": name} | read_preset(path, command)


def _usable(model: type[C], table: Table, checks: Checks, preset: str | None, given: Set[str]) -> C:
    """Return the settings without the invalid ones, whose errors `checks` collects.

    given: keys of settings whose values are not the preset's.
    """
    while True:
        try:
            return model.model_validate(table)
        except ValidationError as error:
            mistakes = _mistakes(error, model, table, checks.typed)
        if preset is not None and preset.endswith(".toml"):
            mistakes = [(keys, message if given & {*keys} else f"{preset}: {message}") for keys, message in mistakes]
        less = table
        for keys, message in mistakes:
            if checks.unusable.isdisjoint(keys):
                checks.add(keys[0], ConfigError(message))
            checks.unusable.update(keys)
            for key in keys:
                less = _without(less, key)
                if key.startswith("data."):
                    checks.unusable.add("data.spec")  # these settings locate the images together
        if less == table:  # nothing can be left out
            for keys, message in mistakes:
                checks.add(keys[0], ConfigError(message))
            checks.raise_found()
        table = less


def validated(model: type[M], table: Mapping[str, Any]) -> M:
    """Validate a table of settings as a model. Raises ConfigError, or UserErrors for several mistakes."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        checks = Checks()
        for keys, message in _mistakes(error, model, table, {}):
            checks.add(keys[0], ConfigError(message))
        checks.raise_found()


def _without(table: Table, key: str) -> Table:
    """Return a copy of a table without a dotted key."""
    name, _, rest = key.partition(".")
    if name not in table or (rest and not isinstance(table[name], dict)):
        return table
    return {
        other: _without(value, rest) if other == name else value
        for other, value in table.items()
        if other != name or rest
    }


def _split(assignment: str) -> tuple[str, str]:
    key, equals, text = map(str.strip, assignment.partition("="))
    if not equals or not key:
        raise ConfigError(f"--set {assignment!r} is not of the form KEY=VALUE, such as seed=1")
    return key, text


def _nest(model: type[BaseModel], key: str, value: Any) -> Table:
    """Return the table {a: {b: value}} for a key `a.b`."""
    field = setting_fields(model).get(key)
    if field is None:
        raise ConfigError(_unknown_setting(model, key))
    if isinstance(value, str):
        value = _read(field.annotation, value)
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _read(kind: Any, text: str) -> Any:
    """Read the value of a setting of this type; text stays as it is if it is not TOML, or if `20` must stay '20'."""
    kinds = (kind,) if get_origin(kind) in (list, tuple) else (kind, *get_args(kind))
    kinds = tuple(get_args(each)[0] if get_origin(each) is Annotated else each for each in kinds)
    takes_text, lists = str in kinds, [each for each in kinds if get_origin(each) in (list, tuple)]
    # A pair is never a single value, and some settings may be one: for these, only commas make a list.
    if lists and not takes_text and not text.startswith("[") and (get_origin(kind) is list or "," in text):
        return [_read(get_args(lists[0])[0], part.strip()) for part in text.split(",")]
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"] if len(table) == 1 else text
    return text if takes_text and not isinstance(value, str) else value


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def setting_fields(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Return the fields of a model and of its sections, by dotted key."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        if section := _section(field):
            found |= setting_fields(section, f"{prefix}{name}.")
    return found


def _unknown_setting(model: type[BaseModel], key: str) -> str:
    known = [name for name, field in setting_fields(model).items() if not _section(field)]
    return f"Unknown setting {key!r}{did_you_mean(key, known)}"


def _mistakes(
    error: ValidationError, model: type[BaseModel], table: Mapping[str, Any], typed: Mapping[str, Typed]
) -> list[tuple[list[str], str]]:
    """Return, for every mistake, the settings at fault and a one-line message."""
    of_key: dict[str, list[ErrorDetails]] = {}
    for each in error.errors():
        of_key.setdefault(_setting_key(model, each["loc"]), []).append(each)
    return [_describe(key, errors, model, table, typed.get(key)) for key, errors in of_key.items()]


def _describe(
    key: str, errors: Sequence[ErrorDetails], model: type[BaseModel], table: Mapping[str, Any], typed: Typed | None
) -> tuple[list[str], str]:
    """Return the settings at fault and a one-line message: setting or typed option, its value, what is expected."""
    first, fields = errors[0], setting_fields(model)
    if first["type"] == "extra_forbidden":
        return [key], _unknown_setting(model, key)
    if first["type"] == "value_error" and (key not in fields or _section(fields[key])):
        # A check across several settings: the message is complete, or starts with a field of its section.
        message = str(first["ctx"]["error"])
        plain = [name for name, field in fields.items() if not _section(field)]
        names = [name for name in plain if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.])", message)]
        return (names, message) if names else ([key], f"{key}.{message}")
    value: Any = table
    for part in key.split("."):
        if part not in value:
            return [key], f"{key} is missing; it has no default"
        value = value[part]
    # Of alternatives such as `number or list`, only the one that matches the value's type is helpful.
    fitting = [error for error in errors if not error["type"].endswith("_type")]
    if all(error["type"] == "literal_error" for error in fitting):
        fitting = list(errors)
    is_word = first["type"] == "literal_error" and isinstance(value, str)
    hint = did_you_mean(value, first["ctx"]["expected"].split("'")[1::2]) if is_word else ""
    if typed is None:
        expected = " or ".join(dict.fromkeys(map(_expectation, fitting)))
        return [key], f"{key} = {show_value(value)}: expected {expected}{hint}"
    as_list = get_origin(fields[key].annotation) is list
    expected = " or ".join(dict.fromkeys((as_list and _LISTED.get(e["type"])) or _expectation(e) for e in fitting))
    example = f", such as {typed.example}" if typed.example[:1].isdigit() else ""
    return [key], f"{typed}: expected {expected}{example}{hint}"


def _setting_key(model: type[BaseModel], loc: Sequence[str | int]) -> str:
    """Return the dotted key of an error's location, without list indices and names of union members."""
    fields = setting_fields(model)
    for end in range(1, len(loc)):
        key = ".".join(map(str, loc[:end]))
        if key not in fields or not _section(fields[key]):
            return key
    return ".".join(map(str, loc))


def _expectation(error: ErrorDetails) -> str:
    text = _EXPECTED.get(error["type"])
    return error["msg"] if text is None else text.format(**error.get("ctx", {}))


_LISTED = {
    "float_type": "numbers separated by commas",
    "int_from_float": "whole numbers separated by commas",
    "int_type": "whole numbers separated by commas",
}
"""Expectations for a list that the user typed as an option."""
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


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested table as a flat one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
