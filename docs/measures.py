"""Test how well measures without labels follow k-NN accuracy: train checkpoints, measure them and print a table.

python docs/measures.py train runs/measures      # hours on one core; skips families that have results
python docs/measures.py measure runs/measures    # the table of docs/results.md
"""

import json
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
    """Checkpoints of one training run, which saves its encoder after some epochs."""

    name: str
    args: Sequence[str]
    epochs: Sequence[int]
    """Epochs after which the encoder is saved."""


def digits(name: str, *settings: str, epochs: Sequence[int]) -> Family:
    """Return the family of a refinement of the packaged encoder."""
    sets = [part for setting in settings for part in ("--set", setting)]
    return Family(name, ["refine", "--preset", "quickstart", *UNEVALUATED, *sets], epochs)


# Ten or more times the preset's learning rate, with the heads of the first family: one healthy run, two collapses.
HIGH = ('stage="encoder"', 'heads_from="{root}/digits-refine"')
FAMILIES = [
    digits("digits-refine", epochs=(1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20)),
    digits("digits-lr-x10", *HIGH, "encoder_stage.lr=8e-2", epochs=(20,)),
    digits("digits-lr-x40", *HIGH, "encoder_stage.epochs=4", "encoder_stage.lr=3e-1", epochs=(4,)),
    digits("digits-lr-x400", *HIGH, "encoder_stage.epochs=4", "encoder_stage.lr=3e0", epochs=(4,)),
    Family(
        "digits-pretrain",
        ["pretrain", "--preset", "quickstart", *QUIET, "--set", "mae.epochs=300"],
        (1, 2, 4, 8, 12, 16, 25, 37, 50, 75, 100, 125, 150, 175, 200, 225, 250, 275, 300),
    ),
    Family(
        "fashion-pretrain",
        ["pretrain", "--preset", "fashion_mnist", *FASHION, *QUIET, "--set", "mae.epochs=40"],
        (1, 2, 3, 5, 7, 10, 20, 40),
    ),
]


# Early checkpoints of pre-training whose blocks are all measured: after a twelfth and about a sixth of the epochs.
EARLY = ("digits-pretrain/snapshots/epoch-025.safetensors", "fashion-pretrain/snapshots/epoch-007.safetensors")


@contextmanager
def saving(folder: Path, epochs: Sequence[int]) -> Iterator[None]:
    """Save the encoder being trained after each of these epochs."""
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
    """Train the families that have no results yet."""
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


@dataclass(frozen=True)
class Group:
    """Features to rank, once by every measure and once by k-NN accuracy."""

    name: str
    kind: str
    """Groups of one kind are averaged."""
    members: Sequence[tuple[str, str]]
    """Checkpoint, relative to the root, and block of every member."""


def groups(root: Path) -> list[Group]:
    """Return the groups of the checkpoints that exist."""

    def saved(*names: str) -> list[str]:
        files = [file for name in names for file in sorted((root / name / "snapshots").glob("*.safetensors"))]
        return [file.relative_to(root).as_posix() for file in files]

    found = []
    for data, base in (("digits", "quickstart"), ("fashion", "")):
        whole = [base or saved(f"{data}-pretrain")[-1], *saved(f"{data}-refine")[-1:]]
        early = saved(f"{data}-pretrain")
        others = [family.name for family in FAMILIES if family.name.startswith(data) and "-pretrain" not in family.name]
        for model in dict.fromkeys([*whole, *(file for file in early if file.endswith(EARLY))]):
            members = [(model, str(block)) for block in range(1, 9)]
            found.append(Group(f"blocks of {model}", "blocks", members))
        last = {
            "pre-training": early,
            "refinement": [whole[0], *saved(f"{data}-refine")],
            "settings": [whole[0], *(name for other in others for name in saved(other)[-1:])],
        }
        found += [Group(f"{data} {kind}", kind, [(name, "8") for name in names]) for kind, names in last.items()]
    return [group for group in found if len(group.members) > 2]


def score(root: Path, model: str, blocks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return every measure and the k-NN accuracy on the validation images, for some blocks of a checkpoint."""
    from mimref.config.load import load_config
    from mimref.evaluation.assess.config import AssessConfig
    from mimref.evaluation.assess.protocol import assess
    from mimref.evaluation.knn.config import KnnConfig
    from mimref.evaluation.knn.protocol import evaluate_knn
    from mimref.refinement.config import RefineConfig

    digital = model.startswith(("digits", "quickstart"))
    preset = load_config(RefineConfig, "quickstart" if digital else "fashion_mnist")
    checkpoint = model if model == "quickstart" else str(root / model)
    common: dict[str, Any] = {"blocks": ",".join(blocks), "device": "cpu", "data": preset.data}
    if not digital:
        common["data"] = preset.data.model_copy(update={"train_limit": 4000})
    rows = evaluate_knn(KnnConfig(checkpoint=checkpoint, **common)).rows
    rows += assess(AssessConfig(checkpoints=[checkpoint], views=preset.views, **common)).rows
    found: dict[str, dict[str, float]] = {block: {} for block in blocks}
    for row in rows:
        found[str(row["blocks"])][str(row["metric"])] = float(row["value"])
    return found


def measure(root: Path) -> None:
    """Measure what `scores.json` lacks, and print the table."""
    import numpy as np
    from scipy.stats import spearmanr

    from mimref.evaluation.assess.measures import MEASURES, goodness
    from mimref.evaluation.assess.verdicts import NAMES

    file = root / "scores.json"
    scores: dict[str, dict[str, dict[str, float]]] = json.loads(file.read_text()) if file.is_file() else {}
    every = groups(root)
    for group in every:
        for model in dict.fromkeys(name for name, _ in group.members):
            blocks = [block for name, block in group.members if name == model]
            if missing := [block for block in blocks if block not in scores.get(model, {})]:
                scores.setdefault(model, {}).update(score(root, model, missing))
                file.write_text(json.dumps(scores, indent=1))
    lines: dict[str, list[list[float]]] = {}
    for group in every:
        values = [scores[model][block] for model, block in group.members]
        accuracy = [value["knn_top1"] for value in values]
        good = {name: [goodness(name, value[name]) for value in values] for name in MEASURES}
        found = [float(np.nan_to_num(spearmanr(good[name], accuracy).statistic)) for name in MEASURES]
        lines.setdefault(group.kind, []).append(found)
        best = [accuracy[int(np.argmax(good[name]))] - max(accuracy) for name in MEASURES]
        spread = f"k-NN {min(accuracy):.1f} to {max(accuracy):.1f}"
        print(
            f"{group.name} ({len(values)}; {spread})", [round(each, 2) for each in found], [round(b, 1) for b in best]
        )
    kinds = list(lines)
    counts = [sum(len(group.members) for group in every if group.kind == kind) for kind in kinds]
    print("\n| measure |", " | ".join(f"{kind} ({n})" for kind, n in zip(kinds, counts, strict=True)), "| all |")
    print("|---|" + "---|" * (len(kinds) + 1))
    means = np.array([np.mean(lines[kind], axis=0) for kind in kinds])
    for number in np.argsort(-means.mean(axis=0)):
        cells = [*means[:, number], means[:, number].mean()]
        print(f"| {NAMES[MEASURES[number]]} |", " | ".join(f"{cell:.2f}" for cell in cells), "|")


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), sys.argv[3:])
    else:
        measure(Path(sys.argv[2]))
