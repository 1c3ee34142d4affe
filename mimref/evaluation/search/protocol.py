"""`mimref search`: exact search of a data set for the images most similar to given ones."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimref.data.decode import BadImage, decode_file, first_bad, first_of, printable
from mimref.data.index.remote import is_remote
from mimref.data.pixels import USUAL, Decoding
from mimref.data.sources import FileSource, ImageSource, Split
from mimref.distributed.group import end_group
from mimref.errors import Checks, ConfigError, DataError
from mimref.evaluation.exhibits.contents import Thumbnail
from mimref.evaluation.exhibits.thumbnails import MOST_PICTURES, most_per_group, thumbnail
from mimref.evaluation.knn.protocol import find_neighbours
from mimref.evaluation.metrics import check_features, vary
from mimref.evaluation.search.config import SearchConfig
from mimref.features.collection import Collection, chosen_splits
from mimref.features.encode import Column, extract
from mimref.features.inputs import EncoderInputs, Groups, column_groups, prepare_groups
from mimref.features.opening import open_encoder
from mimref.progress import Listener, Silent, optional
from mimref.results import EvaluationResult, Row


@dataclass(frozen=True)
class Query:
    """An image to search for."""

    name: str
    """Name as the user gave it."""
    places: tuple[tuple[Split, int], ...] = ()
    """Its position in every split of the data set that contains it."""


class Found(NamedTuple):
    """A query's picture and those of the nearest images, nearest first."""

    query: Thumbnail
    neighbours: list[Thumbnail]
    similarity: list[float]


@dataclass(frozen=True)
class SearchResult(EvaluationResult):
    """Rows, nearest images first: `model`, `query`, `rank`, `path`, `similarity`, `split` and, with labels, `class`."""

    pictures: list[Found] = field(default_factory=list)
    """If requested: pictures for the first queries, at most `MOST_PICTURES` in all."""


def search(
    config: SearchConfig, *, pictures: bool = False, listener: Listener | None = None, checks: Checks | None = None
) -> SearchResult:
    """Find the k images of a data set whose features have the highest cosine similarity to those of each query.

    Every query is compared with every image. Features are standardised as for `knn`, here by the images searched. A
    query that is itself an image of the data set (the same file or the same name) is not among its own results; copies
    of it are. If there are fewer images than k, all are listed. pictures: also make thumbnails for a gallery.
    In a process group the ranks share the encoder pass, and only rank 0 returns rows. Raises UserError subclasses,
    before the encoder runs, for a checkpoint, images or queries that cannot be used: one error for all mistakes.
    """
    started, listener, checks = time.monotonic(), listener or Silent(), checks or Checks()
    opened = open_encoder(
        config,
        config.checkpoint,
        listener,
        checks,
        need_labels=False,
        splits=chosen_splits(config.split),
        existing=config.split == "all",
    )
    groups = column_groups(config, opened.inputs, checks)
    checks.run("blocks", lambda: _check_group(config.blocks, groups))
    queries = checks.run("queries", lambda: find_queries(config.queries, opened.sources, listener))
    inputs = opened.checked(checks)
    queries = checks.finished(queries)
    assert isinstance(inputs, EncoderInputs)
    ((_, columns),) = groups
    prepare_groups(groups, inputs, list(opened.sources))
    if not end_group():
        return SearchResult([], time.monotonic() - started)
    images = Collection(inputs, list(opened.sources))
    positions = [_positions(query, images) for query in queries]
    nearest, similarity = _nearest(config, images, queries, positions, columns, inputs)
    rows = [
        row
        for number, query in enumerate(queries)
        for row in _rows(inputs.name, query, images, nearest[number], similarity[number])
    ]
    _warn(config, images, positions, columns, listener)
    result = SearchResult(rows, time.monotonic() - started, inputs.bad, inputs.data)
    with optional("no gallery", listener):
        shown = _pictures(images, queries, positions, nearest, similarity, listener) if pictures else []
        result = replace(result, pictures=shown)
    return result


def find_queries(names: Sequence[str], sources: dict[Split, ImageSource], listener: Listener) -> list[Query]:
    """Return each query once. Raises ConfigError for none, DataError for any that is neither a file nor in the data.

    sources: the images searched; empty where they could not be opened.
    """
    if not names:
        raise ConfigError("nothing to search for: pass --query IMAGE..., image files or images of the data by name")
    distinct = list(dict.fromkeys(names))
    twice = [name for name in distinct if names.count(name) > 1]
    if twice:
        listener.warn(f"named more than once, but searched for only once: {first_of(twice)}")
    places: dict[str, list[tuple[Split, int]]] = {name: [] for name in distinct}
    for split, source in sources.items():
        for name, index in zip(distinct, source.find(list(map(os.path.expanduser, distinct))), strict=True):
            if index is not None:
                places[name].append((split, index))
    others = [name for name in distinct if not places[name]]
    bad = [(printable(name), reason) for name in others if (reason := _unusable(name, sources))]
    if bad:
        raise DataError(f"--query {first_bad(bad)}; name image files, or images of the data as results name them")
    return [Query(name, tuple(places[name])) for name in distinct]


