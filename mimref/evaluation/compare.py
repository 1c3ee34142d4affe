"""Several encoders measured by the same protocols: `mimref compare`, and the before/after table of `mimref refine`."""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from mimref.config.base import DataConfig
from mimref.config.run import RunConfig
from mimref.data.open import open_source
from mimref.data.sources import ImageSource
from mimref.distributed.group import end_group
from mimref.encoders.backbones import TokenEncoder
from mimref.errors import Checks, ConfigError, DataError
from mimref.evaluation.cluster.classes import check_clusters
from mimref.evaluation.cluster.kmeans import BestRun
from mimref.evaluation.cluster.protocol import check_metrics, cluster_and_best
from mimref.evaluation.config import CompareConfig
from mimref.evaluation.exhibits.collect import Exhibition, IllustratedResult, Voting
from mimref.evaluation.knn.protocol import check_neighbours, knn
from mimref.evaluation.lowshot.protocol import check_shots, default_splits, load_solver, lowshot
from mimref.evaluation.metrics import (
    check_labels,
    labelled,
    labelled_pair,
    number_classes,
    number_labels,
    unseen_marked,
)
from mimref.evaluation.probe.grid import check_held_out
from mimref.evaluation.probe.protocol import input_columns, probe_features
from mimref.features.encode import PIXELS, Column, Features, PassSettings, extract, raw_pixels
from mimref.features.inputs import EncoderInputs
from mimref.features.matrix import Labels
from mimref.features.opening import Opened, open_encoders
from mimref.progress import LabelledProgress, Listener, Silent
from mimref.results import Row, main_rows, named


def measure(
    protocol: str,
    model: str,
    pair: tuple[Features, Features],
    columns: list[Column],
    config: CompareConfig,
    progress: LabelledProgress,
) -> tuple[list[Row], BestRun | None]:
    """Return one protocol's rows (`knn`, `lowshot` or `cluster`) for one model's training and validation features.

    For `cluster`, also return the best run.
    """
    if protocol == "cluster":
        report = partial(progress, f"k-means of {model}")
        test = labelled(pair[1], columns)
        return cluster_and_best(*test, metrics=config.metrics, runs=config.runs, seed=config.seed, progress=report)
    images = labelled_pair(*pair, columns)
    if protocol == "knn":
        report = partial(progress, f"nearest neighbours of {model}")
        return knn(*images, k=[config.k], tau=[config.tau], device=config.device, progress=report), None
    report = partial(progress, f"low-shot of {model}")
    splits = config.splits or default_splits(len(pair[0]))
    return lowshot(*images, shots=config.shots, splits=splits, seed=config.seed, progress=report), None


def exhibit(
    exhibition: Exhibition,
    model: str,
    pair: tuple[Features, Features],
    columns: list[Column],
    config: CompareConfig,
    best: BestRun | None,
) -> None:
    """Add a model to an exhibition, with the same votes as in its table and the best of the same k-means runs."""
    voting = Voting(*labelled(pair[0], columns), config.k, config.tau)
    exhibition.add(model, pair[1], columns, voting=voting, best=best)


# --- mimref compare


def compare_encoders(
    config: CompareConfig, *, exhibits: bool = False, listener: Listener | None = None, checks: Checks | None = None
) -> IllustratedResult:
    """Return rows of every protocol for the base, then the other encoders; one encoder pass per split and encoder.

    All encoders are measured on the same draws, runs and images: those of `config.data`, else those of the first header
    that records some. exhibits: also collect the images that a report shows.
    Raises UserError subclasses, before any encoder runs, for checkpoints or images that do not fit.
    """
    started, listener, checks = time.monotonic(), listener or Silent(), checks or Checks()
    found_inputs = open_encoders(config, [config.base, *config.refined], listener, checks, "base")
    _check(config, found_inputs[0], checks)
    opened = [inputs for each in found_inputs if isinstance(inputs := each.inputs, EncoderInputs)]
    config = config.model_copy(update={"data": opened[0].data})
    last = [inputs.columns([inputs.depth]) for inputs in opened]
    for inputs, columns in zip(opened, last, strict=True):
        of_probe = input_columns(inputs, config.probe).values() if "probe" in config.protocols else ()
        inputs.prepare([*columns, *(column for group in of_probe for column in group)])
    rows: list[Row] = []
    exhibition = Exhibition(opened[0].source("val"), opened[0].settings, config.seed, listener)
    for inputs, columns in zip(opened, last, strict=True) if end_group() else ():
        best = None
        for protocol in config.protocols:
            if protocol == "probe":
                found = probe_features(inputs, input_columns(inputs, config.probe), config.probe, config, listener)
                rows += named(found, inputs.name, {})
            else:
                pair = inputs.features("train"), inputs.features("val")
                found, run = measure(protocol, inputs.name, pair, columns, config, listener.progress)
                rows += named(found, inputs.name, {"blocks": "last", "pool": inputs.pool})
                best = run if protocol == "cluster" else best
        if exhibits:
            pair = inputs.features("train"), inputs.features("val")
            exhibit(exhibition, inputs.name, pair, columns, config, best)
    bad = [pair for inputs in opened for pair in inputs.bad]
    bad = list(dict.fromkeys(bad))  # the images are the same for all encoders
    return IllustratedResult(rows, time.monotonic() - started, bad, config.data, exhibition.made())


