"""`mimref segment`: evaluates a config and returns rows of results."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mimref.config.base import DataConfig
from mimref.data.decode import first_bad
from mimref.data.masks.check import check_pairs
from mimref.data.masks.mosaics import SIDE
from mimref.data.masks.open import ACCEPTED, MOSAICS, open_pairs
from mimref.data.masks.sources import Pairs
from mimref.data.sample import check_readable
from mimref.data.sources import Split
from mimref.data.transforms import EvalTransform
from mimref.devices import resolve_device, resolve_precision
from mimref.distributed.group import world_size
from mimref.encoders.backbones import BackboneArchitecture
from mimref.encoders.checkpoints import Checkpoint, choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.published import must_download
from mimref.encoders.vit import Architecture, Encoder
from mimref.errors import Checks, ConfigError, DivergenceError
from mimref.evaluation.metrics import name_classes
from mimref.features.encode import PassSettings
from mimref.features.header import eval_transform, resolve_data
from mimref.features.inputs import model_name
from mimref.features.opening import check_device
from mimref.progress import Listener, Silent
from mimref.results import EvaluationResult, Row, named
from mimref.transfer.segment.config import DINOV2_SIZE, SegmentConfig
from mimref.transfer.segment.heads import HeadInput
from mimref.transfer.segment.in_context import Memory
from mimref.transfer.segment.linear import HeadsJob
from mimref.transfer.segment.metrics import Confusion, class_rows, score_rows, scores
from mimref.transfer.segment.tokens import PatchTokens, head_inputs
from mimref.transfer.segment.windows import Found, Sample, Scores, Viewing, evaluate_images


@dataclass(frozen=True)
class SegmentResult(EvaluationResult):
    """Rows of results, and the samples for a figure."""

    samples: list[Sample] = field(default_factory=list)
    """Some test images with the predictions of the best head or block."""
    class_names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Work:
    """Opened and checked inputs of a protocol."""

    config: SegmentConfig
    checkpoint: Checkpoint
    encoder: Encoder
    inputs: list[HeadInput]
    reading: PassSettings
    train: Pairs
    test: Pairs
    listener: Listener

    @property
    def viewing(self) -> Viewing:
        """Settings for testing images."""
        return Viewing(self.config.test, self.config.training.upsampling, self.config.stride)


def evaluate_segment(
    config: SegmentConfig,
    *,
    state: Path | None = None,
    fresh: bool = False,
    listener: Listener | None = None,
    checks: Checks | None = None,
) -> SegmentResult:
    """Score segmentation on frozen patch tokens: `segment_miou`, `segment_micro_iou`, `segment_accuracy`, in percent.

    These are the scores of the best head after the last update, chosen on the test images, as published. Its
    `segment_iou` per `class` and the scores of all heads, numbered by `classifier`, follow. With `config.blocks`, the
    rows are the scores of every block: `block_segment_miou` and so on, with `block`. state: file from which interrupted
    training continues. fresh: start over instead. Raises UserError subclasses for a checkpoint, images, masks or
    settings that do not fit, before the encoder runs, one error for all mistakes.
    """
    started, listener, checks = time.monotonic(), listener or Silent(), checks or Checks()
    work = _open(config, listener, checks)
    if fresh and state is not None:
        state.unlink(missing_ok=True)
    rows, best, samples, bad = _knn(work) if config.protocol == "knn" else _linear(work, state)
    for images, what in ((work.train.images, "training images"), (work.test.images, "validation images")):
        for line in images.peculiarities(what):
            listener.warn(line)
    if bad:
        listener.warn(f"{len(bad)} images cannot be read and are left out: {first_bad(bad)}")
    chosen = [sample._replace(predicted_K=sample.predicted_K[best : best + 1]) for sample in samples]
    name = model_name(config.checkpoint)
    return SegmentResult(
        named(rows, name, {}), time.monotonic() - started, bad, work.config.data, chosen, work.test.class_names
    )


# --- opening


def _open(config: SegmentConfig, listener: Listener, checks: Checks) -> _Work:
    """Open checkpoint and data, and report all mistakes in them together."""
    if world_size() > 1:
        checks.add("device", ConfigError("segment runs in one process; start it without torchrun"))
    check_device(config, checks)
    checkpoint, remote = None, must_download(config.checkpoint)
    if remote:  # published weights name no images
        checks.run("data.spec", lambda: _data(config.data, {}))
    if checks.passed or not remote:
        read = partial(read_checkpoint, config.checkpoint, config.encoder, progress=listener.progress)
        checkpoint = checks.run("checkpoint", read)
    header: Mapping[str, Any] = checkpoint.header if checkpoint else {}
    data = checks.run("data.spec", lambda: _data(config.data, header)) if checkpoint or config.data.spec else None
    pairs = {} if data is None else _open_data(config.model_copy(update={"data": data}), listener, checks)
    architecture = None
    if checkpoint is not None:
        find = partial(choose_architecture, checkpoint, config.arch, config.source, config.resolution)
        architecture = checks.run("resolution" if config.resolution else "arch", find)
    if config.data.channels is not None or (architecture is not None and architecture.channels not in (1, 3)):
        wrong = "segment reads 8-bit colour images; omit data.channels, or use an encoder of such images"
        checks.add("data.channels", ConfigError(wrong))
    inputs = None
    if architecture is not None:
        inputs = checks.run("blocks", lambda: _inputs(config, architecture))
    checks.finish()
    assert data and checkpoint and architecture and inputs and isinstance(architecture, Architecture)
    config = config.model_copy(update={"data": data})
    if config.blocks is None and config.protocol == "paper" and architecture.depth <= 12:
        shown = ", ".join(map(str, inputs[0].blocks))
        listener.note(
            f"{architecture.depth} blocks are too few for the paper's choice; blocks {shown} are read instead"
        )
    reading = _reading(config, architecture, header, mosaics=pairs["train"].are_mosaics)
    size = reading.transform.image_size
    if config.stride is not None and config.stride > size:
        raise ConfigError(
            f"stride {config.stride} leaves gaps between windows of {size} pixels; set stride={size} or less"
        )
    for notice in checkpoint.notices(architecture, [size]):
        listener.note(notice)
    encoder = encoder_from(checkpoint, architecture)
    assert isinstance(encoder, Encoder)
    encoder = encoder.to(reading.device).eval()
    return _Work(config, checkpoint, encoder, inputs, reading, pairs["train"], pairs["val"], listener)


def _data(data: DataConfig, header: Mapping[str, Any]) -> DataConfig:
    """Return the data of the settings, else mosaics of the objects on which the encoder was trained.

    Images are decoded as the header records, unless the settings say otherwise.
    """
    if data.spec is not None:
        return resolve_data(data, header)
    recorded = header.get("data")
    spec = recorded.get("spec") if isinstance(recorded, Mapping) else None
    if spec not in MOSAICS:
        raise ConfigError(f"no images with masks: pass --data ({ACCEPTED})")
    assert isinstance(recorded, Mapping)
    named = data.model_copy(update={"spec": spec, "root": data.root or recorded.get("root")})
    return resolve_data(named, header)


def _open_data(config: SegmentConfig, listener: Listener, checks: Checks) -> dict[Split, Pairs]:
    """Open and check both splits; empty if one cannot be opened."""
    pairs: dict[Split, Pairs] = {}
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        find = partial(open_pairs, config.data, config.masks, config.mosaics, split, listener.progress)
        if (opened := checks.run("data.spec", find)) is None:
            return {}
        pairs[split] = opened
        checks.run("data.spec", partial(check_readable, opened.images, config.data.max_bad))
    for notice in dict.fromkeys(notice for each in pairs.values() for notice in each.notices):
        listener.warn(notice)
    check_pairs(pairs, checks, listener.progress)
    return pairs


def _inputs(config: SegmentConfig, architecture: Architecture | BackboneArchitecture) -> list[HeadInput]:
    if not isinstance(architecture, Architecture):
        raise ConfigError(
            f"segmentation reads patch tokens of a plain vision transformer, which {architecture.name} is not; "
            "choose another encoder"
        )
    return head_inputs(config, architecture.depth, architecture.class_token)


def _reading(
    config: SegmentConfig, architecture: Architecture, header: Mapping[str, Any], *, mosaics: bool
) -> PassSettings:
    """Return the settings for reading images, at the resolution of the config or of the protocol."""
    recorded = eval_transform(architecture, config.data, header)
    own, patch = architecture.image_size, architecture.patch_size
    wanted = SIDE * own if mosaics else DINOV2_SIZE if config.protocol == "dinov2" else own
    size = config.resolution or max(1, round(wanted / patch)) * patch
    device = resolve_device(config.device)
    return PassSettings(
        EvalTransform(size, 1.0, recorded.mean, recorded.std),
        device,
        resolve_precision(config.precision, device),
        config.batch_size,
        config.workers,
        config.data.max_bad,
    )


# --- protocols

_Result = tuple[list[Row], int, list[Sample], list[tuple[str, str]]]
"""Rows, the index of the best prediction in each sample, the samples, and the images left out."""


def _linear(work: _Work, state: Path | None) -> _Result:
    """Train all heads, then test them."""
    config, listener = work.config, work.listener
    tokens = PatchTokens(work.encoder, work.inputs, work.reading, final_norm=config.final_norm)
    job = HeadsJob(config, work.train, tokens, work.reading, state=state)
    architecture = json.dumps(work.encoder.architecture.to_dict(), sort_keys=True)
    job.run(f"{work.checkpoint.fingerprint} {architecture}", partial(listener.progress, job.label))
    finite = job.heads.finite().tolist()
    if not any(finite):
        raise DivergenceError("every head has diverged; lower training.lr or use --precision fp32")
    found = _test(work, job.scores, len(job.heads), "segmentation of validation images")
    # Diverged heads score 0.
    mious = [scores(each)["miou"] if good else 0.0 for each, good in zip(found.confusions, finite, strict=True)]
    best = max(range(len(mious)), key=lambda head: mious[head])
    bad = list(dict.fromkeys([*job.bad.items, *found.bad]))
    more: Row = {"updates": job.total, "batch_size": job.batch, "upsampling": config.training.upsampling}
    settings = [_where(work, each, {"lr": lr, **more}) for each in work.inputs for lr in job.lrs]
    if config.blocks is not None:
        return _block_rows(work, found.confusions, settings), best, found.samples, bad
    chosen: Row = {"select": "test"} if len(settings) > 1 else {}
    rows = _rows(work, found.confusions[best], {**settings[best], **chosen})
    for head, (where, each) in enumerate(zip(settings, found.confusions, strict=True)):
        of_head = score_rows(each, {**where, "classifier": head + 1})
        rows += of_head if finite[head] else [{**row, "value": 0.0} for row in of_head]
    return rows, best, found.samples, bad


def _knn(work: _Work) -> _Result:
    """Search neighbours of the patches of each input in turn."""
    config, all_found, bad = work.config, list[Found](), list[tuple[str, str]]()
    for each in work.inputs:
        about = f" of block {each.blocks[0]}" if config.blocks is not None else ""
        tokens = PatchTokens(work.encoder, [each], work.reading, final_norm=config.final_norm)
        memory = Memory(tokens, work.train, config.knn, work.reading, work.viewing, config.seed)
        memory.fill(partial(work.listener.progress, f"patches of training images{about}"))
        all_found.append(_test(work, memory.scores, 1, f"neighbours of validation patches{about}"))
        bad += [*memory.bad.items, *all_found[-1].bad]
    more: Row = {"k": config.knn.k, "tau": config.knn.tau, "memory": len(memory.x)}
    settings = [_where(work, each, more) for each in work.inputs]
    found = [each.confusions[0] for each in all_found]
    best = max(range(len(found)), key=lambda number: scores(found[number])["miou"])
    samples = all_found[best].samples
    bad = list(dict.fromkeys(bad))
    if config.blocks is not None:
        return _block_rows(work, found, settings), 0, samples, bad
    return _rows(work, found[0], settings[0]), 0, samples, bad


def _test(work: _Work, score: Scores, heads: int, label: str) -> Found:
    progress = partial(work.listener.progress, label)
    return evaluate_images(work.test, score, heads, work.reading, work.viewing, progress)


def _where(work: _Work, read: HeadInput, more: Row) -> Row:
    """Return the settings with which a row was measured."""
    config = work.config
    return {
        "protocol": config.protocol,
        "blocks": ",".join(map(str, read.blocks)),
        "pool": read.pool,
        **more,
        "resolution": work.reading.transform.image_size,
        "test": config.test,
    }


def _rows(work: _Work, found: Confusion, where: Row) -> list[Row]:
    """Return the scores, and the IoU of every class."""
    return score_rows(found, where) + class_rows(found, _class_names(work.test), where)


def _block_rows(work: _Work, found: Sequence[Confusion], settings: Sequence[Row]) -> list[Row]:
    """Return the scores of every block, then the IoU of every class at every block."""
    rows: list[Row] = []
    details: list[Row] = []
    for each, where in zip(found, settings, strict=True):
        where = {"block": int(str(where["blocks"])), **{key: value for key, value in where.items() if key != "blocks"}}
        rows += score_rows(each, where, "block_segment_")
        details += class_rows(each, _class_names(work.test), where)
    return rows + details


def _class_names(pairs: Pairs) -> list[str] | list[int]:
    """Return the classes' names in results."""
    return name_classes(np.arange(pairs.classes), pairs.class_names)
