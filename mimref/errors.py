"""Errors that a user can fix: one line that names the value at fault and says what to do."""

import difflib
from collections.abc import Iterable


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
