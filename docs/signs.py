"""How well measures without labels follow k-NN accuracy: trains families of checkpoints, measures all, prints a table.

python docs/signs.py train runs/signs      # hours on one core; families that are there are left alone
python docs/signs.py measure runs/signs    # the table of docs/results.md
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

FASHION = ["--data", "fashion-mnist", "--set", "data.train_limit=4000"]
QUIET = ["--set", "monitor.knn_every_epochs=0"]
UNEVALUATED = [*QUIET, "--set", "evaluate.enabled=false"]


@dataclass(frozen=True)
class Family:
    """Runs of one command; every run saves its encoder after some epochs."""

    name: str
    args: Sequence[str]
    epochs: Sequence[int]
    """After which the encoder is saved."""


def digits(name: str, *settings: str, epochs: Sequence[int] = (1, 3, 6, 10)) -> Family:
    """A refinement of the packaged encoder."""
    sets = [part for setting in settings for part in ("--set", setting)]
    return Family(name, ["refine", "--preset", "quickstart", *UNEVALUATED, *sets], epochs)


def fashion(name: str, *settings: str, epochs: Sequence[int] = (1, 2, 4, 6)) -> Family:
    """A refinement of the encoder of the family `fashion-pretrain`."""
    settings = ("views.local_views=2", "heads.queue_size=2048", "encoder_stage.epochs=6", *settings)
    sets = [part for setting in settings for part in ("--set", setting)]
    base = ["--weights", "{root}/fashion-pretrain"]
    return Family(name, ["refine", "--preset", "fashion_mnist", *base, *FASHION, *UNEVALUATED, *sets], epochs)


def short(heads: str) -> tuple[str, ...]:
    """Ten epochs of stage 2, with the heads of another family."""
    return 'stage="encoder"', f'heads_from="{{root}}/{heads}"', "encoder_stage.epochs=10"


DIGITS, CLOTHES = short("digits-refine"), short("fashion-refine")[:2]
FAMILIES = [
    digits("digits-refine", epochs=(1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20)),
    digits("digits-lr-x10", *DIGITS[:2], "encoder_stage.lr=8e-2", epochs=(1, 5, 10, 20)),
    Family(
        "digits-pretrain",
        ["pretrain", "--preset", "quickstart", *QUIET, "--set", "mae.epochs=300"],
        (1, 2, 4, 8, 12, 16, 25, 37, 50, 75, 100, 125, 150, 175, 200, 225, 250, 275, 300),
    ),
    Family(
        "fashion-pretrain",
        ["pretrain", "--preset", "fashion_mnist", *FASHION, *QUIET, "--set", "mae.epochs=40"],
        (1, 2, 3, 5, 7, 10, 13, 16, 20, 24, 28, 32, 36, 40),
    ),
    fashion("fashion-refine", epochs=(1, 2, 3, 4, 5, 6)),
    digits("digits-no-heads", "heads_stage.epochs=0", "encoder_stage.lr=3e-2", "encoder_stage.epochs=10"),
    fashion("fashion-lr-x10", *CLOTHES, "encoder_stage.lr=8e-2"),
    digits("digits-lr-div10", *DIGITS, "encoder_stage.lr=8e-4"),
    fashion("fashion-lr-div10", *CLOTHES, "encoder_stage.lr=8e-4"),
    digits("digits-cold", *DIGITS, "heads.temperature=0.02"),
    digits("digits-lr-x3", *DIGITS, "encoder_stage.lr=2.4e-2"),
    fashion("fashion-cold", *CLOTHES, "heads.temperature=0.02"),
    digits("digits-warm", *DIGITS, "heads.temperature=2.0"),
    digits("digits-long", *DIGITS[:2], "encoder_stage.epochs=60", epochs=(10, 20, 30, 40, 50, 60)),
]


@contextmanager
def saving(folder: Path, epochs: Sequence[int]) -> Iterator[None]:
    """Save the encoder in training after these epochs."""
    from mimref.encoders.checkpoints import save_encoder
    from mimref.features.header import data_record
    from mimref.pretraining.run import Pretraining
    from mimref.refinement.stages import EncoderStage

    def wrapped(end_epoch: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
        def save(stage: Any, epoch: int) -> None:
            end_epoch(stage, epoch)
            if epoch in epochs:
                refining = isinstance(stage, EncoderStage)
                encoder = stage.result if refining else stage.model.encoder
                transform = stage.plan.transform if refining else stage.transform
                header = {"source": "mae", "data": data_record(stage.run.config.data), "transform": transform.to_dict()}
                save_encoder(folder / f"epoch-{epoch:03d}.safetensors", encoder, header)

        return save

    folder.mkdir(parents=True, exist_ok=True)
    with (
        patch.object(Pretraining, "end_epoch", wrapped(Pretraining.end_epoch)),
        patch.object(EncoderStage, "end_epoch", wrapped(EncoderStage.end_epoch)),
    ):
        yield


def train(root: Path, only: Sequence[str]) -> None:
    """Train the families that are not there."""
    from mimref.cli import run

    for family in FAMILIES:
        out = root / family.name
        if (only and family.name not in only) or (out / "results.json").is_file():
            continue
        print(f"--- {family.name}", flush=True)
        args = [part.replace("{root}", str(root.resolve())) for part in family.args]
        with saving(out / "snapshots", family.epochs):
            code = run([*args, "--out", str(out), "--device", "cpu", "--force"])
        if code:
            print(f"{family.name} ends with {code}", flush=True)


if __name__ == "__main__":
    train(Path(sys.argv[2]), sys.argv[3:])
