"""Files that are not checkpoints, are damaged or do not fit: one line names the file and the fault."""

import json
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mimref.encoders.checkpoints import Checkpoint, read_checkpoint, save_encoder
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import CheckpointError, UserError
from tests.checkpoints import load_encoder

TINY = Architecture("custom", 16, width=32, depth=2, num_heads=4, patch_size=4)


def refusal(path: str | Path, architecture: Architecture | None = TINY) -> str:
    """The message of the refusal, which must be one line."""
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path, architecture)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert str(path) in message
    return message


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_encoder(TINY).vit.state_dict()


def write_safetensors(path: Path, **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state().items()}, path, metadata=metadata or None)
    return path


# --- not a checkpoint


def test_missing(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nothing.pth")
    assert "the folder holds no encoder.safetensors" in refusal(tmp_path)


def test_a_name_too_long() -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read \(File name too long\)$"):
        read_checkpoint("a" * 5000)


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refusal(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_not_allowed(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors")
    path.chmod(0)
    assert "cannot be read (Permission denied)" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b"hello, this is text\n" * 10,
        b"{}",
        b"\x00" * 100,
        b"\x89PNG\r\n\x1a\n" + bytes(range(200)),
        b"PK\x03\x04 but no archive",
        struct.pack("<Q", 10**15) + b"{" + b" " * 50,
        struct.pack("<Q", 2) + b"{]",
        bytes(range(256)) * 4,
    ],
)
def test_other_kinds_of_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    refusal(path)


def test_zero_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.pth").touch()
    assert refusal(tmp_path / "a.pth").endswith("the file is empty")


@pytest.mark.parametrize(
    "content", [{}, None, {"model": 5}, {"epoch": 3, "lr": 0.1}, [torch.zeros(2)], {1: torch.zeros(2)}]
)
def test_pickles_without_named_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert refusal(tmp_path / "a.pth").endswith("contains no named tensors")


# --- damaged


@pytest.mark.parametrize("keep", [1, 9, 100, 0.9, -1])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated(tmp_path: Path, kind: str, keep: float) -> None:
    path = tmp_path / "weights.any"
    if kind == "safetensors":
        write_safetensors(path)
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert "damaged" in (message := refusal(path)) or "not a checkpoint, or a damaged one" in message


def test_single_bytes_changed(tmp_path: Path) -> None:
    """Whichever byte of the structure changes, the file is either loaded or refused."""
    good = write_safetensors(tmp_path / "good.safetensors", mimref=json.dumps({"architecture": TINY.to_dict()}))
    torch.save(state(), tmp_path / "good.pth")
    path = tmp_path / "bad"
    generator = torch.Generator().manual_seed(0)
    for source in (good, tmp_path / "good.pth"):
        content = source.read_bytes()
        for _ in range(40):
            at = int(torch.randint(min(len(content), 3000), (1,), generator=generator))
            byte = int(torch.randint(256, (1,), generator=generator))
            path.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
            try:
                load_encoder(path, None if source == good else TINY)
            except UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("header", ["{", "[1, 2]", "null", "[" * 100_000])
def test_headers_that_are_no_json_objects(tmp_path: Path, header: str) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", mimref=header)
    assert "damaged header" in refusal(path, None)


@pytest.mark.parametrize(
    "architecture",
    [
        None,
        "vit_l16",
        {},
        {"name": "custom"},
        TINY.to_dict() | {"colour": "red"},
        TINY.to_dict() | {"width": "wide"},
        TINY.to_dict() | {"width": 32.0},
        TINY.to_dict() | {"depth": -1},
        TINY.to_dict() | {"num_heads": 5},
        TINY.to_dict() | {"name": None},
    ],
)
def test_headers_with_another_architecture(tmp_path: Path, architecture: object) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", mimref=json.dumps({"architecture": architecture}))
    assert "damaged header (architecture" in refusal(path, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 17}, "image_size 17 is not divisible"),
        ({"from_timm": True, "name": "no_such_model"}, "unknown architecture 'no_such_model'"),
        ({"from_timm": True, "name": "resnet18"}, "not a plain timm VisionTransformer"),
        ({"width": 30, "num_heads": 1}, "cls_token has shape (1, 1, 32) instead of (1, 1, 30)"),
        ({"depth": 3}, "blocks.2.norm1.weight is missing"),
        ({"post_norm": True}, "norm_pre.weight is missing"),
    ],
)
def test_headers_that_do_not_fit_the_tensors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", mimref=json.dumps({"architecture": TINY.to_dict() | changes}))
    with pytest.raises(UserError) as caught:
        load_encoder(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- code


class Malicious:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_pickles_does_not_run(tmp_path: Path, kind: str) -> None:
    """Weights beside the code are read, with a notice."""
    path = tmp_path / "weights.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(OrderedDict(args=Malicious(tmp_path / "ran"))))
        assert "not a checkpoint" in refusal(path)
    else:
        content = {"model": state(), "args": Malicious(tmp_path / "ran")}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
        load_encoder(path, TINY)
        (notice,) = read_checkpoint(path).notices(TINY)
        assert str(path) in notice and notice.endswith(f"{os.system.__module__}.system")
        torch.save(content["args"], path, _use_new_zipfile_serialization=kind == "zip")
        assert "system" in (message := refusal(path)) and "weights_only" not in message
    assert not (tmp_path / "ran").exists()


# --- does not fit


def changed(tmp_path: Path, **changes: torch.Tensor | None) -> Path:
    tensors: dict[str, torch.Tensor] = state()
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    torch.save(tensors, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    message = refusal(changed(tmp_path, norm__weight=None, blocks__0__attn__qkv__bias=None))
    assert message.endswith("does not fit custom: blocks.0.attn.qkv.bias is missing; norm.weight is missing")
    assert refusal(changed(tmp_path, extra=torch.zeros(2))).endswith("custom: extra is unexpected")
    message = refusal(changed(tmp_path, blocks__1__mlp__fc1__weight=torch.zeros(128, 48)))
    assert message.endswith("blocks.1.mlp.fc1.weight has shape (128, 48) instead of (128, 32)")


def test_mixed_and_other_widths(tmp_path: Path) -> None:
    other = build_encoder(Architecture("custom", 16, width=48, depth=2, num_heads=4, patch_size=4)).vit.state_dict()
    mixed = {name: other[name] if name.startswith("blocks.1") else tensor for name, tensor in state().items()}
    torch.save(mixed, tmp_path / "mixed.pth")
    message = refusal(tmp_path / "mixed.pth")
    assert "blocks.1.norm1.weight has shape (48,) instead of (32,)" in message and "more" in message
    torch.save(other, tmp_path / "other.pth")
    assert "cls_token has shape (1, 1, 48) instead of (1, 1, 32)" in refusal(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("positions", "shape"),
    [
        (torch.zeros(1, 16, 32), "(1, 16, 32)"),  # not a square grid
        (torch.zeros(1, 1, 32), "(1, 1, 32)"),
        (torch.zeros(17, 32), "(17, 32)"),
        (torch.zeros(1, 26, 48), "(1, 17, 48)"),
        (torch.zeros(2, 26, 32), "(1, 17, 32)"),
        (torch.zeros(1, 26, 32, dtype=torch.int64), "(1, 26, 32)"),
        (torch.zeros(()), "()"),
    ],
)
def test_positions_of_other_shapes(tmp_path: Path, positions: torch.Tensor, shape: str) -> None:
    assert "pos_embed has shape" in refusal(changed(tmp_path, pos_embed=positions))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_that_are_no_real_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    message = refusal(changed(tmp_path, norm__bias=torch.zeros(32, dtype=dtype)))
    assert "norm.bias" in message and str(dtype) in message


def test_tensors_of_other_layouts(tmp_path: Path) -> None:
    refusal(changed(tmp_path, norm__bias=torch.zeros(32, device="meta")))
    refusal(changed(tmp_path, norm__bias=torch.zeros(32).to_sparse()))


def test_a_text_models_checkpoint(tmp_path: Path) -> None:
    torch.save(
        {"transformer.wte.weight": torch.zeros(100, 32), "lm_head.weight": torch.zeros(100, 32)}, tmp_path / "a.pt"
    )
    message = refusal(tmp_path / "a.pt")
    assert "cls_token is missing" in message and "and 28 more" in message


def test_a_header_is_kept_apart_from_foreign_files(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "timm.safetensors", format="pt")
    checkpoint: Checkpoint = read_checkpoint(path)
    assert checkpoint.header == {} and checkpoint.architecture is None
    assert "pass --arch" in refusal(path, None)
    save_encoder(tmp_path / "b.safetensors", build_encoder(TINY), {})
    assert load_encoder(tmp_path / "b.safetensors")[0].depth == 2
