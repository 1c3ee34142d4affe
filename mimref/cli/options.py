"""Options that several commands share, each declared once, in groups that commands inherit from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mimref.cli.parser import Options, argument, option
from mimref.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from mimref.config.base import CommandConfig

    Config = TypeVar("Config", bound=CommandConfig)

Text = str | None
"""Text that `load_config` turns into a value; None if the option is not given."""


class Debug(Options):
    debug: bool = option("Show the traceback of an error.")  # read by `mimref.cli.run`


class Quiet(Debug):
    quiet: bool = option("Print only the result.")


class Device(Quiet):
    device: Text = option("Default: best available.", "cpu|cuda|mps", "device")


class Force(Quiet, panel="Output"):
    force: bool = option("Replace existing results.")


class Output(Force, panel="Output"):
    out: Path | None = option("Output folder.", "DIR")

    def check_out(self) -> None:
        """Check that results may be written into the output folder."""
        from mimref.results import check_folder

        if (out := self.out) is not None:
            self.checks.run("out", lambda: check_folder(out, self.force))


class Report(Output, panel="Output"):
    """Options of commands that write a page about their results."""

    no_report: bool = option("Do not write report.html.")

    @property
    def reports(self) -> bool:
        """Whether the command writes a report into its output folder."""
        return self.out is not None and not self.no_report


class Resume(Output, panel="Output"):
    resume: bool = option("Continue the unfinished run in the output folder.")

    def resumed(self, settings: str, given: str | None) -> str | None:
        """Return `given`, else the settings of the run that `--resume --out DIR` continues, if its folder has any."""
        file = self.out / settings if self.out and self.resume and given is None else None
        return str(file) if file and file.is_file() else given

    def state_file(self, name: str) -> Path | None:
        """Return the state file that an interrupted evaluation continues from; None without an output folder."""
        if self.resume and self.force:
            raise OutputError(f"--resume continues the {name} and --force starts it over: choose one")
        state = self.out / "state" / f"{name}.pt" if self.out else None
        if state is None and self.resume:
            raise ConfigError(f"--resume continues the {name} in an output folder; name the folder with --out DIR")
        if state is not None and state.exists() and not self.resume and not self.force:
            raise OutputError(f"{self.out}: holds an unfinished {name}; --resume continues it, --force starts over")
        return state


class Configured(Device):
    precision: Text = option("Default: bf16 on CUDA, elsewhere fp32 or a recipe's choice.", "fp32|bf16", "precision")
    sets: list[str] | None = option("Any other setting; repeatable.", "KEY=VALUE", flag="--set")

    def given(self, setting: str) -> str | None:
        """Return the value of a setting that an option or `--set` gives; None if there is none."""
        pairs = (each.partition("=") for each in self.sets or ())
        sets = [value.strip() for key, _, value in pairs if key.strip() == setting]
        fields = (field for field, (option, _) in self.declared().items() if option.sets == setting)
        found = sets[-1].strip("\"'") if sets else next((getattr(self, field) for field in fields), None)
        return found if isinstance(found, str) else None

    def load(
        self, model: "type[Config]", preset: str | None = None, choose: Callable[[], str | None] | None = None
    ) -> "Config":
        """Build the config: the defaults, then `preset`, the options and `--set`, without what `checks` finds wrong.

        choose: chooses the preset if none is given; it may raise ConfigError.
        """
        from mimref.config.load import load_config

        if preset is None and choose is not None:
            if (chosen := self.checks.run("preset", lambda: [choose()])) is None:
                self.checks.unusable.add("preset")
            else:
                (preset,) = chosen
        given = {option.sets: getattr(self, field) for field, (option, _) in self.declared().items() if option.sets}
        return load_config(model, preset, given, self.sets or (), self.checks)


class Preset(Configured):
    preset: Text = option("Preset to start from; `mimref presets list` shows all.", "NAME|FILE.toml")

    def refine_preset(self) -> str | None:
        """Choose the preset of a refinement; None if a recipe derives the settings, for packaged weights by default."""
        from mimref.config.presets import choose_refine_preset

        arch, source, weights, data = map(
            self.given, ("encoder.arch", "encoder.source", "encoder.weights", "data.spec")
        )
        preset = choose_refine_preset(self.preset, arch, source, weights, data)
        if preset is None and arch is None and weights is None:
            self.sets = [*(self.sets or ()), "encoder.weights=quickstart"]
        return preset


class Seed(Configured):
    seed: Text = option("Random seed; default 0.", "N", "seed")


class Data(Configured, panel="Data"):
    data: Text = option(
        "A folder, digits, fashion-mnist, torchvision:NAME, vtab:NAME, vtab1k:NAME, list:FILE, hf:FOLDER, hf:NAME, "
        "wds:SHARDS.",
        "SPEC",
        "data.spec",
    )


WORKERS = option("Processes that read images; default: one per core, at most 16.", "N", "workers")


class Images(Data, panel="Data"):
    workers: Text = WORKERS
    channels: Text = option(
        "Number of channels per image, whose values are kept; default: colour, or the encoder's.", "N", "data.channels"
    )


CHECKPOINT = "Weights file, or output folder of `refine`"
ARCH = option("vit_b16, vit_l16, vit_h14, vit_2b14 or a timm name.", "NAME", "arch")
SOURCE = option("Pre-training method of the weights: mae, d2v2, timm, ...", "NAME", "source")
PART = option("Which encoder to read from a file that holds several, such as teacher.", "NAME", "encoder.part")


class TrainedArch(Options, panel="Encoder"):
    arch: Text = replace(ARCH, sets="encoder.arch")


class TrainedEncoder(TrainedArch, panel="Encoder"):
    source: Text = replace(SOURCE, sets="encoder.source")
    encoder: Text = PART


class EncoderPass(Images, panel="Encoder"):
    """Options of commands that read features of encoders."""

    arch: Text = ARCH
    source: Text = SOURCE
    encoder: Text = PART
    resolution: Text = option("Image size; default: the encoder's own.", "PIXELS", "resolution")
    cache: Text = option("Where features are cached; default: the user's cache folder.", "DIR|off", "cache.folder")


class Pool(Options, panel="Encoder"):
    pool: Text = option("Token pooling; default cls.", "cls|mean|cls+mean", "pool")


class FinalNorm(Options, panel="Encoder"):
    final_norm: bool | None = option("Apply the encoder's final norm.", sets="final_norm")


class Blocks(Pool, FinalNorm, panel="Encoder"):
    blocks: Text = option("Blocks to take features from; default last.", "last|last4|all|1,5,12", "blocks")


class Subject(Options, panel="Data"):
    checkpoint: Text = argument(
        f"{CHECKPOINT}; default: the packaged tiny encoder, on digits.", "CKPT", "checkpoint", required=False
    )
    features: tuple[str, str] | None = option(
        "Features made elsewhere, as arrays x and y, instead of CKPT.", "TRAIN.npz VAL.npz", "features"
    )


BATCH_SIZE = "Images per update, over all processes."


class Batch(Options, panel="Training"):
    batch_size: Text = option(BATCH_SIZE, "N", "batch_size")


MICRO_BATCH = "Images per encoder pass; same result, less memory."


class MicroBatch(Batch, panel="Training"):
    micro_batch: Text = option(MICRO_BATCH, "N|auto", "micro_batch")


class Shard(Options, panel="Training"):
    shard: bool | None = option("Shard a large encoder across all processes; same result.", sets="shard")


class Split(Options, panel="Data"):
    split: Text = option("Images to use; default val.", "train|val", "split")


class Draws(Options, panel="Protocol"):
    shots: Text = option("Training images per class; default 1,2,5.", "1,2,5", "shots")
    splits: Text = option("Draws of the shots; default 3, or 20 with fewer than 10,000 training images.", "N", "splits")


class Clustering(Options, panel="Protocol"):
    metrics: Text = option(
        "For the clusters: acc, nmi, ami, ari; for the classes: sil (silhouette), dbs (Davies-Bouldin).",
        "acc,nmi,ami,ari,sil,dbs",
        "metrics",
    )
    runs: Text = option("k-means runs; default 100.", "N", "runs")
