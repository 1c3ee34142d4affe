"""From a class of options to a Typer command, and its help in panels."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

PANELS = ("Encoder", "Data", "Protocol", "Training", "Run", "Output")


@dataclass(frozen=True)
class Option:
    """An option, declared as the value of a field of an `Options` class."""

    help: str
    metavar: str | None
    sets: str | None
    read: Callable[[str, str], object] | None
    flag: str | None
    min: int | None
    required: bool
    positional: bool

    def declare(self, name: str, panel: str) -> Any:
        """What Typer has to know of the option that is the field `name`."""
        if self.positional:
            return typer.Argument(metavar=self.metavar, help=self.help)
        words = (self.metavar or "").split("|")
        complete = (lambda: words) if all(re.fullmatch(r"[a-z0-9+-]+", word) for word in words) else None
        options: dict[str, Any] = {
            "metavar": self.metavar,
            "help": self.help,
            "min": self.min,
            "autocompletion": complete,
        }
        return typer.Option(self.flag or f"--{name.replace('_', '-')}", rich_help_panel=panel, **options)


def option(
    help: str,
    metavar: str | None = None,
    sets: str | None = None,
    read: Callable[[str, str], object] | None = None,
    *,
    flag: str | None = None,
    min: int | None = None,
    required: bool = False,
) -> Any:
    """An option, `--batch-size` for a field `batch_size`, or `flag`.

    metavar: what its value looks like; the shell completes plain words separated by |. sets: the dotted setting that
    it overrides. read: turns the field's name and the text into the setting's value; else it is read as by `--set`.
    """
    return Option(help, metavar, sets, read, flag, min, required, positional=False)


def argument(help: str, metavar: str, sets: str | None = None) -> Any:
    """A value given by its position; required unless the metavar has brackets."""
    return Option(help, metavar, sets, None, None, None, not metavar.startswith("["), positional=True)


class Options:
    """What a command was given. Its class inherits from the groups of options that the command has."""

    panel: ClassVar[str]

    def __init_subclass__(cls, panel: str = "Run") -> None:
        cls.panel = panel

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    @classmethod
    def declared(cls) -> dict[str, tuple[Option, str]]:
        """Every field's option and the panel that shows it, in the order of the panels."""
        found = {
            name: (value, base.panel)
            for base in reversed(cls.__mro__)
            for name, value in vars(base).items()
            if isinstance(value, Option) and issubclass(base, Options)
        }
        return dict(sorted(found.items(), key=lambda item: PANELS.index(item[1][1])))

    def settings(self) -> dict[str, Any]:
        """Dotted settings and the values given for them."""
        given = {}
        for name, (declared, _) in self.declared().items():
            value = getattr(self, name)
            if declared.sets is not None and value is not None and value != []:
                given[declared.sets] = declared.read(f"--{name}", value) if declared.read else value
        return given


O_ = TypeVar("O_", bound=Options)


def add_command(
    app: typer.Typer, function: Callable[[O_], None], name: str | None = None, panel: str | None = None
) -> None:
    """Make `function` a command that takes the options of its parameter's class.

    Its docstring is the help, with the examples below `Examples:`. panel: heads the command in the list of commands.
    """
    (group,) = (parameter.annotation for parameter in inspect.signature(function).parameters.values())
    hints, parameters = get_type_hints(group), []
    for field, (declared, heading) in group.declared().items():
        default = inspect.Parameter.empty if declared.required else False if hints[field] is bool else None
        annotation = Annotated[hints[field], declared.declare(field, heading)]
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(field, kind, default=default, annotation=annotation))

    def call(**values: Any) -> None:
        function(group(**values))

    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("\n\nExamples:\n")
    name = name or function.__name__.replace("_", "-")
    app.command(name, cls=Command, help=text, epilog=f"Examples:\n{examples}", rich_help_panel=panel)(call)


def add_group(app: typer.Typer, name: str, help: str, commands: Mapping[str, Callable[[Any], None]]) -> None:
    """Make a group of commands out of functions by name."""
    group = typer.Typer(cls=Group, help=help)
    for command, function in commands.items():
        add_command(group, function, command)
    app.add_typer(group, name=name, rich_help_panel="Tools")


class _Panels:
    """Help in panels also where rich does not draw it."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        option.rich_help_panel = "Run"
        return option

    def format_options(self, ctx: Any, formatter: Any) -> None:
        params = self.get_params(ctx)  # type: ignore[attr-defined]
        _write_panels(formatter, "Arguments", ((param, param.get_help_record(ctx)) for param in params))
        commands = getattr(self, "commands", {}).values()
        records = ((command, (command.name, command.get_short_help_str(90))) for command in commands)
        _write_panels(formatter, "Commands", records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if epilog := getattr(self, "epilog", None):
            formatter.write(f"\n{epilog}\n")


class Command(_Panels, TyperCommand):
    """A command."""


class Group(_Panels, TyperGroup):
    """A group of commands."""


def _write_panels(formatter: Any, default: str, records: Iterable[tuple[Any, tuple[str, str]]]) -> None:
    """Options or commands, with their names and texts, below the names of their panels."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for thing, record in records:
        panels.setdefault(thing.rich_help_panel or default, []).append(record)
    for panel, rows in panels.items():
        with formatter.section(panel):
            formatter.write_dl(rows)
