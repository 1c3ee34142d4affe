"""The content of a weights file: tensors by name, as saved, read without running code and without copying them.

The format is detected from the content; file names are ignored.
"""

import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimref.config.presets import maker_of
from mimref.encoders.contents import Content
from mimref.encoders.folders import check_whole, find_in_folder, read_index
from mimref.encoders.published import ADDRESSES, PACKAGED, fetch, find_named
from mimref.encoders.torch_files import read_torch_file
from mimref.errors import CheckpointError, did_you_mean
from mimref.progress import LabelledProgress


def read_file(
    path: str | Path, progress: LabelledProgress | None = None
) -> tuple[Path, Content, dict[str, Any], list[str]]:
    """Return the file's own path, its content, the header of mimref's own files (else empty) and what was ignored.

    The header is JSON; what was ignored is described by notices.
    path: a file, an index of shards, the output folder of a run, a folder of `save_pretrained`, the name of published
    weights, or that of a packaged encoder, `quickstart` or `peak`.
    progress: receives the progress of a download.
    Raises CheckpointError with a one-line reason for a missing, damaged or foreign file.
    """
    try:
        file = _find(path, progress)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    start = _read_start(file)
    if start[8:] != b"{" and start.lstrip()[:1] == b"{":
        return file, _read_shards(file), {}, []
    check_whole(file)
    content, header, ignored = _read_tensors(file, start)
    if next(named_tensors(content), None) is None:
        only = f", only {ignored}, whose code is not run; load it with its library and save its state_dict"
        raise CheckpointError(f"{file}: contains no named tensors{only if ignored else ''}")
    return file, content, header, [f"ignored {ignored}"] if ignored else []


def named_tensors(content: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested mappings under dotted names; keys that are not strings are left out."""
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
    """Return an exception's first sentence, or its type if the sentence is not informative."""
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    informative = re.search("[a-z]", sentence) and not sentence.startswith("Weights only load failed")
    return sentence if informative else type(error).__name__


def _find(path: str | Path, progress: LabelledProgress | None) -> Path:
    if path in PACKAGED:
        return Path(str(resources.files("mimref") / "assets" / f"{path}.safetensors"))
    if known := find_named(path):
        return fetch(known, progress)
    file = Path(path)
    if file.is_dir():
        return find_in_folder(file)
    if not file.is_file():
        maker = maker_of(path)
        hint = f"; make it: {maker}" if maker else did_you_mean(str(path), [*PACKAGED, *ADDRESSES])
        hint = hint or "; pass a checkpoint or the name of published weights"
        raise CheckpointError(f"{file}: {'not a file' if file.exists() else 'no such file'}{hint}")
    return file


def _read_start(file: Path) -> bytes:
    """Read the bytes that distinguish the formats."""
    try:
        with file.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    if not start:
        raise CheckpointError(f"{file}: the file is empty")
    return start


def _read_tensors(file: Path, start: bytes) -> tuple[Content, dict[str, Any], str]:
    """Return the content, the JSON header of mimref's own files (else empty), and what was left out, for display."""
    # A safetensors file starts with 8 bytes, the length of its JSON header, and the header's brace.
    if start[8:] == b"{":
        return *_read_safetensors(file), ""
    content, ignored = _read_pickle(file)
    return content, {}, ignored


def _read_shards(file: Path) -> Content:
    """Read the tensors of all shards in an index."""
    tensors: dict[str, Tensor] = {}
    for shard, names in read_index(file).items():
        found = dict(named_tensors(_read_tensors(shard, _read_start(shard))[0]))
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


def _read_pickle(file: Path) -> tuple[Content, str]:
    """Return the content of a torch file, and the classes whose objects are left out, for display."""
    try:
        content, names = read_torch_file(file)
    except Exception as error:  # damaged pickles can cause any error
        raise CheckpointError(f"{file}: not a checkpoint, or a damaged one ({first_line(error)[:200]})") from error
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return content, f"objects of {', '.join(names[:3])}{more}" if names else ""
