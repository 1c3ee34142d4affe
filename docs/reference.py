"""MkDocs hook: pages generated from the command line, the settings and the docstrings, so that they cannot go stale."""

import importlib
import inspect
import json
import pkgutil
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from typer.main import get_command

import mimref
from mimref.cli import app
from mimref.config.base import CommandConfig

ROOT = Path(__file__).parents[1]
API_MARK = "<!-- the reference of the public names -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "commands.md": commands_page(),
        "settings.md": settings_page(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the mark with the API reference."""
    return markdown.replace(API_MARK, api_reference())


# --- commands ---


def commands_page() -> str:
    """Return the page of all commands with their options, in the order and panels of the help."""
    root = get_command(app)
    lines = ["# Commands", "", "Generated from the command line itself; `mimref COMMAND --help` prints the same.", ""]
    for panel, members in by_panel(root.commands.values(), "Commands").items():  # type: ignore[attr-defined]
        commands = [each for member in members for each in walk(member, f"mimref {member.name}")]
        rows = [(f"[`{path}`](#{path.replace(' ', '-')})", summary(command)) for path, command in commands]
        lines += table(f"| {panel} | |", rows)
    for path, command in walk(root, "mimref"):
        lines += [f"## {path}", "", f"```\n{usage(path, command)}\n```", "", *help_text(command)]
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        options = [each for each in command.params if each.param_type_name == "option"]
        for panel, parameters in [*by_panel(arguments, "Arguments").items(), *by_panel(options, "Options").items()]:
            lines += table(f"| {panel} | |", [(names(each), meaning(each)) for each in parameters])
    return "\n".join(lines)


def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every visible command that is not a group, with its full name."""
    members = getattr(command, "commands", None)
    if members is None:
        yield path, command
        return
    for name, member in members.items():
        if not member.hidden:
            yield from walk(member, f"{path} {name}")


def by_panel(items: Iterable[Any], default: str) -> dict[str, list[Any]]:
    """Group the commands or parameters that the help shows by their panel."""
    found: dict[str, list[Any]] = {}
    for each in items:
        panel = each.rich_help_panel
        if not each.hidden:
            found.setdefault(panel if isinstance(panel, str) else default, []).append(each)
    return found


def summary(command: Any) -> str:
    return (command.help or "").strip().partition("\n")[0]


def usage(path: str, command: Any) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument" and not each.hidden]
    words = [each.metavar or each.name.upper() for each in arguments]
    return " ".join([path, *words, "[OPTIONS]"])


def help_text(command: Any) -> list[str]:
    """Return the help as Markdown; consecutive lines that are commands become a code block."""
    lines: list[str] = []
    code = False
    for part in filter(None, (command.help, command.epilog)):
        for line in [*inspect.cleandoc(part).replace("\b", "").splitlines(), ""]:
            text = line.strip().removeprefix("$ ")
            if text.startswith(("mimref ", "torchrun ")) != code:
                lines += ["```" if code else "\n```bash"]
                code = not code
            lines.append(text)
    return lines


def names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    choices = "|".join(map(str, typing.get_args(parameter.type_descriptor.annotation)))
    value = "" if parameter.is_flag else f" {parameter.metavar or choices or parameter.name.upper()}"
    shown = ["/".join([*parameter.opts[:1], *parameter.secondary_opts]), *parameter.opts[1:]]
    return f"`{', '.join(shown)}{value}`"


def meaning(parameter: Any) -> str:
    text = parameter.help or ""
    if parameter.param_type_name == "option" and parameter.required:
        text += " Required."
    elif parameter.default not in (None, False, "", (), []) and not callable(parameter.default):
        text += f" Default: `{parameter.default}`."
    return text.strip()


# --- settings ---


def settings_page() -> str:
    """Return the page of every command's settings: key, values, default, meaning."""
    lines = [
        "# Settings",
        "",
        "Every setting that `--set KEY=VALUE` and preset files take, by command. Generated from the models that check",
        "them. `none` unsets a setting that may be unset. Learning rates are base rates, for batches of 256 images.",
        "",
    ]
    for model in command_models():
        schema = model.model_json_schema()
        lines += [f"## mimref {model.command}", ""]
        for section, prefix, shown in sections(model, schema):
            if prefix:
                lines += [f"### {prefix[:-1]} {{ #{model.command}-{prefix[:-1].replace('.', '-')} }}", ""]
                lines += [inspect.cleandoc(section.__doc__ or ""), ""]
            rows = []
            for key, field in section.model_fields.items():
                if key in shown:
                    default = (
                        "" if field.is_required() else f"`{as_toml(field.get_default(call_default_factory=True))}`"
                    )
                    rows.append((f"`{prefix}{key}`", values(shown[key]), default, field.description or ""))
            lines += table("| Key | Values | Default | Meaning |", rows)
    return "\n".join(lines)


def command_models() -> list[type[CommandConfig]]:
    """Return the settings class of every command, in the order of the command line."""
    for module in pkgutil.walk_packages(mimref.__path__, "mimref."):
        if ".config" in module.name:
            importlib.import_module(module.name)

    def below(model: type[CommandConfig]) -> Iterator[type[CommandConfig]]:
        for each in model.__subclasses__():
            if "command" in vars(each):
                yield each
            yield from below(each)

    order = list(get_command(app).commands)  # type: ignore[attr-defined]
    found = {model.command: model for model in below(CommandConfig)}
    return sorted(found.values(), key=lambda model: order.index(model.command))


def sections(
    model: type[BaseModel], schema: dict[str, Any], root: dict[str, Any] | None = None, prefix: str = ""
) -> Iterator[tuple[type[BaseModel], str, dict[str, Any]]]:
    """Yield a model and its sections, each with its prefix and the schemas of its plain settings."""
    root = root or schema
    inner = {key: field.annotation for key, field in model.model_fields.items()
             if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)}  # fmt: skip
    yield model, prefix, {key: value for key, value in schema["properties"].items() if key not in inner}
    for key, section in inner.items():
        yield from sections(section, root["$defs"][section.__name__], root, f"{prefix}{key}.")


