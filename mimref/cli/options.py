"""The options that several commands have, one declaration each, in groups that commands inherit from."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mimref.cli.parser import Options, argument, option
from mimref.errors import ConfigError

if TYPE_CHECKING:
    from mimref.config.base import CommandConfig

    Config = TypeVar("Config", bound=CommandConfig)

Text = str | None
"""Text that `load_config` or a reader below turns into a value; None where the option is not given."""


def _reader(kind: type[int] | type[float], expected: str) -> Callable[[str, str], object]:
    """Reads numbers separated by commas; raises ConfigError that names the option."""

    def read(option: str, text: str) -> object:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise ConfigError(f"{option} {text!r}: expected {expected}") from None

    return read


read_ints = _reader(int, "whole numbers separated by commas, such as 10,20")
read_floats = _reader(float, "numbers separated by commas, such as 0,0.5,1")


def read_names(option: str, text: str) -> list[str]:
    """Names separated by commas."""
    return [part.strip() for part in text.split(",")]


# --- all commands


class Debug(Options):
    debug: bool = option("Show the traceback of errors.")  # read by `mimref.cli.run`


class Quiet(Debug):
    quiet: bool = option("Print the result only.")


class Device(Quiet):
    device: Text = option("Default: best available.", "cpu|cuda|mps", "device")


class Force(Quiet, panel="Output"):
    force: bool = option("Replace existing results.")


class Output(Force, panel="Output"):
    out: Path | None = option("Output folder.", "DIR")

    def check_out(self) -> None:
        """Raise OutputError for a folder that results must not be written into."""
        if self.out is not None:
            from mimref.results import check_folder

            check_folder(self.out, self.force)


class Resume(Output, panel="Output"):
    resume: bool = option("Continue the unfinished run in the output folder.")


# --- commands with a config


class Configured(Device):
    """Of commands with a config."""

    precision: Text = option("Default: bf16 on CUDA, fp32 elsewhere.", "fp32|bf16", "precision")
    sets: list[str] | None = option("Any other setting; repeatable.", "KEY=VALUE", flag="--set")

    def load(self, model: "type[Config]", preset: str | None = None) -> "Config":
        """The config: `preset` or else the defaults, then the options, then `--set`. Raises ConfigError."""
        from mimref.config.load import load_config

        return load_config(model, preset, self.settings(), self.sets or ())


class Preset(Configured):
    preset: Text = option("Settings to start from; `mimref presets list` shows all.", "NAME|FILE.toml")


class Seed(Configured):
    seed: Text = option("Random seed; default 0.", "N", "seed")


SPECS = "A folder, digits, fashion-mnist, torchvision:NAME, list:FILE, hf:FOLDER, hf:NAME, wds:SHARDS."


class Data(Configured, panel="Data"):
    data: Text = option(SPECS, "SPEC", "data.spec")


class Images(Data, panel="Data"):
    workers: Text = option("Processes that read images.", "N", "workers")


# --- encoders

CHECKPOINT = "Weights file, or output folder of `refine`"


def arch_option(sets: str | None = None) -> Any:
    """`--arch`."""
    return option("vit_b16, vit_l16, vit_h14, vit_2b14 or a timm name.", "NAME", sets)


def source_option(sets: str | None = None) -> Any:
    """`--source`."""
    return option("Pre-training method of the weights: mae, d2v2, timm, ...", "NAME", sets)


def part_option(sets: str | None = None) -> Any:
    """`--encoder`."""
    return option("Which encoder of a file with several, such as teacher.", "NAME", sets)


class TrainedArch(Options, panel="Encoder"):
    arch: Text = arch_option("encoder.arch")


class TrainedEncoder(TrainedArch, panel="Encoder"):
    source: Text = source_option("encoder.source")
    encoder: Text = part_option("encoder.part")


class EncoderPass(Images, panel="Encoder"):
    """Of commands that read features of encoders."""

    arch: Text = arch_option("arch")
    source: Text = source_option("source")
    encoder: Text = part_option("encoder.part")
    resolution: Text = option("Default: the encoder's own.", "PIXELS", "resolution")
    cache: Text = option("Where features are cached.", "DIR|off", "cache.folder")


class Pool(Options, panel="Encoder"):
    pool: Text = option("Token pooling; default cls.", "cls|mean|cls+mean", "pool")


class FinalNorm(Options, panel="Encoder"):
    final_norm: bool | None = option("Apply the encoder's final norm.", sets="final_norm")


class Blocks(Pool, FinalNorm, panel="Encoder"):
    blocks: Text = option("Which blocks' features; default last.", "last|last4|all|1,5,12", "blocks")


class Subject(Options, panel="Data"):
    checkpoint: Text = argument(
        f"{CHECKPOINT}; default: the packaged tiny one, on digits.", "CKPT", "checkpoint", required=False
    )
    features: tuple[str, str] | None = option(
        "Arrays x and y made elsewhere, in place of CKPT.", "TRAIN.npz VAL.npz", "features"
    )


# --- training

BATCH_SIZE = "Images per update over all processes."


class Batch(Options, panel="Training"):
    batch_size: Text = option(BATCH_SIZE, "N", "batch_size")


class MicroBatch(Batch, panel="Training"):
    micro_batch: Text = option("Images per encoder pass; same result, less memory.", "N|auto", "micro_batch")


# --- protocols


class Split(Options, panel="Data"):
    split: Text = option("Which images; default val.", "train|val", "split")


class Draws(Options, panel="Protocol"):
    shots: Text = option("Training images per class; default 1,2,5.", "1,2,5", "shots", read_ints)
    splits: Text = option("Draws of them; default 3, or 20 from fewer than 10,000 images.", "N", "splits")


class Clustering(Options, panel="Protocol"):
    metrics: Text = option(
        "Of the clusters: acc, nmi, ami, ari; of the classes: sil (silhouette), dbs (Davies-Bouldin).",
        "acc,nmi,ami,ari,sil,dbs",
        "metrics",
        read_names,
    )
    runs: Text = option("k-means runs; default 100.", "N", "runs")
