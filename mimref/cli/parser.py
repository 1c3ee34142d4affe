"""From a class of options to a Typer command, and its help in panels."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

PANELS = ("Encoder", "Data", "Protocol", "Training", "Run", "Output")


@dataclass(frozen=True)
class Option:
    """An option, `--batch-size` as the value of the field `batch_size` of an `Options` class.

    metavar: what its value looks like. sets: the dotted setting that it overrides. read: turns the option's name and
    text into the setting's value; without it the text is read as by `--set`. flag: its name, where the field's differs.
    positional: it is an argument.
    """

    help: str
    metavar: str | None = None
    sets: str | None = None
    read: Callable[[str, str], object] | None = None
    _: KW_ONLY
    flag: str | None = None
    min: int | None = None
    required: bool = False
    positional: bool = False

    def parameter(self, field: str, kind: Any, panel: str) -> inspect.Parameter:
        """The option as a parameter of a function that Typer understands."""
        if self.positional:
            info: Any = typer.Argument(metavar=self.metavar, help=self.help)
        else:
            # The shell completes the words that a metavar lists.
            words = (self.metavar or "").split("|")
            info = typer.Option(
                self.flag or f"--{field.replace('_', '-')}",
                metavar="" if bool in (kind, *get_args(kind)) else self.metavar,
                help=self.help,
                min=self.min,
                rich_help_panel=panel,
                autocompletion=(lambda: words) if all(re.fullmatch(r"[a-z0-9_+-]+", word) for word in words) else None,
            )
        default = inspect.Parameter.empty if self.required else False if kind is bool else None
        annotation: Any = Annotated[kind, info]
        return inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


# Any: type checkers take the field's annotation for the type of what the user gives.
option: Any = Option
argument: Any = partial(Option, required=True, positional=True)


class Options:
    """What a command was given. Its class inherits from the groups of options that the command takes."""

    panel: ClassVar[str]

    def __init_subclass__(cls, panel: str = "Run") -> None:
        cls.panel = panel

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    @classmethod
    def declared(cls) -> dict[str, tuple[Option, str]]:
        """Every field's option and panel: arguments first, then panel by panel."""
        found: dict[str, tuple[Option, str]] = {}
        for group in cls.__mro__:
            for field, value in vars(group).items():
                if isinstance(value, Option) and issubclass(group, Options):
                    found.setdefault(field, (value, group.panel))
        return dict(sorted(found.items(), key=lambda item: (not item[1][0].positional, PANELS.index(item[1][1]))))

    def settings(self) -> dict[str, Any]:
        """Dotted settings and the values given for them."""
        given = {}
        for field, (declared, _) in self.declared().items():
            value = getattr(self, field)
            if declared.sets is not None and value is not None and value != []:
                given[declared.sets] = declared.read(f"--{field}", value) if declared.read else value
        return given


def add_command(
    app: typer.Typer, function: Callable[[Any], None], name: str | None = None, panel: str | None = None
) -> None:
    """Make `function` a command that takes the options of its parameter's class.

    Its docstring is the help, which ends in the examples below `Examples:`. panel: heads it in the list of commands.
    """
    (group,) = (parameter.annotation for parameter in inspect.signature(function).parameters.values())
    hints = get_type_hints(group)
    parameters = [
        declared.parameter(field, hints[field], heading) for field, (declared, heading) in group.declared().items()
    ]

    def call(**values: Any) -> None:
        function(group(**values))

    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("\n\nExamples:\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
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

    def format_options(self, ctx: Any, formatter: Any) -> None:
        params = self.get_params(ctx)  # type: ignore[attr-defined]
        _write_panels(formatter, ((param, param.get_help_record(ctx)) for param in params))
        commands = getattr(self, "commands", {}).values()
        _write_panels(formatter, ((each, (each.name, each.get_short_help_str(90))) for each in commands))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if epilog := getattr(self, "epilog", None):
            formatter.write(f"\n{epilog}\n")


class Command(_Panels, TyperCommand):
    """A command."""

    def get_help_option(self, ctx: Any) -> Any:
        """`--help`, in the panel Run."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = "Run"
        return option


class Group(_Panels, TyperGroup):
    """A group of commands."""


def _write_panels(formatter: Any, records: Iterable[tuple[Any, tuple[str, str]]]) -> None:
    """Names and texts of options or commands below the names of their panels."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for thing, record in records:
        default = {"argument": "Arguments", "option": "Options"}.get(getattr(thing, "param_type_name", ""), "Commands")
        panels.setdefault(thing.rich_help_panel or default, []).append(record)
    for panel, rows in panels.items():
        with formatter.section(panel):
            formatter.write_dl(rows)
