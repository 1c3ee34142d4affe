"""Errors that a user can fix, one line each that names the value at fault and says what to do; and their collection."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake in what the user gave; the command line prints its message alone and exits with code 2."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, or does not fit the others."""


class DataError(UserError):
    """Images or labels that are missing or cannot be read."""


class CheckpointError(UserError):
    """A file that holds no weights, or weights that do not fit the requested architecture."""


class OutputError(UserError):
    """An output folder or file that cannot or must not be written."""


class DivergenceError(UserError):
    """Training produced a loss that is not finite."""


class LostRankError(UserError):
    """Another process of a distributed run no longer answers."""


class UserErrors(UserError):
    """Several mistakes that were found together, one line each."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = errors


class Typed(NamedTuple):
    """An option as the user typed it."""

    flag: str
    value: str
    example: str
    """Of a value, from its help."""

    def __str__(self) -> str:
        return f"{self.flag} {self.value}"


class Checks:
    """Runs checks that do not need each other, and raises all the mistakes that they find as one error.

    order: settings and options in the order in which their mistakes are listed. typed: the settings that the user gave
    as options, whose mistakes are reported under the option's name.
    """

    def __init__(self, order: Iterable[str] = (), typed: Mapping[str, Typed] | None = None) -> None:
        self.typed = dict(typed or {})
        self.unusable: set[str] = set()
        """Settings without a right value: nothing else is checked against them."""
        self._rank = {name: rank for rank, name in enumerate(order)}
        self._found: list[tuple[str, UserError]] = []

    def run(self, setting: str, check: Callable[[], T]) -> T | None:
        """What `check` of a setting or option returns; None if it raises a UserError, or if the setting is unusable."""
        if setting in self.unusable:
            return None
        try:
            return check()
        except UserError as error:
            self.add(setting, error)
            return None

    def add(self, setting: str, error: UserError) -> None:
        """A mistake in a setting. One that is known is not added again: several checks may meet it."""
        known = {str(each) for _, each in self._found}
        for each in error.errors if isinstance(error, UserErrors) else [error]:
            if str(each) not in known:
                self._found.append((setting, each))

    @property
    def passed(self) -> bool:
        """Whether no mistake has been found so far."""
        return not self._found

    def finish(self) -> None:
        """Raise what was found, if anything: a single mistake as it is, several as UserErrors."""
        if self._found:
            self.raise_found()

    def finished(self, value: T | None) -> T:
        """What a check returned, after `finish`."""
        self.finish()
        assert value is not None  # only a check that found a mistake returns None
        return value

    def raise_found(self) -> NoReturn:
        """`finish` where something was found."""
        other = self._rank.get("sets", len(self._rank))
        in_order = sorted(self._found, key=lambda found: self._rank.get(found[0], other))
        errors = [self._as_typed(error) for _, error in in_order]
        raise errors[0] if len(errors) == 1 else UserErrors(errors)

    def _as_typed(self, error: UserError) -> UserError:
        """`--device cuda` for `device 'cuda'`, where that is what the user typed."""
        message = str(error)
        for name, typed in self.typed.items():
            setting = rf"(?<![\w.-]){re.escape(name)}(?: =)? (['\"]?){re.escape(typed.value)}\1(?![\w.]\w)(?!\w)"
            message = re.sub(setting, str(typed).replace("\\", r"\\"), message)
        if message == str(error):
            return error
        renamed = type(error)(message)
        renamed.__cause__ = error
        return renamed


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, or an empty string when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


class Interrupted(BaseException):
    """Work stopped by a signal after saving what can be saved; the exit code is 128 + the signal's number.

    Not an Exception, as KeyboardInterrupt is none: it may be raised anywhere, and must not pass for a damaged file.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.message = message
