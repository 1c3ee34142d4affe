"""Writing weights as safetensors, so that the same weights always produce the same bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mimref.files import atomic_write

_LENGTH_BYTES = 8
"""Size of the field at the start of a file that holds the header's length, itself a multiple of 8."""


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write contiguous tensors atomically, with `header` as the metadata entry `mimref`. Raises OutputError."""
    start, rest = safetensors_parts(tensors, header)
    with atomic_write(path) as file:
        file.write(start)
        file.write(rest)


def safetensors_parts(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> tuple[bytes, memoryview]:
    """Return the two parts of a file: the header that describes the tensors, and their data.

    safetensors writes the metadata keys in random order; here they are sorted.
    """
    content = save(dict(tensors), metadata={"format": "pt", "mimref": json.dumps(dict(header))})
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    described = json.loads(content[_LENGTH_BYTES:end])
    described["__metadata__"] = dict(sorted(described["__metadata__"].items()))
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, memoryview(content)[end:]