def _check(config: CompareConfig, opened: Opened, checks: Checks) -> None:
    """Fail early; the images are the same for all encoders."""
    if "cluster" in config.protocols:
        checks.run("metrics", lambda: check_metrics(config.metrics))
    if "lowshot" in config.protocols:
        checks.run("protocols", load_solver)
    if (train_y := check_labels(opened, checks)) is not None:
        if "knn" in config.protocols:
            checks.run("k", lambda: check_neighbours(config.k, train_y))
        if "lowshot" in config.protocols:
            checks.run("shots", lambda: check_shots(config.shots, train_y, opened.class_names("train")))
        if "probe" in config.protocols and config.probe.select == "val-split":
            names = opened.class_names("train")
            checks.run("probe.select", lambda: check_held_out(*number_classes(train_y, "train", names), names))
    if "cluster" in config.protocols and (test_y := opened.labels("val")) is not None:
        checks.run("protocols", lambda: _check_clusters(test_y, opened.class_names("val")))
    checks.finish()


def _check_clusters(y: Labels, names: Sequence[str] | None) -> None:
    check_clusters(len(number_classes(y, "val", names)[0]), len(y), given=False)


# --- the before/after table of mimref refine

_PROTOCOLS = {"knn": "k-NN", "lowshot": "low-shot accuracy", "cluster": "k-means"}


def labelled_splits(
    data: DataConfig, train: ImageSource | None = None, test: ImageSource | None = None
) -> tuple[ImageSource, ImageSource]:
    """Return the training and validation images with labels. train, test: sources that are already open.

    Raises DataError when the images have no labels or no validation split, or when classes are missing.
    """
    if train is None or train.labels is None:
        train = open_source(data, "train", need_labels=True)
    if test is None or test.labels is None:
        test = open_source(data, "val", need_labels=True)
    assert train.labels is not None and test.labels is not None
    test_y = unseen_marked(train.labels, test.labels, lacks_classes=test.lacks_classes)
    number_labels(train.labels, test_y, train.class_names)
    return train, test


def lost_accuracy(rows: Sequence[Row], images: int) -> str | None:
    """Return a warning if k-NN accuracy fell by more than chance explains for this number of test images, else None.

    Chance explains a fall of up to twice the standard error of the base's accuracy. None with fewer than 20 images.
    """
    found = {row["model"]: float(row["value"]) for row in rows if row.get("metric") == "knn_top1"}
    if not {"base", "refined"} <= found.keys() or images < 20:
        return None
    base, refined = found["base"], found["refined"]
    share = (base / 100 * images + 1) / (images + 2)  # Laplace's rule: with an error of 0, one image triggers a warning
    if base - refined <= 200 * (share * (1 - share) / images) ** 0.5:
        return None
    return (
        f"k-NN fell from {base:.1f} to {refined:.1f}, more than chance explains for {images:,} validation images: "
        "refinement aligns the views and nearest neighbours of an image, which does not separate these classes. Try "
        "views.color=false and larger crops (views.local_scale), or keep the base"
    )


def before_after(
    config: RunConfig,
    images: tuple[ImageSource, ImageSource],
    encoders: Iterable[tuple[str, TokenEncoder]],
    settings: PassSettings,
    progress: LabelledProgress,
    *,
    protocols: Sequence[str] = ("knn", "lowshot", "cluster"),
    exhibition: Exhibition | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Run k-NN, low-shot and clustering on raw pixels and on each encoder's last block (raw output, CLS token).

    images: from `labelled_splits`. encoders: with their names in the results; a generator may build them one at a time.
    note: receives one line for each protocol that is left out because the images do not allow it. exhibition: collects
    the encoders' images. Returns the rows, and the path and reason of every image left out, once per model.
    """
    evaluate = config.evaluate
    compare = CompareConfig(
        base="base",
        refined=["refined"],
        seed=config.seed,
        device=config.device,
        tau=evaluate.knn_tau,
        shots=[evaluate.shots],
        splits=evaluate.splits,
        runs=evaluate.cluster_runs,
    )
    rows: list[Row] = []
    bad: list[tuple[str, str]] = []
    possible = list(protocols)

    def add(model: str, pair: list[Features], column: Column, where: Row) -> None:
        """Measure a model by every protocol that is still possible. where: settings that its rows record."""
        train, test = pair
        fitting = compare.model_copy(update={"k": min(evaluate.knn_k, len(train))})
        best = None
        for protocol in list(possible):
            try:
                found, run = measure(protocol, model, (train, test), [column], fitting, progress)
            except (ConfigError, DataError) as error:
                # The other models would fail as well: they share images and settings.
                possible.remove(protocol)
                if note is not None:
                    note(f"no {_PROTOCOLS[protocol]} in the before/after table: {error}")
                continue
            rows.extend({"model": model, **row, **where} for row in main_rows(found))
            best = run if protocol == "cluster" else best
        if exhibition is not None and column != PIXELS:
            exhibit(exhibition, model, (train, test), [column], fitting, best)
        bad.extend(train.bad + test.bad)

    add("raw pixels", [raw_pixels(source, settings) for source in images], PIXELS, {})
    for name, encoder in encoders:
        last = Column(encoder.depth, "cls" if encoder.has_cls_token else "mean")
        report = partial(progress, f"features of {name}")
        pair = [extract(encoder, source, settings, [last], progress=report) for source in images]
        add(name, pair, last, {"blocks": "last", "pool": last.pool})
    return rows, bad
