"""`mimref extract`: features as a file for other programs."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimref.distributed.group import end_group
from mimref.errors import ConfigError, OutputError
from mimref.features.config import ExtractConfig
from mimref.features.encode import block_groups, columns_of
from mimref.features.inputs import EncoderInputs
from mimref.features.matrix import Matrix
from mimref.files import atomic_path, atomic_write
from mimref.progress import Listener, Silent

ENDINGS = (".npz", ".parquet")


def extract_to_file(
    config: ExtractConfig, out: Path, *, force: bool = False, listener: Listener | None = None
) -> tuple[int, ...]:
    """Write `x` (N, D) fp32, or (N, blocks, D), `y` (N,) if labelled and `paths` (N,), in the order of the images.

    A .parquet has one line per image: columns `path`, `label`, and `x` (or `block_1`, ...) with lists of numbers.
    Returns the shape of x; in a process group rank 0 alone writes, and the others return (). Raises OutputError for a
    file that exists, ConfigError for blocks of different widths.
    """
    listener = listener or Silent()
    if out.suffix not in ENDINGS:
        raise ConfigError(f"--out {out}: name a file that ends in {' or '.join(ENDINGS)}")
    if out.exists() and not force:
        raise OutputError(f"{out} exists; give another --out, or --force to replace it")
    inputs = EncoderInputs(config, config.checkpoint, listener, need_labels=False)
    groups = block_groups(config.blocks, inputs.depth)
    columns = {
        name: columns_of(blocks, config.pool, config.final_norm, inputs.depth) for name, blocks in groups.items()
    }
    inputs.prepare([column for group in columns.values() for column in group], [config.split])
    if not end_group():
        return ()
    matrices = {name: inputs.matrix(config.split, group) for name, group in columns.items()}
    labels, source = inputs.labels(config.split), inputs.source(config.split)
    paths = [source.path(int(index)) for index in inputs.indices(config.split)]
    if out.suffix == ".npz":
        return _write_npz(out, matrices, labels, paths)
    return _write_parquet(out, matrices, labels, paths)


def _write_npz(
    out: Path, matrices: dict[str, Matrix], labels: NDArray[np.int64] | None, paths: list[str]
) -> tuple[int, ...]:
    widths = {x.shape[1] for x in matrices.values()}
    if len(widths) > 1:
        raise ConfigError(f"--blocks: these blocks differ in width ({sorted(widths)}); extract them one by one")
    every = slice(None)
    parts = [x[every].astype(np.float32, copy=False) for x in matrices.values()]
    arrays: dict[str, NDArray[Any]] = {"x": parts[0] if len(parts) == 1 else np.stack(parts, axis=1)}
    if labels is not None:
        arrays["y"] = labels
    with atomic_write(out) as file:
        np.savez(file, allow_pickle=False, **arrays, paths=np.asarray(paths))
    return arrays["x"].shape


def _write_parquet(
    out: Path, matrices: dict[str, Matrix], labels: NDArray[np.int64] | None, paths: list[str]
) -> tuple[int, ...]:
    # Slow to import, and of no use to .npz files.
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {"path": pyarrow.array(paths)}
    if labels is not None:
        columns["label"] = pyarrow.array(labels)
    for name, x in matrices.items():
        values = np.ascontiguousarray(x[slice(None)].astype(np.float32, copy=False))
        flat = pyarrow.array(values.ravel())
        columns["x" if len(matrices) == 1 else f"block_{name}"] = pyarrow.FixedSizeListArray.from_arrays(
            flat, x.shape[1]
        )
    with atomic_path(out) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
    first = next(iter(matrices.values()))
    return first.shape if len(matrices) == 1 else (len(first), len(matrices), first.shape[1])
