"""Settings derived from encoder and images, each with the rule that gave it.

Without a preset, a recipe derives what the user did not set. With one, its values that cannot fit are adapted; what the
user gave as an option, with `--set` or in Python is never changed. `config.toml` holds the result, so that a run can be
repeated exactly: nothing is derived from a preset.
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
    """What the preset gives; None where nothing did."""

    @property
    def change(self) -> str:
        """The value, or `before -> after`."""
        value = "none" if self.value is None else show_value(self.value)
        return value if self.before is None else f"{show_value(self.before)} -> {value}"

    def __str__(self) -> str:
        return f"{self.setting} {self.change}: {self.rule}"


class Recipe(Generic[C]):
    """Settings in the making. Rules read `config`, which has what the user set and what was derived so far."""

    def __init__(self, config: C) -> None:
        self.config = config
        self.derived: list[Derived] = []

    def derive(self, setting: str, value: Any, rule: str) -> None:
        """Give a setting its value, unless the user did. Without effect when the settings come from a preset."""
        if self.config.preset is None and not is_set(self.config, setting):
            self._put(Derived(setting, value, rule))

    def adapt(self, setting: str, value: Any, rule: str) -> None:
        """Replace a value that cannot fit, if it is the preset's; the user's own, or with `strict` any, stays."""
        if is_adaptable(self.config, setting) and get(self.config, setting) != value:
            self._put(Derived(setting, value, rule, get(self.config, setting)))

    def before(self, setting: str) -> Any:
        """The preset's value of a setting that was adapted; None for any other."""
        return next((each.before for each in self.derived if each.setting == setting), None)

    def finish(self) -> C:
        """The checked settings. Raises ConfigError for values of the user that do not fit each other."""
        checked = validated(type(self.config), self.config.model_dump(exclude_unset=True))
        return with_given(checked, self.config.given)

    def _put(self, derived: Derived) -> None:
        self.config = _replaced(self.config, derived.setting.split("."), derived.value)
        self.derived.append(derived)


def is_set(config: CommandConfig, setting: str) -> bool:
    """Whether a preset, an option, `--set`, a caller in Python or a recipe has set it."""
    section: Any = config
    for part in setting.split("."):
        if part not in section.model_fields_set:
            return False
        section = getattr(section, part)
    return True


def is_adaptable(config: TrainingConfig, setting: str) -> bool:
    """Whether the value comes from a preset, or from the defaults that complete it, and may be adapted."""
    parts = setting.split(".")
    given = any(".".join(parts[:end]) in config.given for end in range(1, len(parts) + 1))
    return config.preset is not None and not config.strict and not given


def get(config: CommandConfig, setting: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in setting.split("."):
        value = getattr(value, part)
    return value


def with_given(config: C, given: frozenset[str]) -> C:
    """The settings, with the dotted keys that the user gave beside the preset."""
    config._given = given
    return config


def _replaced(section: S, parts: list[str], value: Any) -> S:
    """A copy with another value, which is not checked."""
    name, *rest = parts
    return section.model_copy(update={name: _replaced(getattr(section, name), rest, value) if rest else value})


# --- numbers and names that rules of several commands need

_CHARACTERS = frozenset(["digits", "mnist", "qmnist", "emnist", "kmnist", "usps", "svhn", "omniglot"])


def is_character(data: DataConfig) -> bool:
    """Whether the data set is known as one of digits or letters."""
    return (data.spec or "").rpartition(":")[2].lower().replace("-", "") in _CHARACTERS


def power_of_two(number: float) -> int:
    """The largest one up to this number, at least 1."""
    return 1 << max(0, int(number).bit_length() - 1)


def two_digits(number: float) -> float:
    """Rounded to two significant digits."""
    return float(f"{number:.1e}")
