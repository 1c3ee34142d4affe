"""`mimref assess`: measures without labels of encoders and their blocks, and a ranking by one of the measures."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from mimref.data.sources import fixed_subset
from mimref.distributed.group import end_group
from mimref.errors import Checks, DataError
from mimref.evaluation.assess.config import AssessConfig
from mimref.evaluation.assess.measures import crop_measures, view_measures
from mimref.evaluation.assess.neighbours import fitting_k
from mimref.evaluation.assess.verdicts import Assessed, Verdict, verdicts
from mimref.evaluation.assess.views import fitting_views
from mimref.evaluation.metrics import check_features
from mimref.features.encode import Column, block_groups
from mimref.features.inputs import EncoderInputs
from mimref.features.opening import open_encoders
from mimref.progress import Listener, Silent
from mimref.results import EvaluationResult, Row, named

FEWEST_IMAGES = 3
# Measures of neighbours, whose rows record the number of neighbours.
_OF_NEIGHBOURS = ("neighbour_consistency", "hubness", "knn_leave_one_out")


@dataclass(frozen=True)
class AssessResult(EvaluationResult):
    """Rows per encoder and group of blocks, and a verdict on each."""

    verdicts: list[Verdict] = field(default_factory=list)
    """Best first."""


def assess(config: AssessConfig, *, listener: Listener | None = None, checks: Checks | None = None) -> AssessResult:
    """Compute all measures of `MEASURES` for every encoder and group of blocks, and rank these by one measure.

    Rows are named as in `crop_measures` and `view_measures`, with `model`, `blocks`, `pool` and `dimensions`; rows
    `assessed_rank`, 1 for the best, record the measure in `by`. Labels are not needed; if there are some,
    `knn_leave_one_out` is a row as well. In a process group all ranks share the encoder passes, and only rank 0
    measures. checks: mistakes found before. Raises UserError subclasses, before an encoder runs, for checkpoints,
    images or blocks that do not fit: one error for all mistakes.
    """
    started, listener, checks = time.monotonic(), listener or Silent(), checks or Checks()
    opened = open_encoders(
        config, config.checkpoints, listener, checks, "checkpoints", need_labels=False, splits=[config.split]
    )
    encoders = [each.inputs for each in opened if isinstance(each.inputs, EncoderInputs)]
    groups = [checks.run("blocks", partial(block_groups, config.blocks, inputs.depth)) or {} for inputs in encoders]
    if (source := opened[0].sources.get(config.split)) is not None and len(source) < FEWEST_IMAGES:
        wrong = f"--data {source.name}: {len(source)} images; measures compare at least {FEWEST_IMAGES}"
        checks.add("data.spec", DataError(wrong))
    checks.finish()
    shapes = {(*each.architecture.widths, each.architecture.patch_size, each.image_size) for each in encoders}
    if len(shapes) > 1:
        listener.warn("the encoders differ in depth, width, patch size or image size, on which measures depend")
    wanted = [
        {name: inputs.columns(blocks) for name, blocks in group.items()}
        for inputs, group in zip(encoders, groups, strict=True)
    ]
    for inputs, columns in zip(encoders, wanted, strict=True):
        _prepare(config, inputs, [column for group in columns.values() for column in group])
    pools = {inputs.name: inputs.pool for inputs in encoders}
    found: list[Assessed] = []
    rows: list[Row] = []
    total = sum(map(len, wanted))
    for inputs, columns in zip(encoders, wanted, strict=True) if end_group() else ():
        for name, group in columns.items():
            values, width, images = _measure(config, inputs, group, name)
            found.append(Assessed(inputs.name, name, width, values))
            rows += _rows(config, found[-1], inputs.pool, images)
            listener.progress("measures", len(found), total)
    ranked = verdicts(found, config.measure) if found else []
    rows += [
        {"model": each.model, "metric": "assessed_rank", "value": float(each.rank), "blocks": each.blocks,
         "pool": pools[each.model], "by": config.measure}
        for each in ranked
    ]  # fmt: skip
    bad = [pair for inputs in encoders for pair in inputs.bad]
    return AssessResult(rows, time.monotonic() - started, list(dict.fromkeys(bad)), encoders[0].data, ranked)


def _prepare(config: AssessConfig, inputs: EncoderInputs, columns: Sequence[Column]) -> None:
    """Prepare the features of the crops and of both views of the chosen images."""
    source = inputs.source(config.split)
    if len(source) > config.images:
        inputs.sources[config.split] = source = fixed_subset(source, config.images)
    views, notes = fitting_views(config.views, source, inputs.image_size)
    for line in notes:
        inputs.listener.note(line)
    inputs.prepare(columns, [config.split])
    inputs.prepare_views([column._replace(view=view) for view in (0, 1) for column in columns], config.split, views)


def _measure(
    config: AssessConfig, inputs: EncoderInputs, columns: Sequence[Column], blocks: str
) -> tuple[dict[str, float], int, int]:
    """Return the value of every measure, the number of features per image, and the number of images."""
    features, views = inputs.features(config.split), inputs.views
    assert views is not None  # on rank 0, which measures
    x = features.matrix(columns)
    first, second = (views.matrix([column._replace(view=view) for column in columns]) for view in (0, 1))
    for name, matrix in (("crops", x), ("view 0", first), ("view 1", second)):
        check_features(matrix, f"{inputs.name}, blocks {blocks}, {name}")
    if len(x) < FEWEST_IMAGES:
        name = inputs.source(config.split).name
        raise DataError(f"{name}: only {len(x)} images can be read; measures compare at least {FEWEST_IMAGES}")
    values = crop_measures(x, k=config.k, y=features.y, device=config.device)
    return values | view_measures(first, second, k=config.k, device=config.device), x.shape[1], len(x)


def _rows(config: AssessConfig, found: Assessed, pool: str, images: int) -> list[Row]:
    where: Row = {"blocks": found.blocks, "pool": pool, "dimensions": found.width, "images": images}
    k: Row = {"k": fitting_k(config.k, images)}
    rows: list[Row] = [
        {"metric": metric, "value": value, **(k if metric in _OF_NEIGHBOURS else {})}
        for metric, value in found.values.items()
    ]
    return named(rows, found.model, where)
