"""Turn a class of options into a Typer command, with its help in panels."""

import inspect
import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from mimref.errors import Checks, Typed

PANELS = ("Encoder", "Data", "Protocol", "Training", "Run", "Output")


@dataclass(frozen=True)
class Option:
    """An option, such as `--batch-size` for the field `batch_size` of an `Options` class.

    metavar: placeholder for its value. sets: the dotted setting that it overrides. flag: its name, if it differs from
    the field's. positional: whether it is an argument.
    """

    help: str
    metavar: str | None = None
    sets: str | None = None
    _: KW_ONLY
    flag: str | None = None
    min: int | None = None
    required: bool = False
    positional: bool = False

    def name(self, field: str) -> str:
        """Return the option's name, such as `--batch-size`."""
        return (self.flag or f"--{field.replace('_', '-')}").partition("/")[0]

    def parameter(self, field: str, kind: Any, panel: str) -> inspect.Parameter:
        """Return the option as a function parameter that Typer understands."""
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


# Any: type checkers then take a field to have its annotated type, that of the user's value.
option: Any = Option
argument: Any = partial(Option, required=True, positional=True)


class Options:
    """The values given to a command, whose class inherits from the groups of options that the command takes."""

    panel: ClassVar[str]

    def __init_subclass__(cls, panel: str = "Run") -> None:
        cls.panel = panel

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    @cached_property
    def checks(self) -> Checks:
        """Collects what is wrong with the command's options, in the order of its help."""
        declared = [(field, option) for field, (option, _) in self.declared().items()]
        typed = {
            option.sets: Typed(option.name(field), value, option.metavar or "")
            for field, option in declared
            if option.sets and not option.positional and isinstance(value := getattr(self, field), str)
        }
        return Checks([option.sets or field for field, option in declared], typed)

    @classmethod
    def declared(cls) -> dict[str, tuple[Option, str]]:
        """Return every field's option and panel: arguments first, then panel by panel."""
        found: dict[str, tuple[Option, str]] = {}
        for group in cls.__mro__:
            for field, value in vars(group).items():
                if isinstance(value, Option):
                    found.setdefault(field, (value, vars(group)["panel"]))
        return dict(sorted(found.items(), key=lambda item: (not item[1][0].positional, PANELS.index(item[1][1]))))


def add_command(
    app: typer.Typer, function: Callable[[Any], None], name: str | None = None, panel: str | None = None
) -> None:
    """Make `function` a command that takes the options of its parameter's class.

    The function's docstring is the help, and the lines below `Examples:` its epilog. panel: the command's heading in
    the list of commands.
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
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)  # rich keeps the line breaks of paragraphs
    name = name or function.__name__.replace("_", "-")
    app.command(name, cls=Command, help=text, epilog=f"Examples:\n{examples}", rich_help_panel=panel)(call)


class _Panels:
    """Help in panels even if rich does not draw it."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write options, arguments and commands, each under the heading of its panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):  # type: ignore[attr-defined]
            default = "Arguments" if param.param_type_name == "argument" else "Options"
            panels.setdefault(param.rich_help_panel or default, []).append(param.get_help_record(ctx))
        for command in getattr(self, "commands", {}).values():
            record = command.name, command.get_short_help_str(90)
            panels.setdefault(command.rich_help_panel or "Commands", []).append(record)
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if epilog := getattr(self, "epilog", None):
            formatter.write(f"\n{epilog}\n")


class Command(_Panels, TyperCommand):
    """A command. An option whose metavar ends in `...` takes all values up to the next option, as `*` gives them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click's `Command`. An empty value is refused: it is that of a shell variable that is not set."""
        for before, word in pairwise(["", *args]):
            name, equals, value = word.partition("=")
            if not word or (name.startswith("--") and equals and not value):
                ctx.fail(f"{name or (before if before.startswith('-') else 'an argument')}: the value is empty")
        listed = [each for each in self.params if getattr(each, "multiple", False)]
        many = {flag for each in listed if str(each.metavar).endswith("...") for flag in each.opts}
        spread: list[str] = []
        flag = None
        for position, word in enumerate(args):
            if word == "--":
                return super().parse_args(ctx, [*spread, *args[position:]])
            if word.startswith("-") and word != "-":
                flag = word if word in many else None
            elif flag is not None and spread[-1] != flag:
                spread.append(flag)
            spread.append(word)
        try:
            return super().parse_args(ctx, spread)
        except typer.TyperException as error:
            if "unexpected extra argument" in str(error) and any("--weights" in each.opts for each in self.params):
                ctx.fail(f"{error}; name weights with --weights")
            raise

    def get_help_option(self, ctx: Any) -> Any:
        """Return `--help`, in the panel Run."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = "Run"
        return option


class Group(_Panels, TyperGroup):
    """A group of commands."""
