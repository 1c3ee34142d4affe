"""`mimref extract`: features as a file for other programs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mimref.distributed.group import end_group
from mimref.errors import Checks, ConfigError, OutputError
from mimref.features.collection import Collection, Part, chosen_splits
from mimref.features.config import ExtractConfig
from mimref.features.encode import Column
from mimref.features.inputs import EncoderInputs, column_groups, prepare_groups
from mimref.features.opening import open_encoder
from mimref.files import atomic_folder, atomic_path, atomic_write, check_new_file
from mimref.progress import Listener, Silent

ENDINGS = (".npz", ".parquet", ".lance")
# Numbers per batch of rows written to a table: 16 MB.
BATCH_ELEMENTS = 1 << 22

Vectors = Mapping[str, Sequence[Column]]
"""The columns that make up every vector of a table."""


def extract_to_file(
    config: ExtractConfig,
    out: Path,
    *,
    force: bool = False,
    listener: Listener | None = None,
    checks: Checks | None = None,
) -> tuple[int, ...]:
    """Write the features of the images, in data order, as arrays (.npz) or as a table (.parquet, .lance).

    Arrays: `x` (N, D) fp32, or (N, blocks, D), `y` (N,) if labelled and `paths` (N,). Labelled images also have
    `class_names` (C,), the names of labels 0, 1, ... With both splits, there is also `splits` (N,).
    Tables have one row per image: `path`, `split`, `label` and `class` (its name) if labelled, and `x` (or `block_1`,
    ...), fixed-size lists of fp32 as vector databases read them. They are written in batches, so memory does not
    grow with the number of images.
    Returns the shape of x; in a process group only rank 0 writes, and the others return (). Raises OutputError for an
    existing file or an unknown ending, ConfigError for arrays of blocks of different widths and for .lance if its
    package is missing.
    """
    checks, listener = checks or Checks(), listener or Silent()
    checks.run("out", lambda: _check_out(out, force))
    splits, every = chosen_splits(config.split), config.split == "all"
    opened = open_encoder(config, config.checkpoint, listener, checks, need_labels=False, splits=splits, existing=every)
    groups = column_groups(config, opened.inputs, checks)
    inputs = opened.checked(checks)
    assert isinstance(inputs, EncoderInputs)
    prepare_groups(groups, inputs, list(opened.sources))
    if not end_group():
        return ()
    images = Collection(inputs, list(opened.sources))
    if out.suffix == ".npz":
        return _write_arrays(out, images, [columns for _, columns in groups], every)
    single = len(groups) == 1
    vectors = {"x" if single else f"block_{where['blocks']}": columns for where, columns in groups}
    _write_table(out, images, vectors, listener)
    width = images.matrix(groups[0][1]).shape[1]
    return (len(images), width) if single else (len(images), len(groups), width)


def _check_out(out: Path, force: bool) -> None:
    if out.suffix != ".lance":
        check_new_file(out, ENDINGS, force)
        return
    import_lance()
    if not out.is_dir():
        check_new_file(out, ENDINGS, force)
    elif not (out / "_versions").is_dir():
        raise OutputError(f"--out {out}: is a folder but not a Lance dataset; choose another name")
    elif not force:
        raise OutputError(f"--out {out}: exists; choose another name, or --force to replace it")


def import_lance() -> Any:
    """Import the package for the Lance format. Raises ConfigError if it is not installed."""
    try:
        import lance
    except ImportError:
        raise ConfigError(".lance needs the package pylance: pip install 'mimref[lance]'; or write .parquet") from None
    return lance


def _write_arrays(out: Path, images: Collection, groups: Sequence[Sequence[Column]], every: bool) -> tuple[int, ...]:
    stacked = [part.features.stacked(groups) for part in images.parts]
    x = stacked[0] if len(stacked) == 1 else np.concatenate(stacked)
    arrays: dict[str, Any] = {}
    labels = [part.features.y for part in images.parts]
    names = next((part.features.class_names for part in images.parts if part.features.class_names is not None), None)
    if all(y is not None for y in labels):
        arrays["y"] = np.concatenate([y for y in labels if y is not None])
        if names is not None:
            arrays["class_names"] = np.asarray(names, dtype=np.str_)
    paths = [part.path(row) for part in images.parts for row in range(len(part.features))]
    if every:
        arrays["splits"] = np.repeat(
            [part.split for part in images.parts], [len(each.features) for each in images.parts]
        )
    with atomic_write(out) as file:
        np.savez(file, x=x, **arrays, paths=np.asarray(paths))
    return x.shape


def _write_table(out: Path, images: Collection, vectors: Vectors, listener: Listener) -> None:
    import pyarrow  # slow
    import pyarrow.parquet

    batches = _batches(images, vectors, listener)
    first = next(batches)

    def all_batches() -> Iterator[Any]:
        yield first
        yield from batches

    if out.suffix == ".lance":
        with atomic_folder(out) as temporary:
            reader = pyarrow.RecordBatchReader.from_batches(first.schema, all_batches())
            import_lance().write_dataset(reader, temporary)
        return
    with atomic_path(out) as temporary, pyarrow.parquet.ParquetWriter(temporary, first.schema) as writer:
        for batch in all_batches():
            writer.write_batch(batch)


def _batches(images: Collection, vectors: Vectors, listener: Listener) -> Iterator[Any]:
    """Yield the table's rows as record batches with the same schema."""
    width = sum(images.matrix(columns).shape[1] for columns in vectors.values())
    step, done = max(1, BATCH_ELEMENTS // width), 0
    labelled = any(part.features.y is not None for part in images.parts)
    named = any(part.features.class_names is not None for part in images.parts)
    for part in images.parts:
        for start in range(0, len(part.features), step):
            rows = range(start, min(start + step, len(part.features)))
            yield _batch(part, rows, vectors, labelled=labelled, named=labelled and named)
            done += len(rows)
            listener.progress("rows", done, len(images))


def _batch(part: Part, rows: range, vectors: Vectors, *, labelled: bool, named: bool) -> Any:
    import pyarrow

    columns: dict[str, Any] = {
        "path": pyarrow.array([part.path(row) for row in rows], pyarrow.string()),
        "split": pyarrow.array([part.split] * len(rows), pyarrow.string()),
    }
    y, inside = part.features.y, slice(rows.start, rows.stop)
    if labelled:
        labels = [None] * len(rows) if y is None else y[inside]
        columns["label"] = pyarrow.array(labels, pyarrow.int64())
    if named:
        columns["class"] = pyarrow.array([part.class_name(row) for row in rows], pyarrow.string())
    for name, parts in vectors.items():
        x = np.ascontiguousarray(part.features.matrix(parts)[inside], dtype=np.float32)
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(x.ravel()), x.shape[1])
    return pyarrow.record_batch(columns)
