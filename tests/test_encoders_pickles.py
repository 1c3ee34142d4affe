"""Files of torch are read as data: plain tensors are found beside anything, and nothing that a pickle names runs."""

import argparse
import collections
import copy
import io
import os
import pathlib
import pickle
import subprocess
import sys
import types
import warnings
import zipfile
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
from mimref.encoders.torch_files import read_torch_file
from mimref.errors import CheckpointError
from tests import fuzz_pickles
from tests.checkpoints import LAYOUTS, timm_vit
from tests.fuzz_pickles import FRAGMENTS, SENTINEL, operations, save, split, with_pickle

PATHS = pathlib.PurePosixPath.__module__
"""Where Python has its paths: in 3.13, this is `pathlib._local`."""


def read(path: Path, content: Any = None, *, zipped: bool = True) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file and its notice; of `content`, which is saved first, if it is given."""
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
    """The same names in the same order, values bit for bit, types and strides."""
    return list(found) == list(expected) and all(
        left.dtype == right.dtype and left.stride() == right.stride() and torch.equal(left, right.detach())
        for left, right in zip(found.values(), expected.values(), strict=True)
    )


def foreign(name: str, **attributes: Any) -> Any:
    """An object of a class that is not there when the file is read."""
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
    """Parts of every kind; only parameters and persistent buffers are weights."""

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
    """A block of CLIP: the mask is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ln_1 = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)
        self.mask = torch.zeros(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.ln_1(tokens)
        return tokens + self.attn(normed, normed, normed, need_weights=False, attn_mask=self.mask)[0]


class Clip(nn.Module):
    """As OpenAI's archives: parameters of the module itself, numbers as buffers, blocks with masks."""

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
    """A subclass, whose values may mean anything."""


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch may give them up
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


def test_names_of_classes_are_shown_in_plain_letters(tmp_path: Path) -> None:
    evil = b"\x8c\x08a\n\x1b[2J;b\x8c\x03\xe2\x80\xae\x93)R"
    path = write(tmp_path, b"\x80\x04}(S'a'\n" + evil + b"S'w'\n" + TENSOR + b"u.")
    assert read(path)[1] == "ignored objects of a...2J.b.."


def test_long_lists_of_classes_are_shortened(tmp_path: Path) -> None:
    many = b"".join(b"S'k%d'\ncforeign\nC%d\n)R" % (number, number) for number in range(9))
    path = write(tmp_path, b"\x80\x02}(S'w'\n" + TENSOR + many + b"u.")
    assert read(path)[1] == "ignored objects of foreign.C0, foreign.C1, foreign.C2 and 6 more"


# --- hostile files

TENSOR = fuzz_pickles._TENSOR % (b"K\x01t", b"K\x01t")
SEED = save({"w": torch.ones(4), "x": torch.zeros(2)})


def write(folder: Path, content: bytes) -> Path:
    """A zip archive with this pickle, and a storage 0 of 4 numbers."""
    (folder / "a.pth").write_bytes(with_pickle(SEED, content))
    return folder / "a.pth"


def test_the_fragments_are_hostile() -> None:
    pickle.loads(FRAGMENTS["reduce"] + b".")
    assert SENTINEL.exists()
    SENTINEL.unlink()


@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragments_run_nothing(name: str, tmp_path: Path) -> None:
    """As an item of a good file, before its tensors, and alone."""
    modules = set(sys.modules)
    for seed in fuzz_pickles.seeds():
        _, good, join = split(seed)
        parts = operations(good)
        for changed in (
            b"".join(parts[:-1]) + b"S'item'\n" + FRAGMENTS[name] + b"s.",
            parts[0] + FRAGMENTS[name] + b"0" + b"".join(parts[1:]),
            FRAGMENTS[name] + b".",
        ):
            (tmp_path / "a.pth").write_bytes(join(changed))
            try:
                read(tmp_path / "a.pth")
            except CheckpointError as error:
                assert str(error).isprintable()
                assert not isinstance(error.__cause__, MemoryError | RecursionError | TypeError | AttributeError)
    assert not SENTINEL.exists() and "this" not in sys.modules
    assert {name for name in sys.modules if not name.startswith("encodings.")} <= modules


INERT = """
reduce, reduce by stack, eval, exec, import, global only, getattr, dotted name, newobj, newobj with keywords, instance,
object, call of an object, call of a string, call without a tuple, torch.load, hub, reconstructor, nested newobj,
rebuild of a type, factory, extension, setstate, slots, state of a dictionary, state of a class, state of a function,
state of a list, memo, text memo, call of bytearray, range, source, deep lists, deep tuples, deep objects, own list,
own dictionary, own state, module inside itself, key is an object, key is a list, keys that collide, set, frozen set
"""


@pytest.mark.parametrize("name", INERT.replace("\n", " ").strip().split(", "))
def test_weights_beside_inert_objects_are_read(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, b"\x80\x02}S'w'\n" + TENSOR + b"sS'item'\n" + FRAGMENTS[name] + b"s.")
    found, _ = read(path)
    assert list(found) == ["w"] and found["w"].tolist() == [1]


def test_states_change_no_real_object(tmp_path: Path) -> None:
    path = write(tmp_path, b"\x80\x02}S'w'\n" + FRAGMENTS["state of a tensor"] + b"s.")
    found, _ = read(path)
    assert type(found["w"]) is Tensor and found["w"]._backward_hooks is None and not found["w"].__dict__


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stride 0", "many times the file's size"),
        ("overlap", "many times the file's size"),
        ("negative size", "damaged shape"),
        ("dimensions", "damaged shape"),
        ("storage", "larger than the one saved"),
        ("storage elsewhere", "etc/passwd"),
        ("bad storage", "something else than a storage"),
        ("laughs", "nested too deep, or without end"),
        ("names that cannot be printed", "cannot be printed"),
        ("surrogate", "cannot be printed"),
        ("buffer", "NEXT_BUFFER"),
        ("items of a number", "items of a int"),
    ],
)
def test_damage_is_refused_with_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path, b"\x80\x02}S'w'\n" + TENSOR + b"sS'item'\n" + FRAGMENTS[name] + b"s.")
    assert reason in refusal(path)


