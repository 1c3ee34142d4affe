"""`mimref probe`: from a config to rows."""

import time
from functools import partial
from pathlib import Path

from mimref.data.decode import BadImages
from mimref.data.loader import loader_workers
from mimref.distributed.group import end_group
from mimref.errors import ConfigError
from mimref.evaluation.probe.augmented import probe_augmented, probe_inputs
from mimref.evaluation.probe.config import ProbeConfig
from mimref.evaluation.probe.grid import ProbeInput, default_batch, probe_cached
from mimref.evaluation.run import EvaluationResult, check_labels, labels_of, named, open_inputs
from mimref.features.encode import Column
from mimref.features.files import FeatureFiles
from mimref.features.inputs import EncoderInputs, Inputs
from mimref.progress import Listener, Progress, Silent
from mimref.results import Row


def evaluate_probe(
    config: ProbeConfig, *, state: Path | None = None, inputs: Inputs | None = None, listener: Listener | None = None
) -> EvaluationResult:
    """Linear probe (Appendix C.3) by DINOv2's protocol, on augmented images or on cached features.

    state: file that an interrupted probe is continued from. Rows as `probe_cached` makes them, with `model`.
    Raises UserError subclasses as `evaluate_knn` does.
    """
    started, listener = time.monotonic(), listener or Silent()
    inputs = inputs or open_inputs(config, listener)
    if not isinstance(inputs, EncoderInputs) and not config.cached:
        raise ConfigError("--features holds no images to augment; add --cached")
    check_labels(inputs)
    has_cls = not isinstance(inputs, EncoderInputs) or inputs.has_cls_token
    wanted = probe_inputs(inputs.depth, has_cls, final_norm=config.final_norm)
    if isinstance(inputs, FeatureFiles):
        wanted = {key: columns for key, columns in wanted.items() if key.pool == "cls"}
    columns = list(dict.fromkeys(column for group in wanted.values() for column in group))
    inputs.prepare(columns, ("train", "val") if config.cached else ("val",))
    progress = partial(listener.progress, "linear probes")
    bad = BadImages(config.data.max_bad)
    if isinstance(inputs, EncoderInputs) and not config.cached:
        found = _probe_augmented(config, inputs, wanted, bad, state, progress)
    else:
        found = _probe_cached(config, inputs, wanted, state, progress) if end_group() else []
    left_out = list(dict.fromkeys([*inputs.bad, *bad.items]))
    return EvaluationResult(named(found, inputs, {}), time.monotonic() - started, left_out, inputs.data)


def _probe_cached(
    config: ProbeConfig,
    inputs: Inputs,
    wanted: dict[ProbeInput, list[Column]],
    state: Path | None,
    progress: Progress,
) -> list[Row]:
    train_y, test_y = check_labels(inputs)
    return probe_cached(
        {key: inputs.matrix("train", columns) for key, columns in wanted.items()},
        train_y,
        {key: inputs.matrix("val", columns) for key, columns in wanted.items()},
        test_y,
        lrs=config.probe.lr,
        epochs=config.probe.epochs,
        batch_size=config.probe.batch_size or default_batch(len(train_y)),
        norm=config.probe.norm,
        select=config.probe.select,
        seed=config.seed,
        device=config.device,
        state=state,
        progress=progress,
    )


def _probe_augmented(
    config: ProbeConfig,
    inputs: EncoderInputs,
    wanted: dict[ProbeInput, list[Column]],
    bad: BadImages,
    state: Path | None,
    progress: Progress,
) -> list[Row]:
    train = inputs.source("train")
    return probe_augmented(
        inputs.encoder,
        train,
        {key: inputs.matrix("val", columns) for key, columns in wanted.items()},
        labels_of(inputs, "val"),
        transform=inputs.transform,
        final_norm=config.final_norm,
        lrs=config.probe.lr,
        epochs=config.probe.epochs,
        batch_size=config.probe.batch_size or default_batch(len(train)),
        norm=config.probe.norm,
        select=config.probe.select,
        seed=config.seed,
        device=inputs.device,
        precision=inputs.precision,
        workers=loader_workers(config.workers, train),
        bad=bad,
        state=state,
        progress=progress,
    )
