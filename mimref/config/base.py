"""Strict models of settings: the kinds of values, and what all commands share."""

from typing import Annotated, Any, ClassVar, Literal, get_args

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _check_ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("a range whose start does not exceed its end")
    return pair


# The message of a ValueError in a field's validator completes "expected ...".
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Hue = Annotated[float, Field(ge=0, le=0.5)]
Decay = Annotated[float, Field(ge=0, lt=1)]
AreaRange = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]],
    Field(strict=False),
    AfterValidator(_check_ordered),
]
PositiveRange = Annotated[tuple[Positive, Positive], Field(strict=False), AfterValidator(_check_ordered)]
Probabilities = Annotated[tuple[Fraction, Fraction, Fraction], Field(strict=False)]


class Section(BaseModel):
    """One strict, immutable table of settings: unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, table: Any) -> Any:
        # TOML has no null: for optional fields the word `none` stands for it.
        if not isinstance(table, dict):
            return table
        optional = {name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        return {key: None if value == "none" and key in optional else value for key, value in table.items()}


class DataConfig(Section):
    """Which images."""

    spec: str | None = None
    """A folder, `digits`, `fashion-mnist`, `torchvision:NAME`, `list:FILE` (a .csv or .parquet table of paths),
    `hf:FOLDER` or `hf:NAME` (a Hugging Face data set, on disk or on the hub) or `wds:SHARDS` (webdataset tar files)."""
    root: str | None = None
    """Folder of the data set's files, for a spec that is a name."""
    image: str | None = None
    """Column of `list:` that holds paths, column of `hf:` that holds images, or member of a sample of `wds:`, such as
    `left.jpg`. None: chosen by its usual name or its type."""
    label: str | None = None
    """The same for labels: a column, or a member, such as `txt`, whose text is the label."""
    download: bool = False
    """Let torchvision download the data set."""
    max_bad: int = Field(default=100, ge=0)
    """Unreadable images to skip and report; one more stops the run."""
    train_limit: int | None = Field(default=None, gt=0)
    """Use only the first N training images, in a fixed order that is class-balanced for labelled data."""
    crop_fraction: float | None = Field(default=None, gt=0, le=1)
    """Evaluation: size of the centre crop over the resized shorter side. None: as in the checkpoint's header, else
    0.875 (224 / 256)."""


class CommandConfig(Section):
    """Settings of every command."""

    command: ClassVar[str]
    """Name on the command line, and folder of the command's presets."""

    preset: str | None = None
    """Name of the preset that the settings come from."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Random seed."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: the best available."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 elsewhere."""
    workers: int | None = Field(default=None, ge=0)
    """Loader processes. None: 0 for images in memory, else one per core that this process may use, at most 16.

    torchrun's processes on one machine share its cores.
    """
    data: DataConfig = DataConfig()


def dump_config(config: CommandConfig) -> str:
    """The settings as TOML text that `load_config` reads back to an equal config; unset keys are omitted."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


Numbers = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]
Temperatures = Annotated[list[Positive], Field(min_length=1)]
