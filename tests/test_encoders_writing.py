"""Writing weights: the same bytes every time, and their alignment."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from mimref.encoders.writing import write_safetensors

HEADER = {"name": 'é "quoted" \\ \u2028 \x01', "lone": "\ud800", "numbers": [1, 2.5]}


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 2), "a": torch.arange(5, dtype=torch.int8), "empty": torch.zeros(0, 2)}
    contents = set()
    for number in range(20):
        write_safetensors(tmp_path / str(number), tensors, HEADER)
        contents.add((tmp_path / str(number)).read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["mimref"]) == HEADER


def test_numbers_start_at_a_multiple_of_eight_bytes(tmp_path: Path) -> None:
    for length in range(9):
        write_safetensors(tmp_path / "file", {"x": torch.ones(1)}, {"text": "." * length})
        assert int.from_bytes((tmp_path / "file").read_bytes()[:8], "little") % 8 == 0
