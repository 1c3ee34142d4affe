"""Options that several commands share, and how their text is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimref.errors import ConfigError

if TYPE_CHECKING:
    from mimref.config.base import CommandConfig

PresetOption = Annotated[
    str | None, typer.Option("--preset", metavar="NAME|FILE.toml", help="Settings to start from; see `presets list`.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any single setting, such as heads.temperature=0.3; repeatable."),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="A folder, digits, fashion-mnist, torchvision:NAME, list:FILE, hf:FOLDER, wds:SHARDS.",
    ),
]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Output folder.")]
DeviceOption = Annotated[str | None, typer.Option("--device", metavar="cpu|cuda|mps", help="Default: what is there.")]
PrecisionOption = Annotated[
    str | None, typer.Option("--precision", metavar="fp32|bf16", help="Default: bf16 on CUDA, else fp32.")
]
SeedOption = Annotated[str | None, typer.Option("--seed", metavar="N", help="Seed of everything random; default 0.")]
WorkersOption = Annotated[str | None, typer.Option("--workers", metavar="N", help="Processes that read images.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print the result only.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]
ArchOption = Annotated[
    str | None,
    typer.Option("--arch", metavar="NAME", help="vit_b16, vit_l16, vit_h14, vit_2b14 or a timm name."),
]
SourceOption = Annotated[
    str | None, typer.Option("--source", metavar="NAME", help="How the weights were made: mae, d2v2, timm, ...")
]
BatchSizeOption = Annotated[
    str | None, typer.Option("--batch-size", metavar="N", help="Images per update over all processes.")
]
MicroBatchOption = Annotated[
    str | None,
    typer.Option("--micro-batch", metavar="N|auto", help="Images per encoder pass; same result, less memory."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the unfinished run in the output folder.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is in the output folder.")]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="FILE|NAME", help="Weights to refine, such as mae_l16; `quickstart` is packaged."
    ),
]
EncoderEpochsOption = Annotated[str | None, typer.Option("--epochs", metavar="N", help="Epochs of stage 2.")]
HeadsEpochsOption = Annotated[str | None, typer.Option("--heads-epochs", metavar="N", help="Epochs of stage 1.")]
StageOption = Annotated[
    str | None, typer.Option("--stage", metavar="both|heads|encoder", help="Which stages to run; default both.")
]
HeadsFromOption = Annotated[
    str | None, typer.Option("--heads-from", metavar="DIR", help="Take another run's stage 1; runs stage 2 only.")
]
HeadsOption = Annotated[
    str | None, typer.Option("--heads", metavar="BLOCKS", help="Blocks with a head: 17-24, 20,22,24, last8 or auto.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")]
EpochsOption = Annotated[str | None, typer.Option("--epochs", metavar="N", help="Passes over the images.")]
CheckpointArgument = Annotated[
    str | None, typer.Argument(metavar="[CKPT]", help="Weights file or the output folder of `refine`.")
]
NeighboursOption = Annotated[str | None, typer.Option("--k", metavar="10,20", help="Neighbours that vote; default 10.")]
TauOption = Annotated[
    str | None, typer.Option("--tau", metavar="0.07,0.1", help="Temperatures of the votes; default 0.07.")
]
ShotsOption = Annotated[
    str | None, typer.Option("--shots", metavar="1,2,5", help="Training images per class; default 1,2,5.")
]
DrawsOption = Annotated[
    str | None, typer.Option("--splits", metavar="N", help="Draws of them; default 3, or 20 of few images.")
]
MetricsOption = Annotated[
    str | None, typer.Option("--metrics", metavar="acc,nmi,ami,ari,sil,dbs", help="Which scores; see the README.")
]
RunsOption = Annotated[str | None, typer.Option("--runs", metavar="N", help="k-means runs; default 100.")]
SelectOption = Annotated[
    str | None,
    typer.Option("--select", metavar="test|val-split", help="Images the best probe is chosen on; default test."),
]
SplitOption = Annotated[str | None, typer.Option("--split", metavar="train|val", help="Which images; default val.")]
CacheOption = Annotated[
    str | None, typer.Option("--cache", metavar="DIR|off", help="Where features are kept between commands.")
]
FeaturesOption = Annotated[
    tuple[str, str] | None,
    typer.Option("--features", metavar="TRAIN.npz VAL.npz", help="Arrays x and y made elsewhere, in place of CKPT."),
]
BlocksOption = Annotated[
    str | None, typer.Option("--blocks", metavar="last|last4|all|1,5,12", help="Which blocks' features.")
]
PoolOption = Annotated[
    str | None, typer.Option("--pool", metavar="cls|mean|cls+mean", help="How tokens become one feature.")
]
FinalNormOption = Annotated[bool | None, typer.Option("--final-norm", help="Apply the encoder's last norm.")]
ResolutionOption = Annotated[
    str | None, typer.Option("--resolution", metavar="PIXELS", help="Default: the encoder's own.")
]


def common(
    data: str | None, device: str | None, precision: str | None, seed: str | None, workers: str | None
) -> dict[str, Any]:
    """Settings of the options that all commands have."""
    return {"data.spec": data, "device": device, "precision": precision, "seed": seed, "workers": workers}


def encoder_settings(
    checkpoint: str | None,
    features: tuple[str, str] | None,
    arch: str | None,
    source: str | None,
    blocks: str | None,
    pool: str | None,
    final_norm: bool | None,
    resolution: str | None,
    cache: str | None,
) -> dict[str, Any]:
    """Settings of the options that say which features of which encoder are evaluated."""
    return {
        "checkpoint": checkpoint,
        "features": features,
        "arch": arch,
        "source": source,
        "blocks": blocks,
        "pool": pool,
        "final_norm": final_norm,
        "resolution": resolution,
        "cache.folder": cache,
    }


def parse_ints(option: str, text: str | None) -> list[int] | None:
    """Whole numbers separated by commas. Raises ConfigError that names the option."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected whole numbers separated by commas, such as 10,20") from None


def parse_floats(option: str, text: str | None) -> list[float] | None:
    """Numbers separated by commas. Raises ConfigError that names the option."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected numbers separated by commas, such as 0,0.5,1") from None


def parse_names(text: str | None) -> list[str] | None:
    """Names separated by commas."""
    return None if text is None else [part.strip() for part in text.split(",")]


def default_out(config: "CommandConfig") -> Path:
    """`runs/refine-mae_l16` for the preset refine/mae_l16, `runs/refine-mine` for my/mine.toml."""
    preset = config.preset or "default"
    name = (
        Path(preset).stem if preset.endswith(".toml") else preset.removeprefix(f"{config.command}/").replace("/", "-")
    )
    return Path("runs") / f"{config.command}-{name}"


def print_facts(facts: Mapping[str, object]) -> None:
    """A line per fact, values under each other."""
    width = max(map(len, facts), default=0)
    for label, value in facts.items():
        typer.echo(f"{label:{width}}  {value}")
