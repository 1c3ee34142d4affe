"""What a weights file holds: tensors by name, as saved, without running code and without copying them.

The format comes from the content; file names are ignored.
"""

import argparse
import collections
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimref.encoders.folders import check_whole, find_in_folder, read_index
from mimref.encoders.published import ADDRESSES, fetch, find_published
from mimref.errors import CheckpointError, did_you_mean
from mimref.progress import LabelledProgress

# Settings and numbers that public checkpoints hold beside tensors; their constructors only store values.
_HARMLESS: list[Any] = [
    *(argparse.Namespace, collections.defaultdict, np.dtype, np.ndarray),
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdUS"),
    # What numpy pickles scalars and arrays with, under the names of numpy 1 and 2.
    *((np.float64(0).__reduce__()[0], f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
    *((np.empty(0).__reduce__()[0], f"numpy.{module}.multiarray._reconstruct") for module in ("core", "_core")),
]

Content = Mapping[Any, Any]
"""Nested mappings with tensors at the leaves, mapped into memory where the format allows it."""


def read_file(path: str | Path, progress: LabelledProgress | None = None) -> tuple[Path, Content, dict[str, Any]]:
    """The file's own path, its content, and the JSON header of our own files (else empty).

    path: a file, an index of shards, the output folder of a run, a folder of `save_pretrained`, the name of published
    weights, or `quickstart` for the packaged encoder.
    progress: receives the progress of a download.
    Raises CheckpointError with one line for a missing, damaged or foreign file.
    """
    try:
        file = _find(path, progress)
        with file.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not start:
        raise CheckpointError(f"{file}: the file is empty")
    # A safetensors file starts with 8 bytes, the length of its JSON header, and the header's brace.
    if start[8:] != b"{" and start.lstrip()[:1] == b"{":
        return file, _read_shards(file), {}
    check_whole(file)
    if start[8:] == b"{":
        content, header = _read_safetensors(file)
    else:
        content, header = _read_pickle(file, zipped=start[:2] == b"PK"), {}
    if next(named_tensors(content), None) is None:
        raise CheckpointError(f"{file}: contains no named tensors")
    return file, content, header


def named_tensors(content: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested mappings, with dotted names; keys that are not strings are left out."""
    if not isinstance(content, Mapping):
        return
    for name, value in content.items():
        if not isinstance(name, str):
            continue
        if isinstance(value, Tensor):
            yield prefix + name, value
        else:
            yield from named_tensors(value, f"{prefix}{name}.")


def first_line(error: Exception) -> str:
    """An exception's first sentence, or its type if that says nothing."""
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    informative = re.search("[a-z]", sentence) and not sentence.startswith("Weights only load failed")
    return sentence if informative else type(error).__name__


def _find(path: str | Path, progress: LabelledProgress | None) -> Path:
    if path == "quickstart":
        return Path(str(resources.files("mimref") / "assets" / "quickstart.safetensors"))
    file = Path(path)
    known = None if file.exists() else find_published(str(path))
    if known:
        return fetch(known, progress)
    if file.is_dir():
        return find_in_folder(file)
    if not file.is_file():
        hint = did_you_mean(str(path), ADDRESSES) or "; pass a checkpoint or the name of published weights"
        raise CheckpointError(f"{file}: {'not a file' if file.exists() else 'no such file'}{hint}")
    return file


def _read_shards(file: Path) -> Content:
    """The tensors of all shards that an index names."""
    tensors: dict[str, Tensor] = {}
    for shard, names in read_index(file).items():
        with shard.open("rb") as stream:
            start = stream.read(9)
        content = _read_safetensors(shard)[0] if start[8:] == b"{" else _read_pickle(shard, zipped=start[:2] == b"PK")
        found = dict(named_tensors(content))
        missing = [name for name in names if name not in found]
        if missing:
            raise CheckpointError(f"{shard}: lacks {missing[0]}, which {file.name} expects in it")
        tensors |= {name: found[name] for name in names}
    return tensors


def _read_safetensors(file: Path) -> tuple[Content, dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file}: damaged safetensors file ({first_line(error)})") from error
    try:
        header = json.loads(metadata.get("mimref", "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged header ({first_line(error)})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: damaged header (not a JSON object)")
    return tensors, header


def _read_pickle(file: Path, *, zipped: bool) -> Content:
    """A file of `torch.save`; only the zip format, the default since torch 1.6, can be mapped into memory."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.simplefilter("ignore")  # about old pickles; users cannot change them
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damaged pickles fail in every possible way
        raise CheckpointError(f"{file}: {_why_unreadable(error)}") from error
    return content if isinstance(content, Mapping) else {}


def _why_unreadable(error: Exception) -> str:
    # torch's own message advises to turn the check off.
    if refused := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"refused, because it contains {refused[1]}, which could run code; "
            "if you trust it, load it with torch and save its state_dict as safetensors"
        )
    detail = re.search(r"WeightsUnpickler error: (.+)", str(error))
    return f"not a checkpoint, or a damaged one ({detail[1] if detail else first_line(error)})"
