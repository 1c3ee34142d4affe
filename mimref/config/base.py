"""Strict models of settings: types of values, and the settings of all commands."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import tomli_w
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from mimref.errors import ConfigError


def _check_ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("a range whose start does not exceed its end")
    return pair


def _check_range(text: str) -> str:
    if text in ("type", "image", "percentile"):
        return text
    try:
        low, high = map(float, text.split(","))
        if not -math.inf < low < high < math.inf:
            raise ValueError
    except ValueError:
        raise ValueError("type, image, percentile or A,B with numbers A below B") from None
    return text


# The message of a ValueError in a field's validator completes "expected ...".
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Hue = Annotated[float, Field(ge=0, le=0.5)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Area = Annotated[float, Field(gt=0, le=1)]
AreaRange = Annotated[tuple[Area, Area], Field(strict=False), AfterValidator(_check_ordered)]
PositiveRange = Annotated[tuple[Positive, Positive], Field(strict=False), AfterValidator(_check_ordered)]
PatchGrid = Annotated[tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]], Field(strict=False)]
Probabilities = Annotated[tuple[Fraction, Fraction, Fraction], Field(strict=False)]
PixelRange = Annotated[str, AfterValidator(_check_range)]
AsList = BeforeValidator(lambda value: value.tolist() if hasattr(value, "tolist") else value)  # arrays and tensors
PerChannel = Annotated[tuple[float, ...], Field(strict=False, min_length=1), AsList]
PerChannelPositive = Annotated[tuple[Positive, ...], Field(strict=False, min_length=1), AsList]
Numbers = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]
Temperatures = Annotated[list[Positive], Field(min_length=1)]
Interpolation = Literal["mae", "dino", "dinov2", "dinov2_reg", "timm", "torchvision", "mae_pytorch"]
"""Whose code interpolates position embeddings to other image sizes; see `mimref.encoders.positions`."""


class Section(BaseModel):
    """One strict, immutable table of settings: unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, table: Any) -> Any:
        # TOML has no null; for optional fields the word `none` stands for it.
        if not isinstance(table, dict):
            return table
        optional = {name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        absent = {key for key, value in table.items() if key in optional and isinstance(value, str) and value == "none"}
        return {key: None if key in absent else value for key, value in table.items()}


class ReadingConfig(Section):
    """What cannot be inferred from an encoder's weights."""

    num_heads: int | None = Field(default=None, gt=0)
    """Number of attention heads; a `custom` encoder needs it. None: as in the published model of the weights' width,
    else one per 64 channels."""
    part: str | None = None
    """Which encoder to read from a file that holds several, such as `teacher`: its prefix in the file, or a part of the
    prefix that no other encoder has. None: the encoder that the authors of such files evaluate."""
    grid: PatchGrid | None = None
    """Rows and columns of the patch grid that a file's position embedding is for. None: a square, else the shape
    nearest to one."""
    interpolation: Interpolation | None = None
    """Rule for interpolating positions to image sizes other than the weights'. None: the rule of the weights'
    format."""
    channel_init: Literal["repeat", "sum", "random"] | None = None
    """Patch embedding if `data.channels` differs from the weights' channels. `repeat` repeats the weights' channels in
    turn, scaled by their number divided by the images' (for one channel, it adds them). `sum` gives each channel the
    same share of their sum. `random` keeps them for the first channels and draws the others at random. None:
    `repeat`."""
    color_channels: Numbers | None = None
    """For `random`: the images' channels, counted from 1, that take the weights' red, green and blue. None: 1, 2, 3."""

    @model_validator(mode="after")
    def _check_color_channels(self) -> Self:
        if self.color_channels is not None and self.channel_init != "random":
            raise ValueError("color_channels needs channel_init = 'random'")
        return self


class DataConfig(Section):
    """The images, and how they are read."""

    spec: str | None = None
    """A folder, `digits`, `fashion-mnist`, `torchvision:NAME`, `vtab:NAME`, `vtab1k:NAME`, `list:FILE` (a .csv,
    .tsv or .parquet table of paths), `hf:FOLDER` or `hf:NAME` (a Hugging Face data set, on disk or on the hub) or
    `wds:SHARDS` (webdataset tar files)."""
    root: str | None = None
    """Folder of the data set's files, if the spec is a name."""
    image: str | None = None
    """`list:`: column that holds paths. `hf:`: column that holds images. `wds:`: member of a sample, such as
    `left.jpg`. None: chosen by its usual name or its type."""
    label: str | None = None
    """Like `data.image`, for labels: a column, or a member such as `txt` whose text is the label."""
    download: bool = False
    """Let torchvision download the data set."""
    max_bad: int = Field(default=100, ge=0)
    """Maximum number of unreadable images to skip and report; one more stops the run."""
    train_limit: int | None = Field(default=None, gt=0)
    """Use only the first N training images, in a fixed order that is class-balanced for labelled data."""
    crop_fraction: float | None = Field(default=None, gt=0, le=1)
    """Evaluation: size of the centre crop divided by the resized shorter side. None: as in the checkpoint's header,
    else 0.875 (224 / 256)."""
    resize: Literal["shorter", "direct"] | None = None
    """Evaluation: `shorter` resizes the shorter side and crops the centre; `direct` resizes the whole image to a
    square, whatever its aspect ratio (as VTAB does). None: as in the checkpoint's header, else `shorter`."""
    orientation: Literal["file", "exif"] | None = None
    """Images with an EXIF orientation: `file` leaves their pixels as stored, `exif` applies the orientation. None: as
    in the checkpoint's header, else `file`, as for published numbers."""
    alpha: Literal["drop", "white", "black", "checker"] | None = None
    """Transparent images: `drop` ignores transparency; the others composite the image on white, black, or squares of
    two grays. None: as in the checkpoint's header, else `drop`, as for published numbers."""
    range: PixelRange | None = None
    """Images of more than 8 bits: the values that become black and white. `type`: 0 and 65535; `image`: each image's
    minimum and maximum; `percentile`: each image's percentiles 0.5 and 99.5; `A,B`: these two numbers. None: as in the
    checkpoint's header, else `type`."""
    decode: Literal["auto", "cpu", "device"] = "auto"
    """Where JPEGs are decoded: `cpu` decodes and crops them in the loader processes, `device` on the GPU (CUDA, with
    nvJPEG), except for those that the GPU cannot decode. `auto`: `cpu`."""
    channels: int | None = Field(default=None, gt=0)
    """Number of channels that every image has; their values are kept. For TIFF, `.npy` and `.npz` files, arrays, and
    what Pillow reads. Values of more than 8 bits, and floats, become 32-bit floats. None: as in the checkpoint's header
    or weights, else 8-bit colour, with gray repeated for red, green and blue."""
    mean: PerChannel | None = None
    """Mean of every channel, where black is 0 and white is 1. None: as in the checkpoint's header, else ImageNet's for
    colour; with `channels`, measured on the training images unless weights with as many channels determine it."""
    std: PerChannelPositive | None = None
    """Standard deviation of every channel, as for `data.mean`."""

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("data.mean and data.std belong together; set both")
        if self.mean is not None and self.std is not None:
            wanted = self.channels or 3
            for name, values in (("mean", self.mean), ("std", self.std)):
                if len(values) != wanted:
                    raise ValueError(
                        f"data.{name} has {len(values)} values for images of {wanted} channels; set data.channels too"
                    )
        if self.channels is not None and self.alpha not in (None, "drop"):
            wrong = f"data.alpha {self.alpha} produces colour images, but data.channels is {self.channels}"
            raise ValueError(f"{wrong}; omit data.alpha")
        return self


class CommandConfig(Section):
    """Settings of every command."""

    command: ClassVar[str]
    """Name on the command line, and folder of the command's presets."""
    device_decoding: ClassVar[bool] = False
    """Whether the command can decode images on the device."""
    unread: ClassVar[Mapping[str, str]] = {}
    """Inherited settings without effect on the command, and what to do instead of setting them."""
    presets_of: ClassVar[str | None] = None
    """Another command, whose presets the settings start from."""

    preset: str | None = None
    """Name of the preset that the settings come from."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Random seed."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: the best available."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 elsewhere. A recipe may choose bf16 on a CPU where it is fast;
    where it is not, a preset's bf16 is adapted to fp32."""
    workers: int | None = Field(default=None, ge=0)
    """Loader processes. None: 0 for images in memory, else one per core that this process may use, at most 16;
    torchrun's processes on one machine share its cores."""
    data: DataConfig = DataConfig()
    _given: frozenset[str] = PrivateAttr(default=frozenset())

    @model_validator(mode="after")
    def _check_decoding(self) -> Self:
        if self.data.decode == "device" and not self.device_decoding:
            raise ValueError(f"data.decode device: {self.command} decodes images in its loader processes; set cpu")
        return self

    @model_validator(mode="after")
    def _check_unread(self) -> Self:
        for name, advice in self.unread.items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect on mimref {self.command}; {advice}")
        return self

    @property
    def given(self) -> frozenset[str]:
        """Dotted keys that were given in addition to the preset: by options, `--set` or a caller in Python."""
        return self._given

    def __eq__(self, other: object) -> bool:
        """Return whether all settings are equal, wherever they come from."""
        return type(self) is type(other) and self.__dict__ == other.__dict__


def dump_config(config: CommandConfig, *, defaults: bool = True) -> str:
    """Return the settings as TOML text that `load_config` reads back to an equal config.

    A setting of None is omitted, or written as `none` if its default is a value. defaults: include the settings that
    nothing has set. Raises ConfigError for names of files that are not UTF-8.
    """
    text = tomli_w.dumps(_table(config, defaults))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = next(line for line in text.splitlines() if text[error.start] in line)
        raise ConfigError(f"{line!a}: is not UTF-8, so the settings cannot be stored; rename it") from error
    return text


def _table(section: Section, defaults: bool) -> dict[str, Any]:
    table = section.model_dump(exclude_none=True, exclude_unset=not defaults)
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section) and name in table:
            table[name] = _table(value, defaults)
        elif value is None and field.default is not None and (defaults or name in section.model_fields_set):
            table[name] = "none"
    return table
