"""Hostile and damaged torch files: weights beside inert objects are read, all else is one error line, nothing runs."""

import copy
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mimref.encoders.reading import named_tensors, read_file
from mimref.encoders.torch_files import read_torch_file
from mimref.errors import CheckpointError
from tests import fuzz_pickles
from tests.fuzz_pickles import FRAGMENTS, SENTINEL, operations, save, split, with_pickle


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and its notice."""
    _, content, _, notices = read_file(path)
    return dict(named_tensors(content)), "".join(notices)


def refusal(path: Path) -> str:
    """The message of the refusal, which must be one line."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 600
    return message


TENSOR = fuzz_pickles._TENSOR % (b"K\x01t", b"K\x01t")
SEED = save({"w": torch.ones(4), "x": torch.zeros(2)})


def write(folder: Path, content: bytes) -> Path:
    """Write a zip archive with this pickle and a storage 0 of 4 numbers; return its path."""
    (folder / "a.pth").write_bytes(with_pickle(SEED, content))
    return folder / "a.pth"


def test_names_of_classes_are_shown_in_plain_letters(tmp_path: Path) -> None:
    evil = b"\x8c\x08a\n\x1b[2J;b\x8c\x03\xe2\x80\xae\x93)R"
    path = write(tmp_path, b"\x80\x04}(S'a'\n" + evil + b"S'w'\n" + TENSOR + b"u.")
    assert read(path)[1] == "ignored objects of a...2J.b.."


def test_long_lists_of_classes_are_shortened(tmp_path: Path) -> None:
    many = b"".join(b"S'k%d'\ncforeign\nC%d\n)R" % (number, number) for number in range(9))
    path = write(tmp_path, b"\x80\x02}(S'w'\n" + TENSOR + many + b"u.")
    assert read(path)[1] == "ignored objects of foreign.C0, foreign.C1, foreign.C2 and 6 more"


def test_the_fragments_are_hostile() -> None:
    pickle.loads(FRAGMENTS["reduce"] + b".")
    assert SENTINEL.exists()
    SENTINEL.unlink()


@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragments_run_nothing(name: str, tmp_path: Path) -> None:
    """Neither as an item of a good file, nor before its tensors, nor alone."""
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
    """Calls that iterate over the same list or arguments again and again count, too."""
    monkeypatch.setattr("mimref.encoders.values._MOST_OBJECTS", 3000)
    start = b"\x80\x02(" + b"N" * 300 + items + b"q\x010"
    call = b"ccollections\nOrderedDict\n" + call
    assert "no named tensors" in refusal(write(tmp_path, start + call + b"N."))
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
    with zipfile.ZipFile(path, "w") as target:  # leaves storages unaligned
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
    """A hundred members share one place. Unaligned or byte-swapped ones need copies and are refused."""
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
    """The format from before torch 0.2, which torch.load unpacks."""
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
    done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.count("ran something") == 3, done.stdout + done.stderr
    assert "os.system" in done.stdout and "'this'" in done.stdout and "open (" in done.stdout


def test_300_changed_files() -> None:
    """Runs in a process of its own that watches every Python audit event."""
    script = Path(fuzz_pickles.__file__)
    line = [sys.executable, str(script), "--files", "300", "--seed", "1"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0 and " 0 failed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
