"""`mimref probe`: from a config to rows."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mimref.data.decode import skipped_line
from mimref.devices import resolve_device
from mimref.distributed.group import end_group, own_rank
from mimref.encoders.vit import Architecture
from mimref.errors import Checks, ConfigError
from mimref.evaluation.metrics import check_labels, number_classes, unseen_marked
from mimref.evaluation.probe.attentive import TokenShape
from mimref.evaluation.probe.augmented import probe_inputs
from mimref.evaluation.probe.cached import probe_matrices
from mimref.evaluation.probe.config import ProbeConfig, ProbeTrainingConfig
from mimref.evaluation.probe.grid import ProbeInput, check_held_out
from mimref.evaluation.probe.streamed import EncodedImages, Examined, probe_encoded
from mimref.evaluation.probe.tokens import TokenInputs, cached_splits, token_inputs
from mimref.features.config import EncoderPassConfig
from mimref.features.encode import Column
from mimref.features.inputs import EncoderInputs, Inputs
from mimref.features.opening import open_inputs
from mimref.progress import Listener, Silent
from mimref.results import EvaluationResult, Row, named


def evaluate_probe(
    config: ProbeConfig,
    *,
    state: Path | None = None,
    fresh: bool = False,
    listener: Listener | None = None,
    checks: Checks | None = None,
) -> EvaluationResult:
    """Train linear (Appendix C.3, DINOv2's protocol) or attentive probes, on augmented images or cached features.

    state: file from which an interrupted probe resumes; fresh: start over instead. Rows are those of `probe_cached`,
    with `model`.
    Raises UserError subclasses as `evaluate_knn` does.
    """
    started, listener, checks = time.monotonic(), listener or Silent(), checks or Checks()
    attentive = config.probe.kind == "attentive"
    if config.features is not None and attentive:
        wrong = "--features holds pooled features; probe.kind 'attentive' needs patch tokens: name an encoder"
        checks.add("features", ConfigError(wrong))
    elif config.features is not None and not config.cached:
        checks.add("features", ConfigError("--features holds no images to augment; add --cached"))
    opened = open_inputs(config, listener, checks)
    tokens = _tokens(opened.inputs, config, checks) if attentive else None
    train_y, names = check_labels(opened, checks), opened.class_names("train")
    if config.probe.select == "val-split" and train_y is not None:
        checks.run("probe.select", lambda: check_held_out(*number_classes(train_y, "train", names), names))
    inputs = opened.checked(checks)
    if fresh and state is not None:
        state.unlink(missing_ok=True)  # another process of this run may have removed it
    if tokens is not None:
        assert isinstance(inputs, EncoderInputs)
        found, bad = _probe_tokens(inputs, tokens, config, listener, state)
    else:
        found, bad = _probe_linear(inputs, config, listener, state)
    if unseen := sorted(set(bad) - set(inputs.bad)):
        listener.warn(skipped_line(unseen))
    left_out = [*dict.fromkeys(inputs.bad), *unseen]
    return EvaluationResult(named(found, inputs.name, {}), time.monotonic() - started, left_out, inputs.data)


def _probe_linear(
    inputs: Inputs, config: ProbeConfig, listener: Listener, state: Path | None
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Return the rows, and the path and reason of every training image left out."""
    groups = input_columns(inputs, config.probe, config.final_norm)
    columns = [column for group in groups.values() for column in group]
    if config.cached:
        inputs.prepare(columns)
        return probe_features(inputs, groups, config.probe, config, listener, state) if end_group() else [], []
    assert isinstance(inputs, EncoderInputs)
    inputs.prepare(columns, ["val"])
    images = EncodedImages(inputs.encoder, groups, inputs.settings)
    train, test = inputs.source("train"), inputs.features("val")
    progress = partial(listener.progress, "linear probes")
    found, bad = probe_encoded(
        images, train, test, config.probe, config.seed, augment=True, state=state, progress=progress
    )
    if own_rank() == 0:
        inputs.tell("train")
    return found, bad


def _tokens(inputs: Inputs | None, config: ProbeConfig, checks: Checks) -> TokenInputs | None:
    if not isinstance(inputs, EncoderInputs):
        return None
    return checks.run("probe.kind", lambda: token_inputs(inputs, config.probe, config.final_norm))


def _probe_tokens(
    inputs: EncoderInputs, tokens: TokenInputs, config: ProbeConfig, listener: Listener, state: Path | None
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Return the rows of attentive probes, and the path and reason of every training image left out."""
    progress = partial(listener.progress, "attentive probes")
    splits = cached_splits(inputs, tokens.numbers, config, listener if own_rank() == 0 else Silent())
    inputs.prepare(tokens.columns, splits)
    if "train" in splits:
        if not end_group():
            return [], []
        return probe_features(inputs, tokens.groups, config.probe, config, listener, state, tokens.shapes), []
    images = EncodedImages(inputs.encoder, tokens.groups, inputs.settings)
    val = inputs.source("val")
    unread = Examined(val, inputs.spec(val) | {"columns": tokens.columns})
    test = inputs.features("val") if "val" in splits else unread
    found, bad = probe_encoded(
        images,
        inputs.source("train"),
        test,
        config.probe,
        config.seed,
        augment=not config.cached,
        shapes=tokens.shapes,
        state=state,
        progress=progress,
    )
    if own_rank() == 0:
        inputs.tell("train")
        if "val" not in splits:
            inputs.tell("val")
    return found, bad


def input_columns(
    inputs: Inputs, settings: ProbeTrainingConfig, final_norm: bool = True
) -> dict[ProbeInput, list[Column]]:
    """Return the inputs of the classifiers, each with its columns; see `probe_inputs`.

    Features from files are read as they are. Only plain vision transformers can norm blocks other than the last.
    """
    norm, blocks = settings.norm, settings.blocks
    if isinstance(inputs, EncoderInputs):
        plain = isinstance(inputs.architecture, Architecture)
        return probe_inputs(
            inputs.depth, inputs.has_cls_token, norm=norm, blocks=blocks, final_norm=final_norm, norm_any_block=plain
        )
    groups = probe_inputs(inputs.depth, True, norm=norm, blocks=blocks, final_norm=False)
    return {key: columns for key, columns in groups.items() if key.pool == "cls"}


def probe_features(
    inputs: Inputs,
    groups: dict[ProbeInput, list[Column]],
    settings: ProbeTrainingConfig,
    config: EncoderPassConfig,
    listener: Listener,
    state: Path | None = None,
    shapes: Sequence[TokenShape] = (),
) -> list[Row]:
    """Return the rows of `probe_cached` on prepared columns. config: supplies seed and device."""
    train, test = inputs.features("train"), inputs.features("val")
    assert train.y is not None and test.y is not None  # the inputs were opened with labels required
    return probe_matrices(
        {key: train.matrix(columns) for key, columns in groups.items()},
        train.y,
        {key: test.matrix(columns) for key, columns in groups.items()},
        unseen_marked(train.y, test.y, lacks_classes=test.lacks_classes),
        settings,
        config.seed,
        resolve_device(config.device),
        shapes=shapes,
        state=state,
        progress=partial(listener.progress, f"{settings.kind} probes"),
    )
