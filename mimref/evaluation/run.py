"""Evaluations of one checkpoint: find its encoder and its images, extract features once, apply a protocol."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mimref.config import KnnConfig
from mimref.data.loader import loader_workers
from mimref.data.sources import ImageSource, open_source
from mimref.data.transforms import EvalTransform
from mimref.devices import resolve_device, resolve_precision
from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone, find_architecture
from mimref.encoders.checkpoints import Checkpoint, encoder_from, read_checkpoint
from mimref.encoders.vit import PAPER_SIZES, Architecture, Encoder
from mimref.errors import CheckpointError, ConfigError
from mimref.evaluation.knn import knn
from mimref.evaluation.metrics import Row, check_classes, class_indices
from mimref.features.extract import Features, extract
from mimref.features.spec import eval_transform, recorded_data
from mimref.training.runlog import Listener, Silent


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found."""

    rows: list[Row]
    elapsed_s: float


def evaluate_knn(config: KnnConfig, *, listener: Listener | None = None) -> EvaluationResult:
    """k-NN accuracy (Appendix C.4) of the blocks asked for, at every k, from one encoder pass per split.

    Rows as `mimref.evaluation.knn.knn` makes them, with `model`, `blocks` and `pool`. Raises UserError subclasses for a
    checkpoint, images, blocks or numbers of neighbours that do not fit, before the encoder runs.
    """
    started, listener = time.monotonic(), listener or Silent()
    checkpoint = read_checkpoint(config.checkpoint, num_heads=config.encoder.num_heads, progress=listener.progress)
    architecture = _architecture(config, checkpoint)
    for notice in checkpoint.notices(architecture):
        listener.note(notice)
    transform = eval_transform(architecture, config.data, checkpoint.header, resolution=config.resolution)
    data = recorded_data(config.data, checkpoint.header)
    train, test = open_source(data, "train", need_labels=True), open_source(data, "val", need_labels=True)
    _check_images(train, test, config.k)
    encoder = encoder_from(checkpoint, architecture)
    groups = block_groups(config.blocks, encoder.depth)
    if config.pool != "mean" and not encoder.has_cls_token:
        listener.note(f"{architecture.name} has no CLS token; the mean of its patch tokens stands in for it")
    wanted = sorted({block for group in groups.values() for block in group})
    train_features = _features(config, encoder, wanted, train, transform, "training", listener)
    test_features = _features(config, encoder, wanted, test, transform, "validation", listener)
    rows: list[Row] = []
    for done, (name, group) in enumerate(groups.items()):
        columns = [wanted.index(block) for block in group]
        found = knn(
            _side_by_side(train_features, columns),
            _labels(train_features),
            _side_by_side(test_features, columns),
            _labels(test_features),
            k=config.k,
            tau=(config.tau,),
            device=config.device,
        )
        where: Row = {"blocks": name, "pool": config.pool}
        model = model_name(config.checkpoint)
        rows += [{"model": model, "metric": row["metric"], "value": row["value"], **where, **row} for row in found]
        listener.progress("nearest neighbours", done + 1, len(groups))
    return EvaluationResult(rows, time.monotonic() - started)


def block_groups(blocks: str, depth: int) -> dict[str, list[int]]:
    """Which blocks' features are evaluated together: name in the results to block numbers.

    blocks: `last`, `last4` (concatenated), `all` or `1,5,12` (one by one, named by their number).
    Raises ConfigError for anything else, and for blocks outside 1..depth.
    """
    if blocks == "last":
        return {"last": [depth]}
    if blocks == "last4":
        if depth < 4:
            raise ConfigError(f"--blocks last4: the encoder has only {depth} blocks; use --blocks last or all")
        return {"last4": list(range(depth - 3, depth + 1))}
    if blocks == "all":
        return {str(block): [block] for block in range(1, depth + 1)}
    try:
        numbers = [int(part) for part in blocks.split(",")]
    except ValueError:
        raise ConfigError(f"--blocks {blocks!r}: expected last, last4, all or blocks such as 1,5,12") from None
    for number in numbers:
        if not 1 <= number <= depth:
            raise ConfigError(f"--blocks {blocks}: block {number} does not exist; the encoder has blocks 1 to {depth}")
    return {str(number): [number] for number in numbers}


def model_name(checkpoint: str) -> str:
    """How results name a checkpoint: a run folder's or a file's own name, without the folders above."""
    path = Path(checkpoint)
    # `..` and `.` have no name of their own.
    return path.resolve().name if path.is_dir() else path.name


def _architecture(config: KnnConfig, checkpoint: Checkpoint) -> Architecture | BackboneArchitecture:
    """What the file is, or for foreign files the timm model that `--arch` names, at the resolution asked for."""
    recorded = checkpoint.architecture
    if recorded is None and config.arch is None:
        raise CheckpointError(f"{checkpoint.path}: {checkpoint.problem}; pass --arch (and --source)")
    of_timm = config.arch is not None and config.arch not in PAPER_SIZES
    if recorded is None or (checkpoint.recognised and of_timm):
        assert config.arch is not None
        chosen = find_architecture(config.arch, config.source, config.resolution)
    elif config.arch not in (None, recorded.name):
        raise ConfigError(f"--arch {config.arch}: {checkpoint.path} says that it is {recorded.name}; leave --arch out")
    else:
        chosen = recorded
    if isinstance(chosen, Architecture):
        chosen.check_size(config.resolution or chosen.image_size, "--resolution")
    return chosen


def _check_images(train: ImageSource, test: ImageSource, k: list[int]) -> None:
    """Find what `knn` would refuse before the encoder has run over all images."""
    if max(k) > len(train):
        raise ConfigError(f"--k {max(k)} is more than the {len(train)} training images; choose a smaller k")
    assert train.labels is not None and test.labels is not None
    class_indices(check_classes(train.labels, "train"), test.labels, "test")


def _features(
    config: KnnConfig,
    encoder: Encoder | TimmBackbone,
    blocks: list[int],
    source: ImageSource,
    transform: EvalTransform,
    split: str,
    listener: Listener,
) -> Features:
    device = resolve_device(config.device)
    features = extract(
        encoder.to(device),
        source,
        transform,
        blocks=blocks,
        pool=config.pool,
        final_norm=config.final_norm,
        device=device,
        precision=resolve_precision(config.precision, device),
        batch_size=config.batch_size,
        workers=loader_workers(config.workers, source),
        max_bad=config.data.max_bad,
        progress=lambda done, total: listener.progress(f"features of {split} images", done, total),
    )
    if features.bad:
        path, reason = features.bad[0]
        listener.warn(f"{len(features.bad)} {split} images are left out; the first: {path} ({reason})")
    return features


def _side_by_side(features: Features, columns: list[int]) -> NDArray[np.float32]:
    """Features of some blocks concatenated, (N, sum of widths); of a single block without a copy."""
    parts = [features.block(column) for column in columns]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _labels(features: Features) -> NDArray[np.int64]:
    assert features.y is not None
    return features.y
