"""`mimref extract`: features as a file for other programs."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimref.distributed.group import end_group
from mimref.errors import ConfigError
from mimref.features.config import ExtractConfig
from mimref.features.inputs import EncoderInputs, prepare_groups
from mimref.features.matrix import Labels
from mimref.files import atomic_path, atomic_write, check_new_file
from mimref.progress import Listener, Silent


def extract_to_file(
    config: ExtractConfig, out: Path, *, force: bool = False, listener: Listener | None = None
) -> tuple[int, ...]:
    """Write `x` (N, D) fp32, or (N, blocks, D), `y` (N,) if labelled and `paths` (N,), in the order of the images.

    A .parquet has one row per image: columns `path`, `label`, and `x` (or `block_1`, ...) with lists of numbers.
    Returns the shape of x; in a process group only rank 0 writes, and the others return (). Raises OutputError for a
    file that exists or another ending, ConfigError for blocks of different widths.
    """
    check_new_file(out, (".npz", ".parquet"), force)
    inputs = EncoderInputs(config, config.checkpoint, listener or Silent(), need_labels=False)
    groups = prepare_groups(config, inputs, [config.split])
    if not end_group():
        return ()
    features, source = inputs.features(config.split), inputs.source(config.split)
    blocks = {str(where["blocks"]): np.asarray(features.matrix(columns)[:], np.float32) for where, columns in groups}
    paths = [source.path(int(index)) for index in features.indices]
    write = _write_npz if out.suffix == ".npz" else _write_parquet
    write(out, blocks, features.y, paths)
    first = next(iter(blocks.values()))
    return first.shape if len(blocks) == 1 else (len(first), len(blocks), first.shape[1])


def _write_npz(out: Path, blocks: dict[str, NDArray[np.float32]], labels: Labels | None, paths: list[str]) -> None:
    widths = {x.shape[1] for x in blocks.values()}
    if len(widths) > 1:
        raise ConfigError(f"--blocks: these blocks differ in width ({sorted(widths)}); extract them one by one")
    parts = list(blocks.values())
    arrays: dict[str, Any] = {"x": parts[0] if len(parts) == 1 else np.stack(parts, axis=1)}
    if labels is not None:
        arrays["y"] = labels
    with atomic_write(out) as file:
        np.savez(file, allow_pickle=False, **arrays, paths=np.asarray(paths))


def _write_parquet(out: Path, blocks: dict[str, NDArray[np.float32]], labels: Labels | None, paths: list[str]) -> None:
    import pyarrow  # slow
    import pyarrow.parquet

    columns: dict[str, Any] = {"path": pyarrow.array(paths)}
    if labels is not None:
        columns["label"] = pyarrow.array(labels)
    for name, x in blocks.items():
        lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(x.ravel()), x.shape[1])
        columns["x" if len(blocks) == 1 else f"block_{name}"] = lists
    with atomic_path(out) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
