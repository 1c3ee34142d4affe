"""Settings derived from encoder and images, each with the rule behind it.

Without a preset, a recipe derives the settings that the user did not set. With a preset, its values that cannot fit are
adapted; settings given as options, with `--set` or in Python are never changed. `config.toml` holds the result, so that
a run can be repeated exactly: with a preset, nothing is derived.
"""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mimref.config.base import CommandConfig, DataConfig, Section
from mimref.config.load import validated
from mimref.config.presets import show_value
from mimref.config.run import TrainingConfig

C = TypeVar("C", bound=TrainingConfig)
S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Derived:
    """A setting that was derived, or adapted from a preset."""

    setting: str
    """Its dotted key."""
    value: Any
    rule: str
    """Why it has this value: a short phrase with the numbers that decide."""
    before: Any = None
    """The preset's value; None if there was none."""

    @property
    def change(self) -> str:
        """The value, or `before -> after`."""
        value = "none" if self.value is None else show_value(self.value)
        return value if self.before is None else f"{show_value(self.before)} -> {value}"

    def __str__(self) -> str:
        return f"{self.setting} {self.change}: {self.rule}"


class Recipe(Generic[C]):
    """Settings under construction. Rules read `config`, which holds what the user set and what was derived so far."""

    def __init__(self, config: C) -> None:
        self.config = config
        self.derived: list[Derived] = []

    def derive(self, setting: str, value: Any, rule: str) -> None:
        """Set a derived value, unless the user set one. Has no effect if the settings come from a preset."""
        if self.config.preset is None and not is_set(self.config, setting):
            self._put(Derived(setting, value, rule))

    def adapt(self, setting: str, value: Any, rule: str) -> None:
        """Replace a preset's value that cannot fit. The user's own values stay and, with `strict`, all values do."""
        if is_adaptable(self.config, setting) and get(self.config, setting) != value:
            self._put(Derived(setting, value, rule, get(self.config, setting)))

    def before(self, setting: str) -> Any:
        """Return the preset's value of a setting that was adapted; None for any other."""
        return next((each.before for each in self.derived if each.setting == setting), None)

    def finish(self) -> C:
        """Return the checked settings. Raises ConfigError for values of the user that do not fit together."""
        checked = validated(type(self.config), self.config.model_dump(exclude_unset=True))
        return with_given(checked, self.config.given)

    def _put(self, derived: Derived) -> None:
        self.config = _replaced(self.config, derived.setting.split("."), derived.value)
        self.derived.append(derived)


def is_set(config: CommandConfig, setting: str) -> bool:
    """Return whether a preset, an option, `--set`, a caller in Python or a recipe has set a setting."""
    section: Any = config
    for part in setting.split("."):
        if part not in section.model_fields_set:
            return False
        section = getattr(section, part)
    return True


def is_adaptable(config: TrainingConfig, setting: str) -> bool:
    """Return whether a value comes from a preset, or from the defaults that complete it, and may be adapted."""
    parts = setting.split(".")
    given = any(".".join(parts[:end]) in config.given for end in range(1, len(parts) + 1))
    return config.preset is not None and not config.strict and not given


def get(config: CommandConfig, setting: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = config
    for part in setting.split("."):
        value = getattr(value, part)
    return value


def with_given(config: C, given: frozenset[str]) -> C:
    """Record in the settings the dotted keys that the user gave in addition to the preset, and return them."""
    config._given = given
    return config


def _replaced(section: S, parts: list[str], value: Any) -> S:
    """Return a copy with another value, without checking it."""
    name, *rest = parts
    return section.model_copy(update={name: _replaced(getattr(section, name), rest, value) if rest else value})


# --- numbers and names that rules of several commands need

_CHARACTERS = frozenset(["digits", "mnist", "qmnist", "emnist", "kmnist", "usps", "svhn", "omniglot"])


def is_character(data: DataConfig) -> bool:
    """Return whether the data set is known to show digits or letters."""
    return (data.spec or "").rpartition(":")[2].lower().replace("-", "") in _CHARACTERS


def power_of_two(number: float) -> int:
    """Return the largest power of two up to a number, at least 1."""
    return 1 << max(0, int(number).bit_length() - 1)


def two_digits(number: float) -> float:
    """Round to two significant digits."""
    return float(f"{number:.1e}")
