"""torch files are read as data: plain tensors are found beside any object, and nothing that a pickle names runs."""

import argparse
import collections
import pathlib
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mimref.encoders.backbones import BackboneArchitecture
from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.inspection import inspect_file
from mimref.encoders.reading import named_tensors, read_file
from mimref.errors import CheckpointError
from tests import fuzz_pickles
from tests.checkpoints import LAYOUTS, timm_vit

PATHS = pathlib.PurePosixPath.__module__
"""The module of Python's path classes: in 3.13, it is `pathlib._local`."""


def read(path: Path, content: Any = None, *, zipped: bool = True) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file and its notice; if `content` is given, it is saved to the file first."""
    if content is not None:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    _, found, header, notices = read_file(path)
    assert header == {} and len(notices) <= 1
    return dict(named_tensors(found)), "".join(notices)


def refusal(path: Path, content: Any = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path, content)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 600
    return message


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether both have the same names in the same order, with equal values (bit for bit), types and strides."""
    return list(found) == list(expected) and all(
        left.dtype == right.dtype and left.stride() == right.stride() and torch.equal(left, right.detach())
        for left, right in zip(found.values(), expected.values(), strict=True)
    )


def foreign(name: str, **attributes: Any) -> Any:
    """An object of a made-up class, whose module exists only in `sys.modules`."""
    module, _, title = name.rpartition(".")
    kind = type(title, (), {"__module__": module})
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:count]), types.ModuleType("foreign"))
    setattr(sys.modules[module], title, kind)
    made = kind()
    made.__dict__.update(attributes)
    return made


# --- good files


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=[entry[0].__name__ for entry in LAYOUTS])
def test_public_layouts_are_read_as_torch_reads_them(layout: Any, zipped: bool, tmp_path: Path) -> None:
    content = layout[0](dict(layout[1]().state_dict()))
    found, notice = read(tmp_path / "a.pth", content, zipped=zipped)
    trusted = torch.load(tmp_path / "a.pth", weights_only=False)
    assert same(found, dict(named_tensors(trusted))) and notice == ""


@pytest.mark.parametrize("zipped", [True, False])
def test_every_plain_tensor(zipped: bool, tmp_path: Path) -> None:
    numbers = torch.arange(10.0)
    attributed, parameter = torch.ones(3), nn.Parameter(numbers)
    attributed.note, parameter.note = "a", "b"  # type: ignore[attr-defined]
    content = {
        "whole": numbers, "part": numbers[2:6], "transposed": numbers.view(2, 5).t(), "parameter": parameter,
        "frozen": nn.Parameter(numbers, requires_grad=False), "expanded": torch.ones(1).expand(300, 300),
        "scalar": torch.tensor(3), "empty": torch.zeros(0, 3), "bool": torch.tensor([True, False]),
        "half": numbers.half(), "bfloat16": numbers.bfloat16(), "complex": numbers.to(torch.complex64),
        "uint16": torch.ones(3, dtype=torch.uint16), "attributed": attributed,
        "lists": collections.defaultdict(list, {"below": torch.ones(1)}), "text": collections.Counter("abc"),
    }  # fmt: skip
    found, notice = read(tmp_path / "a.pth", content, zipped=zipped)
    below = content.pop("lists")["below"]
    content.pop("text")
    assert same(found, content | {"lists.below": below}) and notice == ""
    assert all(type(tensor) is Tensor and not tensor.requires_grad for tensor in found.values())
    assert found["whole"].untyped_storage().data_ptr() <= found["part"].data_ptr() == found["whole"][2:].data_ptr()


def test_tensors_are_mapped(tmp_path: Path) -> None:
    found, _ = read(tmp_path / "a.pth", {"a": torch.rand(300_000)})
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(f"{tmp_path}/a.pth")]
    starts_and_ends = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    assert any(start <= found["a"].data_ptr() < end for start, end in starts_and_ends)
    before = (tmp_path / "a.pth").read_bytes()
    found["a"].zero_()
    assert (tmp_path / "a.pth").read_bytes() == before


# --- other objects


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_tensors_beside_anything(zipped: bool, tmp_path: Path) -> None:
    state = dict(timm_vit().state_dict())
    settings = foreign("omegaconf.dictconfig.DictConfig", _content={"lr": foreign("omegaconf.nodes.AnyNode")})
    args = argparse.Namespace(output=pathlib.PosixPath("/runs"), best=np.float64(1), ids=np.arange(3), lr=0.1)
    content = {"model": state, "cfg": settings, "args": args, "dtype": torch.float32, "device": torch.device("cpu")}
    for name in ("omegaconf.dictconfig", "omegaconf.nodes"):
        assert name in sys.modules
    found, notice = read(tmp_path / "a.pth", content, zipped=zipped)
    for name in [name for name in sys.modules if name.partition(".")[0] == "omegaconf"]:
        del sys.modules[name]
    assert notice == f"ignored objects of omegaconf.dictconfig.DictConfig, {PATHS}.PosixPath"
    again, same_notice = read(tmp_path / "a.pth")
    assert same_notice == notice and "omegaconf" not in sys.modules
    assert same(found, {f"model.{name}": tensor for name, tensor in state.items()}) and same(again, found)