def values(schema: dict[str, Any]) -> str:
    """Describe which values a setting accepts."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(values(each) for each in schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "")
    if kind == "array":
        items = schema.get("items") or {}
        number = schema.get("maxItems")
        return f"{f'{number} values' if number else 'list'}{f': {values(items)}' if values(items) else ''}"
    words = {"null": "`none`", "integer": "integer", "number": "number", "boolean": "`true`, `false`", "string": "text"}
    bounds = {"exclusiveMinimum": "> ", "minimum": "≥ ", "exclusiveMaximum": "< ", "maximum": "≤ "}
    limits = [f"{sign}{schema[key]:g}" for key, sign in bounds.items() if key in schema and abs(schema[key]) < 2**53]
    return " ".join(filter(None, [words.get(kind, kind), ", ".join(limits)]))


def as_toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(as_toml(each) for each in value)}]"
    return json.dumps(value)


# --- Python ---


def api_reference() -> str:
    """Return mkdocstrings directives for every public name, and for the classes that public functions return."""
    lines: list[str] = []
    functions, configs, results = [], [], {}
    for name in sorted(mimref._PUBLIC):
        public = getattr(mimref, name)
        (configs if isinstance(public, type) else functions).append((name, public))
        if not isinstance(public, type):
            for returned in classes(typing.get_type_hints(public).get("return")):
                results[returned.__name__] = returned
    for title, members, options in (
        ("Functions", functions, []),
        ("Results", sorted(results.items()), []),
        ("Settings", configs, ["members: false", "show_bases: false"]),
    ):
        lines += [f"## {title}", ""]
        for name, member in members:
            shown = f"mimref.{name}" if title != "Results" else name
            lines += [f"::: {member.__module__}.{member.__name__}", "    options:", f"      heading: {shown}",
                      f"      toc_label: {name}", *(f"      {option}" for option in options), ""]  # fmt: skip
    return "\n".join(lines)


def classes(hint: Any) -> Iterator[type]:
    """Yield the package's own classes in a return annotation, except command settings."""
    if isinstance(hint, type) and hint.__module__.startswith("mimref.") and not issubclass(hint, CommandConfig):
        yield hint
    for part in typing.get_args(hint):
        yield from classes(part)


def table(header: str, rows: list[tuple[str, ...]]) -> list[str]:
    """Return a Markdown table, or nothing if there are no rows."""
    if not rows:
        return []
    rule = "|" + "---|" * (header.count("|") - 1)
    return [header, rule, *("| " + " | ".join(" ".join(cell.split()) for cell in row) + " |" for row in rows), ""]
