"""From a group of options, declared as a dataclass, to a Typer command and its help."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, ClassVar, TypeVar, get_args

import typer
from typer.core import TyperCommand, TyperGroup

PANELS = ("Encoder", "Data", "Protocol", "Training", "Run", "Output")


@dataclass(frozen=True)
class Option:
    """How a field of an option group appears on the command line.

    metavar: what the value looks like; plain words separated by | are completed by the shell. sets: the setting that
    the option overrides. read: turns the option's name and text into the setting's value; without it the text is read
    as in `--set`. flag: the option's name where the field's does not serve.
    """

    help: str
    metavar: str | None = None
    sets: str | None = None
    read: Callable[[str, str], object] | None = None
    flag: str | None = None
    min: int | None = None

    def declare(self, name: str, panel: str) -> Any:
        """The Typer option of the field `name`."""
        words = (self.metavar or "").split("|")
        complete = (lambda: words) if all(re.fullmatch(r"[a-z0-9+-]+", word) for word in words) else None
        return typer.Option(
            self.named(name),
            metavar=self.metavar,
            help=self.help,
            min=self.min,
            rich_help_panel=panel,
            autocompletion=complete,
        )

    def named(self, field: str) -> str:
        """The option's name, such as `--batch-size`, on the field `field`."""
        return self.flag or f"--{field.replace('_', '-')}"


class Argument(Option):
    """A value given by its position."""

    def declare(self, name: str, panel: str) -> Any:
        """The Typer argument of the field `name`."""
        return typer.Argument(metavar=self.metavar, help=self.help)


@dataclass(kw_only=True)
class Options:
    """What a command takes from its command line: every field is `Annotated` with an Option or Argument.

    A command's class inherits from the groups that it has; `panel` heads a group in the help.
    """

    panel: ClassVar[str] = "Run"

    def settings(self) -> dict[str, Any]:
        """Dotted settings and the values that were given for them."""
        given = {}
        for name, option in declarations(type(self)):
            value = getattr(self, name)
            if option.sets is not None and value is not None and value != []:
                given[option.sets] = option.read(option.named(name), value) if option.read else value
        return given


def declarations(group: type[Options]) -> Iterator[tuple[str, Option]]:
    """Name and declaration of every field of a group."""
    for field in fields(group):
        yield field.name, next(part for part in get_args(field.type) if isinstance(part, Option))


O = TypeVar("O", bound=Options)  # noqa: E741


def add_command(app: typer.Typer, function: Callable[[O], None], *, name: str, panel: str | None = None) -> None:
    """Make `function` a command: the fields of its only parameter's class become the command's options.

    Its docstring is the help, and the lines below `Examples:` in it end the help. panel: heads the command in the
    list of commands.
    """
    (parameter,) = inspect.signature(function).parameters.values()
    group: type[O] = parameter.annotation

    def call(**values: Any) -> None:
        function(group(**values))

    parameters = _parameters(group)
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("\n\nExamples:\n")
    app.command(name, cls=Command, help=text, epilog=f"Examples:\n{examples}", rich_help_panel=panel)(call)


def _parameters(group: type[Options]) -> list[inspect.Parameter]:
    """The fields as parameters of a function, in the order of the help's panels."""
    found = []
    for field, (name, option) in zip(fields(group), declarations(group), strict=True):
        panel = next(base.panel for base in group.__mro__ if name in inspect.get_annotations(base))
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        kind = get_args(field.type)[0]
        annotation = Annotated[kind, option.declare(name, panel)]
        parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        found.append((PANELS.index(panel), parameter))
    return [parameter for _, parameter in sorted(found, key=lambda pair: pair[0])]


class Command(TyperCommand):
    """A command whose help has one section per panel, without a terminal as well."""

    def get_help_option(self, ctx: Any) -> Any:
        """`--help`, beside the options of the panel Run."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = "Run"
        return option

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, panel by panel."""
        _write_panels(self.get_params(ctx), lambda param: param.get_help_record(ctx), "Arguments", formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, line by line."""
        _write_examples(self, formatter)


class Group(TyperGroup):
    """A group of commands whose help has one section per panel, without a terminal as well."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, and the commands panel by panel."""
        _write_panels(self.get_params(ctx), lambda param: param.get_help_record(ctx), "Options", formatter)
        _write_panels(
            self.commands.values(),
            lambda command: (command.name, command.get_short_help_str(90)),
            "Commands",
            formatter,
        )

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, line by line."""
        _write_examples(self, formatter)


def _write_panels(things: Any, record: Callable[[Any], Any], default: str, formatter: Any) -> None:
    """Definition lists of options or commands under the names of their panels."""
    panels: dict[str, list[Any]] = {}
    for thing in things:
        panels.setdefault(thing.rich_help_panel or default, []).append(record(thing))
    for panel, records in panels.items():
        with formatter.section(panel):
            formatter.write_dl(records)


def _write_examples(command: TyperCommand | TyperGroup, formatter: Any) -> None:
    if command.epilog:
        formatter.write_paragraph()
        formatter.write(f"{command.epilog}\n")
