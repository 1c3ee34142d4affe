"""Settings of `mimref transfer`."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from mimref.config.base import CommandConfig, ReadingConfig, Section
from mimref.features.config import CacheConfig

Protocol = Literal["knn", "lowshot", "probe", "cluster", "finetune"]


def _check_name(text: str) -> str:
    if not text.isascii() or not text.replace("-", "").replace("_", "").isalnum():
        raise ValueError("a name of letters, digits, - and _, which becomes a folder's name")
    return text


class EntryConfig(Section):
    """One entry of a suite: a data set and how encoders are measured on it."""

    name: Annotated[str, AfterValidator(_check_name)]
    """Name in the table, and of the entry's folder."""
    data: str
    """As `data.spec`."""
    protocol: Protocol
    """Command that measures."""
    preset: str | None = None
    """Preset of that command."""
    settings: dict[str, Any] = {}
    """Settings of that command."""
    seeds: int = Field(default=1, gt=0)
    """Fine-tuning: number of runs, with the seeds S, S + 1, ..., where S is the setting `seed`; the result is their
    mean."""
    learning_rates: list[Annotated[float, Field(gt=0)]] = []
    """Fine-tuning: values of `finetune.lr` to choose from, by the mean over the seeds on `tune_data`."""
    tune_data: str | None = None
    """Data used to choose the learning rate: training uses one part, and the scores come from the other."""

    @model_validator(mode="after")
    def _check_tuning(self) -> Self:
        if self.protocol != "finetune" and {"seeds", "learning_rates", "tune_data"} & self.model_fields_set:
            raise ValueError(f"seeds, learning_rates and tune_data apply to finetune, not to {self.protocol}")
        if bool(self.learning_rates) != (self.tune_data is not None):
            raise ValueError("learning_rates and tune_data need each other; give both or none")
        return self


class SuiteConfig(CommandConfig):
    """All settings of `mimref transfer`; those that a protocol shares apply to its entries, unless an entry sets
    them."""

    command = "transfer"
    checkpoints: Annotated[list[str], Field(min_length=1)] = ["quickstart"]
    """Weights files, run folders or names of published weights."""
    encoder: ReadingConfig = ReadingConfig()
    cache: CacheConfig = CacheConfig()
    arch: str | None = None
    """As `encoder.arch`; None: read from the checkpoint."""
    source: str | None = None
    """As `encoder.source`; None: read from the checkpoint."""
    resolution: int | None = Field(default=None, gt=0)
    """Pixels per side of the images; None: the encoder's own."""
    entries: list[dict[str, Any]] = []
    """What to measure, one table per entry: `name`, `data`, `protocol`, and optionally `preset`, `settings` and, for
    fine-tuning, `seeds`, `learning_rates` and `tune_data`."""
