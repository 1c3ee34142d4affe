"""Errors that a user can fix, and their collection; each message is one line with the value at fault and the remedy."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake in the user's input; the command line prints only the message and exits with code 2."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, or does not fit the others."""


class DataError(UserError):
    """Images or labels that are missing or cannot be read."""


class CheckpointError(UserError):
    """A file that holds no weights, or weights that do not fit the requested architecture."""


class OutputError(UserError):
    """An output folder or file that cannot or must not be written."""


class DivergenceError(UserError):
    """Training produced a loss or weights that are not finite."""


class LostRankError(UserError):
    """Another process of a distributed run no longer answers."""


class UserErrors(UserError):
    """Several mistakes found together, one line each."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = errors


class Typed(NamedTuple):
    """An option as the user typed it."""

    flag: str
    value: str
    example: str
    """Example value from the option's help."""

    def __str__(self) -> str:
        return f"{self.flag} {self.value}"


class Checks:
    """Runs independent checks, and raises all mistakes that they find as one error.

    order: settings and options in the order in which their mistakes are listed. typed: settings that the user typed as
    options; their mistakes are reported under the option's name.
    """

    def __init__(self, order: Iterable[str] = (), typed: Mapping[str, Typed] | None = None) -> None:
        self.typed = dict(typed or {})
        self.unusable: set[str] = set()
        """Settings without a valid value: nothing else is checked against them."""
        self._rank = {name: rank for rank, name in enumerate(order)}
        self._found: list[tuple[str, UserError]] = []

    def run(self, setting: str, check: Callable[[], T]) -> T | None:
        """Return the result of a setting's `check`; None if it raises a UserError, or if the setting is unusable."""
        if setting in self.unusable:
            return None
        try:
            return check()
        except UserError as error:
            self.add(setting, error)
            return None

    def add(self, setting: str, error: UserError) -> None:
        """Add a mistake in a setting, unless it is known already: several checks may find the same one."""
        known = {str(each) for _, each in self._found}
        for each in error.errors if isinstance(error, UserErrors) else [error]:
            if str(each) not in known:
                self._found.append((setting, each))

    @property
    def passed(self) -> bool:
        """Whether no mistake has been found so far."""
        return not self._found

    def finish(self) -> None:
        """Raise the mistakes found, if any: a single one as it is, several as UserErrors."""
        if self._found:
            self.raise_found()

    def finished(self, value: T | None) -> T:
        """Call `finish`, then return what a check returned."""
        self.finish()
        assert value is not None  # only a check that found a mistake returns None
        return value

    def raise_found(self) -> NoReturn:
        """Raise the mistakes found; there must be at least one."""
        other = self._rank.get("sets", len(self._rank))
        in_order = sorted(self._found, key=lambda found: self._rank.get(found[0], other))
        errors = [self._as_typed(error) for _, error in in_order]
        raise errors[0] if len(errors) == 1 else UserErrors(errors)

    def _as_typed(self, error: UserError) -> UserError:
        """Rewrite a message as the user typed the setting, such as `--device cuda` for `device 'cuda'`."""
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
    """Return `; did you mean 'x'?` for the nearest known word, or an empty string if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


class Interrupted(BaseException):
    """Work stopped by a signal after saving what can be saved; the exit code is 128 + the signal's number.

    Like KeyboardInterrupt, not an Exception: it may be raised anywhere, and must not be mistaken for a damaged file.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.message = message
