"""Averages of a base and a refined encoder's weights, which trade off their strengths (the idea of WiSE-FT)."""

import time
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import torch

from mimref.config.base import CommandConfig
from mimref.encoders.checkpoints import Checkpoint, encoder_from, read_checkpoint, save_encoder
from mimref.encoders.vit import Encoder
from mimref.errors import CheckpointError
from mimref.evaluation.config import InterpolateConfig
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.features.config import CacheConfig
from mimref.progress import Listener, Silent
from mimref.results import EvaluationResult, Row, check_folder, write_results


def interpolate(
    config: InterpolateConfig, out: Path, *, force: bool = False, listener: Listener | None = None
) -> EvaluationResult:
    """Write `(1 - alpha) * base + alpha * refined` for every alpha into `out`, as `alpha-0.25.safetensors`.

    With images in `config.data`, the rows are the k-NN accuracy of each, with `alpha`; they are written there as well.
    Raises CheckpointError for encoders of different shapes, OutputError for a folder that holds results.
    """
    started, listener = time.monotonic(), listener or Silent()
    check_folder(out, force)
    base, refined = (
        read_checkpoint(
            name,
            num_heads=config.encoder.num_heads,
            part=config.encoder.part,
            grid=config.encoder.grid,
            interpolation=config.encoder.interpolation,
            progress=listener.progress,
        )
        for name in (config.base, config.refined)
    )
    ends = _plain_encoder(base, listener), _plain_encoder(refined, listener)
    _check_alike(base, refined, *ends)
    rows: list[Row] = []
    bad: list[tuple[str, str]] = []
    for done, alpha in enumerate(config.alpha):
        file = out / f"alpha-{alpha:g}.safetensors"
        origin = {"base": str(base.path), "refined": str(refined.path), "alpha": alpha}
        facts = {key: value for key, value in refined.header.items() if key not in ("architecture", "metrics")}
        save_encoder(file, average(*ends, alpha), {**facts, "interpolated": origin})
        if config.data.spec is not None:
            found = evaluate_knn(_knn_config(config, file), listener=listener)
            bad = found.bad_images  # the same for every average
            # alpha replaces the model's name.
            rows += [{"alpha": alpha, **{key: row[key] for key in row if key != "model"}} for row in found.rows]
        listener.progress("averages", done + 1, len(config.alpha))
    elapsed_s = time.monotonic() - started
    write_results(out, config.command, config.model_dump(mode="json"), elapsed_s, rows, bad_images=bad)
    return EvaluationResult(rows, elapsed_s, bad)


@torch.no_grad()
def average(base: Encoder, refined: Encoder, alpha: float) -> Encoder:
    """An encoder with weights `(1 - alpha) * base + alpha * refined`; 0 and 1 give the two bit for bit."""
    mixed = deepcopy(refined)
    start = base.vit.state_dict()
    for name, tensor in mixed.vit.state_dict().items():
        # torch's lerp is exact at both ends.
        tensor.copy_(torch.lerp(start[name], tensor, alpha))
    return mixed


def _plain_encoder(checkpoint: Checkpoint, listener: Listener) -> Encoder:
    if checkpoint.architecture is None:
        raise CheckpointError(f"{checkpoint.path}: {checkpoint.problem}")
    for notice in checkpoint.notices(checkpoint.architecture):
        listener.note(notice)
    encoder = encoder_from(checkpoint, checkpoint.architecture)
    assert isinstance(encoder, Encoder)
    return encoder


def _check_alike(base: Checkpoint, refined: Checkpoint, base_encoder: Encoder, refined_encoder: Encoder) -> None:
    left, right = base_encoder.architecture, refined_encoder.architecture
    # The name and whether positions are trained do not change the function; other image sizes do not matter here.
    same = replace(left, name=right.name, fixed_positions=right.fixed_positions, interpolation=right.interpolation)
    differing = [field.name for field in fields(right) if getattr(same, field.name) != getattr(right, field.name)]
    if differing:
        values = ", ".join(f"{name} {getattr(left, name)} and {getattr(right, name)}" for name in differing)
        raise CheckpointError(f"{base.path} and {refined.path} are encoders of different kinds: {values}")


def _knn_config(config: InterpolateConfig, file: Path) -> KnnConfig:
    common = {name: getattr(config, name) for name in CommandConfig.model_fields}
    # Nobody needs the features of an average again.
    return KnnConfig(**common, checkpoint=str(file), cache=CacheConfig(folder="off"))
