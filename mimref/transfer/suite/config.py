"""Settings of `mimref transfer`."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from mimref.config.base import CommandConfig, ReadingConfig, Section
from mimref.features.config import CacheConfig

Protocol = Literal["knn", "lowshot", "probe", "cluster"]


def _check_name(text: str) -> str:
    if not text.isascii() or not text.replace("-", "").replace("_", "").isalnum():
        raise ValueError("a name of letters, digits, - and _, which becomes a folder's")
    return text


class EntryConfig(Section):
    """One entry of a suite: a data set and how encoders are measured on it."""

    name: Annotated[str, AfterValidator(_check_name)]
    """In the table, and of the entry's folder."""
    data: str
    """As `data.spec`."""
    protocol: Protocol
    """The command that measures."""
    preset: str | None = None
    """Of that command."""
    settings: dict[str, Any] = {}
    """Of that command."""


class SuiteConfig(CommandConfig):
    """All settings of `mimref transfer`; those that a protocol has hold for its entries, unless these set them."""

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
    """What is measured, a table each: `name`, `data`, `protocol`, and optionally `preset` and `settings`."""
