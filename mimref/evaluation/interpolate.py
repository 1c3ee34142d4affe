"""Averages of a base and a refined encoder's weights, which trade off their strengths (the idea of WiSE-FT)."""

import time
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from mimref.config.base import CommandConfig
from mimref.data.sources import ImageSource, Split
from mimref.encoders.backbones import TimmBackbone, TokenEncoder
from mimref.encoders.checkpoints import Checkpoint, encoder_from, read_checkpoint, save_encoder
from mimref.encoders.published import must_download
from mimref.errors import CheckpointError, Checks
from mimref.evaluation.config import InterpolateConfig
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.evaluation.metrics import check_labels
from mimref.features.config import CacheConfig
from mimref.features.header import resolve_data
from mimref.features.opening import Opened, check_device, open_images, warn_of_notices
from mimref.progress import Listener, Silent
from mimref.results import EvaluationResult, Row, check_folder, write_results


def interpolate(
    config: InterpolateConfig,
    out: Path,
    *,
    force: bool = False,
    listener: Listener | None = None,
    checks: Checks | None = None,
) -> EvaluationResult:
    """Write `(1 - alpha) * base + alpha * refined` for every alpha into `out`, as `alpha-0.25.safetensors`.

    With images in `config.data`, the rows are the k-NN accuracy of each, with `alpha`; they are written there as well.
    Raises CheckpointError for encoders of different shapes, OutputError for a folder that holds results.
    """
    started, listener, checks = time.monotonic(), listener or Silent(), checks or Checks()
    checks.run("out", lambda: check_folder(out, force))
    check_device(config, checks)
    sources: dict[Split, ImageSource] = {}
    has_images, remote = config.data.spec is not None, must_download(config.base) or must_download(config.refined)
    if has_images and remote:
        sources = open_images(config.data, listener.progress, checks)
    ends: list[tuple[Checkpoint, TokenEncoder] | None] = []
    for setting, path in (("base", config.base), ("refined", config.refined)):
        fetch = checks.passed or not must_download(path)
        ends.append(checks.run(setting, partial(_read, path, config, listener)) if fetch else None)
    left, right = ends
    if right is not None and has_images:
        # The header records how images are decoded.
        data = checks.run("refined", partial(resolve_data, config.data, right[0].header)) or config.data
        config = config.model_copy(update={"data": data})
    if has_images and not remote:
        sources = open_images(config.data, listener.progress, checks)
    train_y = check_labels(Opened(None, sources), checks)
    if left is not None and right is not None:
        checks.run("refined", lambda: _check_alike(config, left[1], right[1]))
    (base, base_encoder), (refined, refined_encoder) = checks.finished(left), checks.finished(right)
    warn_of_notices(sources, listener)
    facts = {
        key: value for key, value in refined.header.items() if key not in ("architecture", "classifier", "metrics")
    }
    # Nobody needs the features of an average again.
    common = {name: getattr(config, name) for name in CommandConfig.model_fields} | {"cache": CacheConfig(folder="off")}
    neighbours = [k if train_y is None else min(k, len(train_y)) for k in KnnConfig().k]
    rows: list[Row] = []
    bad: list[tuple[str, str]] = []
    for done, alpha in enumerate(config.alpha, 1):
        file = out / f"alpha-{alpha:g}.safetensors"
        origin = {"base": str(base.path), "refined": str(refined.path), "alpha": alpha}
        save_encoder(file, average(base_encoder, refined_encoder, alpha), {**facts, "interpolated": origin})
        if config.data.spec is not None:
            averaged = KnnConfig(**common, checkpoint=str(file), k=neighbours)
            found = evaluate_knn(averaged, listener=listener, sources=sources)
            bad = found.bad_images  # the same for every average
            # alpha replaces the model's name.
            rows += [{"alpha": alpha, **{key: row[key] for key in row if key != "model"}} for row in found.rows]
        listener.progress("averages", done, len(config.alpha))
    elapsed_s = time.monotonic() - started
    write_results(out, config.command, config.model_dump(mode="json"), elapsed_s, rows, bad_images=bad)
    return EvaluationResult(rows, elapsed_s, bad)


@torch.no_grad()
def average(base: TokenEncoder, refined: TokenEncoder, alpha: float) -> TokenEncoder:
    """An encoder with weights `(1 - alpha) * base + alpha * refined`; 0 and 1 give the two bit for bit."""
    mixed = deepcopy(refined)
    start = base.model.state_dict()
    for name, tensor in mixed.model.state_dict().items():
        # torch's lerp is exact at both ends. Counts of BatchNorm are the refined encoder's.
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(start[name], tensor, alpha))
    return mixed


def _read(path: str, config: InterpolateConfig, listener: Listener) -> tuple[Checkpoint, TokenEncoder]:
    checkpoint = read_checkpoint(path, config.encoder, progress=listener.progress)
    if checkpoint.architecture is None:
        raise CheckpointError(f"{checkpoint.path}: {checkpoint.problem}")
    for notice in checkpoint.notices(checkpoint.architecture):
        listener.note(notice)
    return checkpoint, encoder_from(checkpoint, checkpoint.architecture)


def _check_alike(config: InterpolateConfig, base: TokenEncoder, refined: TokenEncoder) -> None:
    left, right = asdict(base.architecture), asdict(refined.architecture)
    if left.keys() != right.keys() or (isinstance(base, TimmBackbone) and left != right):
        names = f"{base.architecture.name} and {refined.architecture.name}"
        raise CheckpointError(f"{config.base} and {config.refined} are encoders of different kinds: {names}")
    # The name and whether positions are trained do not change the function; other image sizes do not matter here.
    alike = ("name", "fixed_positions", "interpolation", "norm_eps")
    differing = [name for name in right if name not in alike and left[name] != right[name]]
    if differing:
        values = ", ".join(f"{name} {left[name]} and {right[name]}" for name in differing)
        raise CheckpointError(f"{config.base} and {config.refined} are encoders of different kinds: {values}")