def _unusable(name: str, sources: dict[Split, ImageSource]) -> str | None:
    """Return why a query cannot be read; None if it can."""
    path = os.path.expanduser(name)
    if is_remote(name):
        return "on a server; download it first"
    if os.path.isdir(path):
        return "a folder"
    if not os.path.exists(path):
        # If the images could not be opened, one of them may have this name.
        return "neither a file nor one of the images searched" if sources else None
    try:
        decode_file(path, None, _decoding(sources))
    except BadImage as error:
        return error.reason
    return None


def _decoding(sources: dict[Split, ImageSource]) -> Decoding:
    """Return how queries are decoded: like the images searched."""
    return next((source.decoding for source in sources.values()), USUAL)


def _positions(query: Query, images: Collection) -> list[int]:
    """Return the positions of a query among the readable images."""
    found = (images.position(*place) for place in query.places)
    return [position for position in found if position is not None]


def _check_group(blocks: str, groups: Groups) -> None:
    if len(groups) > 1:
        raise ConfigError(f"--blocks {blocks}: a search uses one group of blocks; choose last, last4 or one block")


def _nearest(
    config: SearchConfig,
    images: Collection,
    queries: Sequence[Query],
    positions: Sequence[list[int]],
    columns: Sequence[Column],
    inputs: EncoderInputs,
) -> tuple[list[list[int]], list[list[float]]]:
    """Return positions and similarities of every query's nearest images, nearest first, without the query itself."""
    gallery = images.matrix(columns)
    check_features(gallery, "images")
    x = _query_features(queries, positions, columns, inputs, images)
    check_features(x, "queries")
    found = find_neighbours(
        gallery,
        x,
        k=min(len(images), config.k + max(map(len, positions))),
        standardize=config.standardize,
        device=config.device,
        progress=partial(inputs.listener.progress, "nearest images"),
    )
    nearest, similarity = [], []
    for own, *line in zip(positions, found.train_index.tolist(), found.similarity.tolist(), strict=True):
        pairs = [(at, score) for at, score in zip(*line, strict=True) if at not in own][: config.k]
        nearest.append([at for at, _ in pairs])
        similarity.append([score for _, score in pairs])
    return nearest, similarity


def _query_features(
    queries: Sequence[Query],
    positions: Sequence[list[int]],
    columns: Sequence[Column],
    inputs: EncoderInputs,
    images: Collection,
) -> NDArray[np.float32]:
    """Return query features (Q, D): cached ones for images of the data set, others from an encoder pass."""
    gallery = images.matrix(columns)
    out = np.empty((len(queries), gallery.shape[1]), np.float32)
    known = [number for number, own in enumerate(positions) if own]
    out[known] = gallery[np.array([own[0] for own in positions if own], dtype=np.int64)]
    others = [number for number, own in enumerate(positions) if not own]
    if others:
        files = FileSource("queries", "", [os.path.expanduser(queries[number].name) for number in others], None, None)
        files.decoding = _decoding(inputs.sources)
        # Worker processes pay off from the second batch on.
        workers = inputs.settings.workers if len(files) > inputs.settings.batch_size else 0
        settings = replace(inputs.settings, workers=workers, max_bad=0)
        out[others] = extract(inputs.encoder, files, settings, columns).matrix(columns)[:]
    return out


def _rows(model: str, query: Query, images: Collection, nearest: list[int], similarity: list[float]) -> list[Row]:
    rows: list[Row] = []
    for rank, (position, score) in enumerate(zip(nearest, similarity, strict=True), start=1):
        part, row = images.locate(position)
        found: Row = {"model": model, "query": printable(query.name), "rank": rank}
        found |= {"path": part.path(row), "similarity": score, "split": part.split}
        name = part.class_name(row)
        rows.append(found if name is None else found | {"class": name})
    return rows


def _warn(
    config: SearchConfig,
    images: Collection,
    positions: Sequence[list[int]],
    columns: Sequence[Column],
    listener: Listener,
) -> None:
    others = len(images) - max(map(len, positions))
    if config.k > others:
        listener.warn(f"k {config.k} is more than the {others} images that can be found; all of them are listed")
    if not vary(images.matrix(columns)):
        listener.warn("all images have the same features: their order means nothing; check the encoder")


def _pictures(
    images: Collection,
    queries: Sequence[Query],
    positions: Sequence[list[int]],
    nearest: list[list[int]],
    similarity: list[list[float]],
    listener: Listener,
) -> list[Found]:
    """Return thumbnails of the first queries and of their nearest images, as many as a gallery holds."""
    near = [line[: MOST_PICTURES - 1] for line in nearest]
    shown = most_per_group((len(line) + 1 for line in near), MOST_PICTURES)
    files = FileSource("queries", "", [os.path.expanduser(query.name) for query in queries[:shown]], None, None)
    files.decoding = _decoding({part.split: part.source for part in images.parts})

    def of_image(position: int) -> Thumbnail:
        part, row = images.locate(position)
        return thumbnail(part.source, int(part.features.indices[row]), part.class_name(row))

    found = []
    for number, own in enumerate(positions[:shown]):
        query = of_image(own[0]) if own else thumbnail(files, number, None)
        found.append(Found(query, [of_image(at) for at in near[number]], similarity[number]))
        listener.progress("pictures", number + 1, shown)
    return found