def test_the_notice_is_shown_wherever_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(
        {"model": timm_vit().state_dict(), "paths": [pathlib.PurePosixPath("a"), fuzz_pickles._Settings()]}, path
    )
    inspection, checkpoint = inspect_file(path), read_checkpoint(path)
    notice, heads = inspection.notices
    assert notice == f"ignored objects of {PATHS}.PurePosixPath, tests.fuzz_pickles._Settings"
    assert checkpoint.notices(inspection.architecture) == [f"{path}: {notice}", f"{path}: {heads}"]
    assert checkpoint.notices(BackboneArchitecture("test_convnext", 160)) == [f"{path}: {notice}"]
    assert checkpoint.fingerprint == read_checkpoint(plain(tmp_path)).fingerprint


def plain(folder: Path) -> Path:
    torch.save(timm_vit().state_dict(), folder / "plain.pth")
    return folder / "plain.pth"


class Model(nn.Module):
    """A module with parts of every kind; only parameters and persistent buffers are weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.rand(2, 3))
        self.register_parameter("none", None)
        self.register_buffer("kept", torch.rand(3))
        self.register_buffer("transient", torch.rand(3), persistent=False)
        self.mask = torch.rand(2)
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Sequential(nn.GELU(), nn.LayerNorm(3))])
        self.act, self.path = nn.functional.gelu, pathlib.PurePosixPath("a")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("make", [Model, timm_vit])
def test_whole_modules(make: Any, zipped: bool, tmp_path: Path) -> None:
    module = make()
    found, notice = read(tmp_path / "a.pt", module, zipped=zipped)
    assert same(found, module.state_dict()) and notice == ""
    wrapped, notice = read(tmp_path / "b.pt", {"model": module, "epoch": 3}, zipped=zipped)
    assert same(wrapped, {f"model.{name}": tensor for name, tensor in module.state_dict().items()}) and notice == ""


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_protocol_of_pickle(protocol: int, zipped: bool, tmp_path: Path) -> None:
    path, module = tmp_path / "a.pt", Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects protocol 2
        content = {"model": module, "set": {1}, "bytes": b"a", "long": 2**70, "text": "\xe9\n", "path": module.path}
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found, notice = read(path)
    assert same(found, {f"model.{name}": tensor for name, tensor in module.state_dict().items()})
    assert notice == f"ignored objects of {PATHS}.PurePosixPath"


class Attention(nn.Module):
    """A CLIP block, whose mask is not a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ln_1 = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)
        self.mask = torch.zeros(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.ln_1(tokens)
        return tokens + self.attn(normed, normed, normed, need_weights=False, attn_mask=self.mask)[0]


class Clip(nn.Module):
    """A model like OpenAI's archives: parameters of the module itself, numbers as buffers, blocks with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.blocks = nn.Conv2d(3, 8, 4, 4, bias=False), nn.Sequential(Attention(), Attention())
        self.positional_embedding, self.logit_scale = nn.Parameter(torch.rand(4, 8)), nn.Parameter(torch.ones([]))
        self.register_buffer("input_resolution", torch.tensor(8))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.visual(images).flatten(2).permute(2, 0, 1) + self.positional_embedding[:, None]
        return self.blocks(tokens) * self.logit_scale.exp()


@pytest.mark.parametrize(("make", "side"), [(Clip, 8), (timm_vit, 16)])
def test_torchscript(make: Any, side: int, tmp_path: Path) -> None:
    module, path = make().eval(), tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, torch.zeros(1, 3, side, side)).save(str(path))
    found, notice = read(path)
    expected = module.state_dict()
    assert same({name: found[name] for name in expected}, expected) and found.keys() == expected.keys()
    assert notice == ""
    if make is timm_vit:
        assert inspect_file(path).architecture.depth == 3


# --- what is not evaluated


class Marked(Tensor):
    """A tensor subclass, whose values may mean anything."""


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch may deprecate quantised tensors
    QUANTISED = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"w": torch.ones(3).as_subclass(Marked)}, "Marked"),
        ({"w": QUANTISED}, "_rebuild_qtensor"),
        ({"w": torch.eye(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"w": torch.ones(2, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj()}, "_rebuild_tensor_v2"),
        ({"w": np.ones(3)}, "numpy.ndarray"),
        (fuzz_pickles._Settings(), "tests.fuzz_pickles._Settings"),
    ],
)
def test_what_only_its_library_can_read_is_named(content: Any, name: str, zipped: bool, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / "a.pt")
    assert name in message and "state_dict" in message
    found, notice = read(tmp_path / "b.pt", {"a": torch.ones(2), "b": content}, zipped=zipped)
    assert list(found) == ["a"] and (name in notice or "numpy" in name)
