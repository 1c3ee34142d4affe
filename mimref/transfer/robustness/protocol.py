"""`mimref robustness`: accuracy of a fine-tuned encoder on clean, shifted and corrupted images."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch

from mimref.config.base import DataConfig
from mimref.data.decode import first_bad
from mimref.devices import resolve_device, resolve_precision
from mimref.distributed.group import own_rank
from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.classifier import Classifier, read_classifier
from mimref.errors import Checks, ConfigError, UserError
from mimref.features.encode import PassSettings
from mimref.features.header import eval_transform, resolve_data
from mimref.features.inputs import model_name
from mimref.features.opening import check_device, warn_of_notices
from mimref.progress import Listener, Silent
from mimref.results import EvaluationResult, Row, named
from mimref.transfer.finetune.classify import Scores, accuracy
from mimref.transfer.robustness.config import RobustnessConfig
from mimref.transfer.robustness.corruptions import (
    SMALLEST_SIDE,
    CorruptedSource,
    corrupt,
    corruption_names,
    corruption_package,
)
from mimref.transfer.robustness.scores import score_rows
from mimref.transfer.robustness.sets import LabelledSet, Place, corrupted_places, open_labelled, open_sets


def evaluate_robustness(
    config: RobustnessConfig, *, listener: Listener | None = None, checks: Checks | None = None
) -> EvaluationResult:
    """Evaluate a classifier on the test sets in the settings, with one pass of its encoder over each set.

    Returns the rows of `score_rows`, with `model`. In a process group the ranks share the images. Raises UserError
    subclasses for a file without a classifier, images that cannot be opened and classes that the classifier does not
    have, one error for all mistakes. checks: mistakes found before.
    """
    started, listener, checks = time.monotonic(), listener or Silent(), checks or Checks()
    check_device(config, checks)
    read = partial(read_checkpoint, config.checkpoint, progress=listener.progress)
    checkpoint, found = checks.run("checkpoint", read), None
    if checkpoint is not None:
        found = checks.run("checkpoint", partial(read_classifier, checkpoint, config.resolution))
    header = checkpoint.header if checkpoint is not None else {}
    telling = listener if own_rank() == 0 else Silent()
    clean, data = _open_clean(config, header, found, telling, checks)
    sets = _open_others(config, header, found, telling, checks)
    if found is not None and config.corrupt is not None:
        checks.run("corrupt", partial(_check_corruption, found[0]))
        if data is not None and data.channels is not None:
            wrong = f"corruptions need 8-bit colour, but data.channels is {data.channels}; omit --corrupt"
            checks.add("corrupt", ConfigError(wrong))
    classifier, _ = checks.finished(found)
    device = resolve_device(config.device)
    settings = PassSettings(
        eval_transform(classifier.encoder.architecture, config.data, header, resolution=config.resolution),
        device,
        resolve_precision(config.precision, device),
        workers=config.workers,
        max_bad=config.data.max_bad,
    )
    for each in (*clean, *sets):
        warn_of_notices({"val": each.source}, listener)
    scored = _classify(classifier.to(device), [*clean, *sets, *_corrupted(config, clean, settings)], settings, listener)
    rows = named(score_rows([(each.where, scores) for each, scores in scored]), model_name(config.checkpoint), {})
    bad = sorted({pair for _, scores in scored for pair in scores.bad})
    lines: dict[object, list[str]] = {}
    for each in (*clean, *sets):
        # The folders of ImageNet-C hold the same images.
        name = each.where["set"]
        lines[name] = lines.get(name) or each.source.peculiarities(f"images of {name}")
    for line in chain(*lines.values()):
        telling.warn(line)
    if bad:
        telling.warn(f"{len(bad)} unreadable images are not counted: {first_bad(bad)}")
    return EvaluationResult(rows, time.monotonic() - started, bad, data)


def _check_corruption(classifier: Classifier) -> None:
    side = classifier.encoder.architecture.image_size
    if side < SMALLEST_SIDE:
        raise ConfigError(
            f"--corrupt needs images of at least {SMALLEST_SIDE} pixels per side, but the classifier's have {side}; "
            f"fine-tune with --resolution {SMALLEST_SIDE}"
        )
    corruption_package()


def _open_clean(
    config: RobustnessConfig,
    header: Mapping[str, Any],
    found: tuple[Classifier, list[str]] | None,
    listener: Listener,
    checks: Checks,
) -> tuple[list[LabelledSet], DataConfig | None]:
    """Open the clean images; none if only the header names them, they cannot be opened and nothing needs them."""
    optional = config.data.spec is None and config.corrupt is None
    if found is None and config.data.spec is None:
        return [], None  # only the missing header could name them
    try:
        data = resolve_data(config.data, header)
        assert data.spec is not None
        place = Place("data.spec", "--data", data.spec, {"metric": "clean_top1", "set": data.spec})
        return [open_labelled(place, data, found[1] if found else None, listener)], data
    except UserError as error:
        if optional:
            listener.warn(f"no clean accuracy: {error}")
        else:
            checks.add("data.spec", error)
        return [], None


def _open_others(
    config: RobustnessConfig,
    header: Mapping[str, Any],
    found: tuple[Classifier, list[str]] | None,
    listener: Listener,
    checks: Checks,
) -> list[LabelledSet]:
    """Open the shifted and corrupted sets in the settings."""
    places: list[Place] = []
    if (root := config.imagenet_c) is not None:
        places += checks.run("imagenet_c", lambda: corrupted_places(root, listener)) or []
    folders = {"imagenet-a": config.imagenet_a, "imagenet-r": config.imagenet_r, "imagenet-sketch": config.sketch}
    for name, folder in folders.items():
        if folder is not None:
            setting = "sketch" if name == "imagenet-sketch" else name.replace("-", "_")
            where: Row = {"metric": "robust_top1", "set": name}
            places.append(Place(setting, f"--{setting.replace('_', '-')}", folder, where, subset=setting != "sketch"))
    for spec in config.shifted:
        places.append(Place("shifted", "--shifted", spec, {"metric": "robust_top1", "set": spec}, subset=config.subset))
    asked = config.imagenet_c is not None or config.corrupt is not None or "corrupt" in checks.unusable
    if not places and not asked:
        what = "--imagenet-c, --imagenet-a, --imagenet-r, --sketch, --shifted or --corrupt"
        checks.add("imagenet_c", ConfigError(f"no test set: pass one or more of {what}"))
    # All sets share the user's settings for reading images; the header knows only where its own images are.
    own = config.data.model_copy(update={"spec": "."})
    reading = checks.run("data.spec", partial(resolve_data, own, header))
    return open_sets(places, reading or own, found[1] if found else None, listener, checks)


def _corrupted(config: RobustnessConfig, clean: Sequence[LabelledSet], settings: PassSettings) -> list[LabelledSet]:
    """Return the clean images with every corruption and severity in the settings."""
    if config.corrupt is None:
        return []
    names, size = corruption_names(config.corrupt), settings.transform.image_size
    if "glass_blur" in names:
        # Glass blur is compiled at first use: compile it once here, not in every loader process.
        corrupt(torch.zeros(3, size, size, dtype=torch.uint8), "glass_blur", 1, 0)
    return [
        LabelledSet(
            {
                **each.where,
                "metric": "robust_top1",
                "set": f"{each.where['set']}, corrupted",
                "corruption": name,
                "severity": level,
            },
            CorruptedSource(each.source, settings.transform, name, level, config.seed),
            each.labels,
        )
        for each in clean
        for name in names
        for level in sorted(set(config.severities))
    ]


def _classify(
    classifier: Classifier, sets: Sequence[LabelledSet], settings: PassSettings, listener: Listener
) -> list[tuple[LabelledSet, Scores]]:
    scored: list[tuple[LabelledSet, Scores]] = []
    before, total = 0, sum(len(each.source) for each in sets)
    # Corrupted images are already cropped.
    uncut = replace(settings, transform=replace(settings.transform, crop_fraction=1.0))

    def report(done: int, _: int) -> None:
        listener.progress("images", before + done, total)

    for each in sets:
        own = uncut if isinstance(each.source, CorruptedSource) else settings
        scored.append((each, accuracy(classifier, each.source, each.labels, own, report, each.among)))
        before += len(each.source)
    return scored
