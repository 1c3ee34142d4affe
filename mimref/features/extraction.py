"""`mimref extract`: features as a file for other programs."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimref.data.decode import printable
from mimref.distributed.group import end_group
from mimref.errors import Checks
from mimref.features.config import ExtractConfig
from mimref.features.encode import Features
from mimref.features.inputs import EncoderInputs, column_groups, prepare_groups
from mimref.features.opening import open_encoder
from mimref.files import atomic_path, atomic_write, check_new_file
from mimref.progress import Listener, Silent


def extract_to_file(
    config: ExtractConfig,
    out: Path,
    *,
    force: bool = False,
    listener: Listener | None = None,
    checks: Checks | None = None,
) -> tuple[int, ...]:
    """Write `x` (N, D) fp32, or (N, blocks, D), `y` (N,) if labelled and `paths` (N,), in the order of the images.

    Labelled images also have `class_names` (C,), those of labels 0, 1, ...
    A .parquet has one row per image: columns `path`, `label`, `class` (its name) and `x` (or `block_1`, ...) with lists
    of numbers.
    Returns the shape of x; in a process group only rank 0 writes, and the others return (). Raises OutputError for a
    file that exists or another ending, ConfigError for blocks of different widths.
    """
    checks, listener = checks or Checks(), listener or Silent()
    checks.run("out", lambda: check_new_file(out, (".npz", ".parquet"), force))
    opened = open_encoder(config, config.checkpoint, listener, checks, need_labels=False, splits=[config.split])
    groups = column_groups(config, opened.inputs, checks)
    inputs = opened.checked(checks)
    assert isinstance(inputs, EncoderInputs)
    prepare_groups(groups, inputs, [config.split])
    if not end_group():
        return ()
    features, source = inputs.features(config.split), inputs.source(config.split)
    paths = [source.path(int(index)) for index in features.indices]
    if out.suffix == ".npz":
        x = features.stacked([columns for _, columns in groups])
        labels: dict[str, Any] = {} if features.y is None else {"y": features.y}
        if labels and features.class_names is not None:
            labels["class_names"] = np.asarray(features.class_names, dtype=np.str_)
        with atomic_write(out) as file:
            np.savez(file, x=x, **labels, paths=np.asarray(paths))
        return x.shape
    blocks = {str(where["blocks"]): features.stacked([columns]) for where, columns in groups}
    _write_parquet(out, blocks, features, paths)
    first = next(iter(blocks.values()))
    return first.shape if len(blocks) == 1 else (len(first), len(blocks), first.shape[1])


def _write_parquet(out: Path, blocks: dict[str, NDArray[np.float32]], features: Features, paths: list[str]) -> None:
    import pyarrow  # slow
    import pyarrow.parquet

    columns: dict[str, Any] = {"path": pyarrow.array(paths)}
    if features.y is not None:
        columns["label"] = pyarrow.array(features.y)
        if features.class_names is not None:
            columns["class"] = pyarrow.array([printable(features.class_names[label]) for label in features.y])
    for name, x in blocks.items():
        lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(x.ravel()), x.shape[1])
        columns["x" if len(blocks) == 1 else f"block_{name}"] = lists
    with atomic_path(out) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