@pytest.mark.parametrize(("items", "call"), [(b"l", b"(h\x01tR0"), (b"t", b"h\x01R0")])
def test_too_many_objects(items: bytes, call: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that go through the same list or arguments again and again are counted, too."""
    monkeypatch.setattr("mimref.encoders.values._MOST_OBJECTS", 3000)
    start = b"\x80\x02(" + b"N" * 300 + items + b"q\x010"
    call = b"ccollections\nOrderedDict\n" + call
    assert "holds no tensors" in refusal(write(tmp_path, start + call + b"N."))
    assert "more than 3,000 objects" in refusal(write(tmp_path, start + 20 * call + b"N."))


def test_an_extension_registered_in_this_process_is_not_used(tmp_path: Path) -> None:
    import copyreg

    copyreg.add_extension("os", "system", 1)
    try:
        pickled = FRAGMENTS["extension"] + b"(" + fuzz_pickles._TOUCH + b"tR"
        found, notice = read(write(tmp_path, b"\x80\x02}S'w'\n" + TENSOR + b"sS'item'\n" + pickled + b"s."))
        assert list(found) == ["w"] and notice.endswith("copyreg.extension_1") and not SENTINEL.exists()
    finally:
        copyreg.remove_extension("os", "system", 1)


# --- archives


def test_archives_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(io.BytesIO(SEED)) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w") as target:  # storages are not aligned
        for name, content in members.items():
            target.writestr(name, content)
    assert read(path)[0]["w"].tolist() == [1, 1, 1, 1]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in members.items():
            target.writestr(name, content)
    assert "compressed" in refusal(path)
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("a/b.txt", "text")
    assert "without data.pkl" in refusal(path)
    with zipfile.ZipFile(path, "w") as target:
        for name, content in members.items():
            swapped = np.frombuffer(content, np.float32).byteswap().tobytes() if "/data/" in name else content
            target.writestr(name, b"big" if name.endswith("byteorder") else swapped)
    assert read(path)[0]["w"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("order", "place"), [(b"little", 0), (b"little", 1), (b"big", 0)])
def test_overlapping_storages_are_not_copied_without_end(order: bytes, place: int, tmp_path: Path) -> None:
    """A hundred members of one place. Copied is what is not aligned, or has its bytes in another order."""
    items = [b"S'w%d'\n" % key + TENSOR.replace(b"S'0'", b"S'%d'" % key) for key in range(100)]
    pickled = b"\x80\x02}(" + b"".join(items) + b"u."
    start = 3 * 30 + len("a/data.pkl") + len(pickled) + len("a/byteorder") + len(order) + len("a/data/0")
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", pickled + bytes((place - start) % 8))
        archive.writestr("a/byteorder", order)
        archive.writestr("a/data/0", bytes(4000))
        for key in range(1, 100):
            again = copy.copy(archive.getinfo("a/data/0"))
            again.filename = f"a/data/{key}"
            archive.filelist.append(again)
    if order == b"little" and place == 0:
        assert len(read(tmp_path / "a.pth")[0]) == 100
    else:
        assert "overlap" in refusal(tmp_path / "a.pth")


def test_old_files_with_lists_of_other_storages(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[:-24] + b"\xff" + content[-23:])
    assert "other lengths" in refusal(path)
    path.write_bytes(content[:-1])
    assert "end too early" in refusal(path)


def test_a_tar_archive_is_no_checkpoint(tmp_path: Path) -> None:
    """The format before torch 0.2, which torch.load unpacks."""
    import tarfile

    (tmp_path / "storages").symlink_to("/etc/passwd")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "storages", "storages")
    assert "not a checkpoint" in refusal(tmp_path / "a.tar")


def test_an_environment_that_asks_for_code_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = write(tmp_path, b"\x80\x02}S'w'\n" + TENSOR + b"sS'item'\n" + FRAGMENTS["reduce"] + b"s.")
    assert list(read_torch_file(path)[0]) == ["w"] and not SENTINEL.exists()


_UNSAFE = """
import pathlib, sys, torch
from tests import fuzz_pickles as fuzz
fuzz.read = lambda path: "read" if torch.load(path, weights_only=False) else "refused"
_, pickle, join = fuzz.split(fuzz.seeds()[0])
files = [(name, join(fuzz.FRAGMENTS[name] + b"0" + pickle)) for name in ("reduce", "import", "eval")]
print(fuzz.run(iter(files), pathlib.Path(sys.argv[1]), fuzz.Watch()))
fuzz.SENTINEL.unlink()
"""


def test_the_watch_notices_a_reader_that_runs_code(tmp_path: Path) -> None:
    line = [sys.executable, "-W", "ignore", "-c", _UNSAFE, str(tmp_path / "a.pth")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.count("ran something") == 3, done.stdout + done.stderr
    assert "os.system" in done.stdout and "'this'" in done.stdout and "open (" in done.stdout


def test_300_changed_files() -> None:
    """In a process of its own, which watches for every event of Python's audit."""
    script = Path(fuzz_pickles.__file__)
    line = [sys.executable, str(script), "--files", "300", "--seed", "1"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0 and " 0 failed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
