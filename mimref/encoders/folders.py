"""Folders of weights as Hugging Face's `save_pretrained` writes them: one file, or shards with an index."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimref.errors import CheckpointError

_OWN = "encoder.safetensors"
_INDEX = ".index.json"
_SAVED = tuple(f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", _INDEX))
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".th", ".ckpt", ".tar")
_MOST_BYTES = 64 << 20
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def find_in_folder(folder: Path) -> Path:
    """Find the weights file or index in a run's folder or a `save_pretrained` folder. Raises CheckpointError."""
    for name in (_OWN, *_SAVED):
        if (folder / name).is_file():
            return folder / name
    if splits := sorted(folder.glob("split[0-9]*.safetensors")):
        raise CheckpointError(f"{folder}: holds one encoder per split; pass one of its files, such as {splits[0]}")
    if any((folder / name).exists() for name in ("state", "metrics.jsonl", "config.toml")):
        raise CheckpointError(f"{folder}: the folder holds no {_OWN}; finish its run with --resume")
    found = sorted(each.name for each in folder.iterdir() if each.name.endswith(_ENDINGS) and each.is_file())
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise CheckpointError(f"{folder}: a folder; pass one of its weights files ({', '.join(found[:3])}{more})")
    raise CheckpointError(f"{folder}: the folder holds no {_OWN}, and neither {' nor '.join(_SAVED[::2])}")


def read_index(file: Path) -> dict[Path, list[str]]:
    """Map every shard in an index to the names of its tensors. Raises CheckpointError."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        weight_map = json.loads(file.read_bytes())["weight_map"]
        shards: dict[Path, list[str]] = {}
        for name, shard in weight_map.items():
            # Only names of files in the index's own folder are allowed, never paths.
            if not isinstance(shard, str) or not shard or Path(shard).name != shard:
                raise ValueError(f"a shard is called {shard!r}")
            shards.setdefault(file.parent / shard, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: a JSON file, but no index of weights (no weight_map with file names); pass the weights themselves"
        ) from error
    for path in shards:
        if not path.is_file():
            raise CheckpointError(
                f"{file}: names {path.name}, which is not in its folder; all {len(shards)} are needed"
            )
    return shards


def check_whole(file: Path) -> None:
    """Raise CheckpointError for one of several shards whose index, through which all are read, lies beside it."""
    index = _index_of(file)
    if index is None or not index.is_file():
        return
    try:
        shards = read_index(index)
    except CheckpointError:
        return
    if file in shards and len(shards) > 1:
        raise CheckpointError(f"{file}: one of {len(shards)} shards; pass their folder, or their index {index}")


def shard_hint(file: Path) -> str:
    """Return a hint for a name such as model-00001-of-00002.safetensors; empty for other names."""
    index, match = _index_of(file), _SHARD.fullmatch(file.name)
    if index is None or match is None:
        return ""
    number, count = int(match[2]), int(match[3])
    return f"; by its name it is shard {number} of {count}: put all of them and {index.name} into one folder"


def _index_of(file: Path) -> Path | None:
    """Return the path of the index of a file that is one of several shards by its name; None for other files."""
    match = _SHARD.fullmatch(file.name)
    return file.with_name(f"{match[1]}{match[4]}{_INDEX}") if match and int(match[3]) > 1 else None


def saved_normalisation(file: Path, channels: int) -> dict[str, list[float]]:
    """Return each channel's mean and deviation from the files beside it; empty without them.

    They are in `preprocessor_config.json` of transformers, or in `config.json` of timm. A single value holds for all
    `channels`.
    """
    found = _read_object(file.parent / "preprocessor_config.json")
    if found.get("do_normalize") is False:
        return {"mean": [0.0] * channels, "std": [1.0] * channels}
    values: dict[str, Any] = {"mean": found.get("image_mean"), "std": found.get("image_std")}
    timms = _read_object(file.parent / "config.json").get("pretrained_cfg")
    if not found and isinstance(timms, dict):
        values = {name: timms.get(name) for name in values}
    saved = {name: _per_channel(value, channels) for name, value in values.items()}
    return saved if all(saved.values()) else {}


def _per_channel(value: Any, channels: int) -> list[float]:
    """Return a number, or a list of one, three or `channels` numbers, for every channel; empty if it is neither."""
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) not in (1, 3, channels) or not all(type(number) in (int, float) for number in numbers):
        return []
    return [float(number) for number in numbers] * (channels if len(numbers) == 1 else 1)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def saved_config(file: Path) -> Mapping[str, Any]:
    """Return the entries on the vision model from `config.json` beside the file; empty if there is no such file."""
    config = _read_object(file.parent / "config.json")
    vision = config.get("vision_config")
    return vision if isinstance(vision, dict) else config
