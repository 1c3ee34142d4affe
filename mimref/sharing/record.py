"""Record of how a checkpoint was made, without anything that names a place on this machine."""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from mimref.data.open import NAMES, is_hub_name
from mimref.data.pixels import DECODING
from mimref.encoders.checkpoints import Checkpoint
from mimref.encoders.published import find_published
from mimref.results import Row, main_rows

_NAMED = (*NAMES, "torchvision:", "vtab:", "vtab1k:")
# Repositories on the Hugging Face hub with the same weights as the published files of these names.
_BASE_MODELS = {
    "mae_b16": "facebook/vit-mae-base",
    "mae_l16": "facebook/vit-mae-large",
    "mae_h14": "facebook/vit-mae-huge",
    "dino_b16": "facebook/dino-vitb16",
    "dinov2_s14": "facebook/dinov2-small",
    "dinov2_b14": "facebook/dinov2-base",
    "dinov2_l14": "facebook/dinov2-large",
    "dinov2_g14": "facebook/dinov2-giant",
    "ijepa_h14": "facebook/ijepa_vith14_1k",
}


@dataclass(frozen=True)
class Record:
    """How a checkpoint was made, as far as its file and run folder record it."""

    source: str | None = None
    """Pre-training method, such as `mae refined`."""
    licence: str | None = None
    """Licence of the weights."""
    command: str | None = None
    """Command that trained it: refine, pretrain or finetune."""
    preset: str | None = None
    data: str | None = None
    """The images: a name, or the last part of a folder's path."""
    data_is_public: bool = False
    """Whether others know the images by this name."""
    base_model: str | None = None
    """Repository of the weights it started from, on the Hugging Face hub."""
    rows: list[Row] = field(default_factory=list)
    """Results, including those of other models that the run compared."""
    settings: str = ""
    """The run's settings as TOML."""


def read_record(checkpoint: Checkpoint) -> Record:
    """Read a checkpoint's header, and the config.toml and results.json next to it if they are of the same run."""
    header = checkpoint.header
    document = _results(checkpoint.path)
    config = _config(checkpoint.path) if document else {}
    recorded = header.get("data")
    spec = recorded.get("spec") if isinstance(recorded, Mapping) else None
    weights = (config.get("encoder") or {}).get("weights")
    rows = document.get("metrics") or header.get("metrics") or []
    return Record(
        source=checkpoint.source,
        licence=checkpoint.licence,
        command=document.get("command"),
        preset=last_part(header.get("preset")),
        data=None if not isinstance(spec, str) else spec if is_public(spec) else last_part(spec),
        data_is_public=isinstance(spec, str) and is_public(spec),
        base_model=_BASE_MODELS.get(weights) if isinstance(weights, str) else None,
        rows=main_rows([row for row in rows if isinstance(row, dict) and {"metric", "value"} <= row.keys()]),
        settings=tomli_w.dumps(_shareable(config)) if config else "",
    )


def is_public(spec: str) -> bool:
    """Return whether a data spec means the same on every machine."""
    hub = spec.startswith("hf:") and is_hub_name(spec.removeprefix("hf:"))
    return spec.startswith(_NAMED) or hub


def shareable_data(recorded: object) -> dict[str, Any]:
    """Return a header's record of its images without paths: named data sets, and how images are decoded."""
    if not isinstance(recorded, Mapping):
        return {}
    spec = recorded.get("spec")
    keys = ("spec", "train_limit", "image", "label") if isinstance(spec, str) and is_public(spec) else ()
    return {key: recorded[key] for key in (*keys, *DECODING) if recorded.get(key) is not None}


def _results(file: Path) -> dict[str, Any]:
    """Read results.json of the run that wrote the file; empty if there is none."""
    found = _read(file.with_name("results.json"), json.loads) if file.name == "encoder.safetensors" else {}
    return found if found.get("command") in ("refine", "pretrain", "finetune") else {}


def _config(file: Path) -> dict[str, Any]:
    return _read(file.with_name("config.toml"), tomllib.loads)


def _read(file: Path, parse: Any) -> dict[str, Any]:
    try:
        found = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _shareable(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with paths reduced to their last part."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found[key] = _shareable(value)
        elif isinstance(value, list):
            found[key] = [last_part(each) if isinstance(each, str) else each for each in value]
        else:
            found[key] = last_part(value) if isinstance(value, str) and not is_public(value) else value
    return {key: value for key, value in found.items() if value != {}}


def last_part(text: Any) -> Any:
    """Reduce an absolute path or address, also after a prefix such as `list:`, to its last part; keep all else."""
    if not isinstance(text, str) or find_published(text):
        return text
    prefix, colon, path = text.partition(":")
    if "://" in text:  # the server and the folders on it are private, too
        start = f"{prefix}:" if "://" in path else ""
        return start + (text.rpartition("/")[2] or "images")
    start, path = (f"{prefix}:", path) if colon and prefix.isalnum() else ("", text)
    return start + (Path(path).name or "images") if os.path.isabs(path) or path.startswith(("~", "..")) else text
