"""The options that several commands have, one declaration each, in groups that commands inherit from."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeVar

from mimref.cli.parser import Argument, Option, Options
from mimref.errors import ConfigError

if TYPE_CHECKING:
    from mimref.config.base import CommandConfig

    Config = TypeVar("Config", bound=CommandConfig)


def read_ints(option: str, text: str) -> list[int]:
    """Whole numbers separated by commas. Raises ConfigError that names the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected whole numbers separated by commas, such as 10,20") from None


def read_floats(option: str, text: str) -> list[float]:
    """Numbers separated by commas. Raises ConfigError that names the option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected numbers separated by commas, such as 0,0.5,1") from None


def read_names(option: str, text: str) -> list[str]:
    """Names separated by commas."""
    return [part.strip() for part in text.split(",")]


# --- every command


@dataclass(kw_only=True)
class Debug(Options):
    """Of every command. `mimref.cli.run` reads it from the command line itself."""

    debug: Annotated[bool, Option("Show the traceback of errors.")] = False


@dataclass(kw_only=True)
class Quiet(Debug):
    """Of commands that report progress."""

    quiet: Annotated[bool, Option("Print the result only.")] = False


@dataclass(kw_only=True)
class Device(Quiet):
    """Of commands that compute."""

    device: Annotated[str | None, Option("Default: best available.", "cpu|cuda|mps", "device")] = None


@dataclass(kw_only=True)
class Configured(Device):
    """Of commands that have a config."""

    precision: Annotated[str | None, Option("Default: bf16 on CUDA, fp32 elsewhere.", "fp32|bf16", "precision")] = None
    sets: Annotated[list[str] | None, Option("Any other setting; repeatable.", "KEY=VALUE", flag="--set")] = None

    def load(self, model: "type[Config]", preset: str | None = None) -> "Config":
        """The command's config: the preset, then the options, then `--set`. Raises ConfigError."""
        from mimref.config.load import load_config

        return load_config(model, preset, self.settings(), self.sets or ())


@dataclass(kw_only=True)
class Data(Configured):
    """Of commands with a data set."""

    panel: ClassVar[str] = "Data"
    data: Annotated[
        str | None,
        Option(
            "A folder, digits, fashion-mnist, torchvision:NAME, list:FILE, hf:FOLDER, wds:SHARDS.", "SPEC", "data.spec"
        ),
    ] = None


@dataclass(kw_only=True)
class Images(Data):
    """Of commands that read images."""

    panel: ClassVar[str] = "Data"
    workers: Annotated[str | None, Option("Processes that read images.", "N", "workers")] = None


@dataclass(kw_only=True)
class Seed(Options):
    """Of commands that draw random numbers."""

    seed: Annotated[str | None, Option("Random seed; default 0.", "N", "seed")] = None


@dataclass(kw_only=True)
class Preset(Options):
    """Of commands with presets."""

    preset: Annotated[
        str | None, Option("Settings to start from; `mimref presets list` shows all.", "NAME|FILE.toml")
    ] = None


@dataclass(kw_only=True)
class Force(Quiet):
    """Of commands that write."""

    panel: ClassVar[str] = "Output"
    force: Annotated[bool, Option("Replace existing results.")] = False


@dataclass(kw_only=True)
class Output(Force):
    """Of commands that write a folder."""

    panel: ClassVar[str] = "Output"
    out: Annotated[Path | None, Option("Output folder.", "DIR")] = None


@dataclass(kw_only=True)
class Resume(Output):
    """Of commands whose unfinished work can be continued."""

    panel: ClassVar[str] = "Output"
    resume: Annotated[bool, Option("Continue the unfinished run in the output folder.")] = False


# --- training and benchmarks

ARCH = "vit_b16, vit_l16, vit_h14, vit_2b14 or a timm name."
SOURCE = "Pre-training method of the weights: mae, d2v2, timm, ..."
CHECKPOINT = "Weights file, or output folder of `refine`."
BatchSize = Annotated[str | None, Option("Images per update over all processes.", "N", "batch_size")]
MicroBatch = Annotated[
    str | None, Option("Images per encoder pass; same result, less memory.", "N|auto", "micro_batch")
]


@dataclass(kw_only=True)
class TrainedEncoder(Options):
    """The encoder that is trained or timed."""

    panel: ClassVar[str] = "Encoder"
    arch: Annotated[str | None, Option(ARCH, "NAME", "encoder.arch")] = None
    source: Annotated[str | None, Option(SOURCE, "NAME", "encoder.source")] = None


# --- evaluation

Shots = Annotated[str | None, Option("Training images per class; default 1,2,5.", "1,2,5", "shots", read_ints)]
Splits = Annotated[
    str | None, Option("Draws of training images; default 3, or 20 from fewer than 10,000 images.", "N", "splits")
]
Metrics = Annotated[
    str | None,
    Option(
        "Of the clusters: acc, nmi, ami, ari; of the classes: sil (silhouette), dbs (Davies-Bouldin).",
        "acc,nmi,ami,ari,sil,dbs",
        "metrics",
        read_names,
    ),
]
Runs = Annotated[str | None, Option("k-means runs; default 100.", "N", "runs")]
Split = Annotated[str | None, Option("Which images; default val.", "train|val", "split")]


@dataclass(kw_only=True)
class EncoderPass(Images):
    """How encoders are read and see images."""

    panel: ClassVar[str] = "Encoder"
    arch: Annotated[str | None, Option(ARCH, "NAME", "arch")] = None
    source: Annotated[str | None, Option(SOURCE, "NAME", "source")] = None
    resolution: Annotated[str | None, Option("Default: the encoder's own.", "PIXELS", "resolution")] = None
    cache: Annotated[str | None, Option("Where features are cached.", "DIR|off", "cache.folder")] = None


@dataclass(kw_only=True)
class Pool(Options):
    """Which tokens are read."""

    panel: ClassVar[str] = "Encoder"
    pool: Annotated[str | None, Option("Token pooling; default cls.", "cls|mean|cls+mean", "pool")] = None


@dataclass(kw_only=True)
class Pooled(Pool):
    """How the features of a block are made."""

    panel: ClassVar[str] = "Encoder"
    final_norm: Annotated[bool | None, Option("Apply the encoder's final norm.", sets="final_norm")] = None


@dataclass(kw_only=True)
class Blocks(Pooled):
    """Which features are read."""

    panel: ClassVar[str] = "Encoder"
    blocks: Annotated[
        str | None, Option("Which blocks' features; default last.", "last|last4|all|1,5,12", "blocks")
    ] = None


@dataclass(kw_only=True)
class Subject(Options):
    """What is evaluated."""

    panel: ClassVar[str] = "Data"
    checkpoint: Annotated[str | None, Argument(CHECKPOINT, "[CKPT]", "checkpoint")] = None
    features: Annotated[
        tuple[str, str] | None,
        Option("Arrays x and y made elsewhere, in place of CKPT.", "TRAIN.npz VAL.npz", "features"),
    ] = None
