"""Read thousands of damaged and hostile weights files, and fail unless each is read or refused in one line.

    python tests/fuzz_pickles.py --files 10000 --seed 0

The files are tiny checkpoints in every format of torch with changed pickles: flipped bytes, swapped and repeated
operations, truncation, and fragments that import, call, allocate or recurse. Anything but an encoder or a
CheckpointError is a failure, as are 5 seconds or 500 MB for one file, and every import, program call or written file.
"""

import argparse
import codecs
import collections
import functools
import io
import itertools
import os
import pathlib
import pickletools
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import torch
from torch import nn

from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import CheckpointError

MOST_SECONDS, MOST_MB = 5, 500
SENTINEL = pathlib.Path(tempfile.gettempdir()) / f"mimref-sentinel-{os.getpid()}"

_TOUCH = f"S'touch {SENTINEL}'\n".encode()
_STORAGE = b"(S'storage'\nctorch\nFloatStorage\nS'%s'\nS'cpu'\nL%dL\ntQ"
_HOOKS = b"ccollections\nOrderedDict\n)R"
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + _STORAGE % (b"0", 1) + b"K\x00(%s(%sN" + _HOOKS + b"tR"
_OBJECT = b"cforeign\nClass\n)\x81"

FRAGMENTS = {
    # --- calls
    "reduce": b"cos\nsystem\n(" + _TOUCH + b"tR",
    "reduce by stack": b"\x8c\x05posix\x8c\x06system\x93(" + _TOUCH + b"tR",
    "eval": b"c__builtin__\neval\n(" + f"S'open(\"{SENTINEL}\", \"w\")'\n".encode() + b"tR",
    "exec": b"cbuiltins\nexec\n(S'import this'\ntR",
    "import": b"cbuiltins\n__import__\n(S'this'\ntR",
    "global only": b"cthis\ns\n",
    "getattr": b"cbuiltins\ngetattr\n(cos\npath\nS'os'\ntR(" + _TOUCH + b"tR",
    "dotted name": b"\x8c\x05torch\x8c\x0eos.path.exists\x93(" + _TOUCH + b"tR",
    "newobj": b"csubprocess\nPopen\n(" + _TOUCH + b"t\x81",
    "newobj with keywords": b"csubprocess\nPopen\n(" + _TOUCH + b"t}S'shell'\nIs\x92".replace(b"Is", b"\x88s"),
    "instance": b"(" + _TOUCH + b"ios\nsystem\n",
    "object": b"(cos\nsystem\n" + _TOUCH + b"o",
    "object of no class": b"(o",
    "call of an object": _OBJECT + b"(" + _TOUCH + b"tR",
    "call of a string": b"S'system'\n(K\x01tR",
    "call without a tuple": b"cos\nsystem\nNR",
    "torch.load": b"ctorch\nload\n(S'/etc/passwd'\ntR",
    "hub": b"ctorch.hub\nload\n(S'a/b'\nS'c'\ntR",
    "load from bytes": b"ctorch.storage\n_load_from_bytes\n(C\x03abctR",
    "reconstructor": b"ccopyreg\n_reconstructor\n(cos\nsystem\ncos\nsystem\n" + _TOUCH + b"tR",
    "nested newobj": b"ccopyreg\n__newobj__\n(" + 300 * b"ccopyreg\n__newobj__\n" + b"tR",
    "rebuild of a type": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n(" + _TOUCH + b"tNtR",
    "factory": b"ccollections\ndefaultdict\n(cos\nsystem\ntR",
    "extension": b"\x82\x01",
    "extensions": b"\x83\x01\x00\x84\xff\xff\xff\x7f",
    # --- states
    "setstate": _OBJECT + b"}(S'__setstate__'\ncos\nsystem\nS'__reduce__'\ncos\nsystem\nub",
    "slots": _OBJECT + b"N}(S'a'\nK\x01u\x86b",
    "state of a dictionary": b"ccollections\nOrderedDict\n)R}(S'__class__'\ncos\nsystem\nS'__dict__'\n}ub",
    "state of a tensor": _TENSOR % (b"K\x01t", b"K\x01t") + b"}(S'_backward_hooks'\ncos\nsystem\nS'__class__'\nNub",
    "state of a class": b"cbuiltins\ndict\n}(S'__reduce__'\nNub",
    "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}(S'__code__'\nNub",
    "state of a list": b"]}S'a'\nNsb",
    # --- sizes
    "memo": b"Nr\xff\xff\xff\xff",
    "text memo": b"Np999999999999999999999\n",
    "bytes": b"\x8e" + b"\xff" * 7 + b"\x7f",
    "short bytes": b"B\xff\xff\xff\xff",
    "string": b"X\xff\xff\xff\xff",
    "long string": b"\x8d" + b"\xff" * 8,
    "bytearray": b"\x96" + struct.pack("<Q", 2**40),
    "integer": b"\x8b\xff\xff\xff\x7f",
    "negative integer": b"\x8b\xff\xff\xff\xff",
    "decimals": b"L" + b"9" * 5000 + b"L\n",
    "quotes": b"S" + b"a" * 100_000 + b"\n",
    "no number": b"F" + b"a" * 100_000 + b"\n",
    "long name": b"X\x20\x4e\x00\x00" + b"a" * 20_000 + b"2\x93",
    "long arguments": b"(" + b"N" * 2_000 + b"tq\xf5" + b"ccollections\nOrderedDict\nh\xf5R0" * 60,
    "call of bytearray": b"cbuiltins\nbytearray\n(L1000000000000L\ntR",
    "range": b"cbuiltins\nlist\n(cbuiltins\nrange\n(L1000000000000L\ntRtR",
    "storage": _STORAGE % (b"0", 10**14),
    "negative storage": _STORAGE % (b"0", -1),
    "storage elsewhere": _STORAGE % (b"../../../../etc/passwd", 1),
    "missing storage": _STORAGE % (b"77777", 1),
    "stride 0": _TENSOR % (b"L1000000000000L\nt", b"K\x00t"),
    "overlap": _TENSOR % (b"L9000000000L\nL9000000000L\nt", b"K\x00K\x00t"),
    "negative size": _TENSOR % (b"L-1L\nt", b"K\x01t"),
    "negative stride": _TENSOR % (b"K\x02t", b"L-1L\nt"),
    "no numbers": _TENSOR % (b"K\x00L9223372036854775807L\nL9223372036854775807L\nt", b"K\x01K\x01K\x01t"),
    "sizes that are no numbers": _TENSOR % (b"S'a'\nt", b"Nt"),
    "dimensions": _TENSOR % (200 * b"K\x01" + b"t", 200 * b"K\x01" + b"t"),
    # --- names
    "bad storage": b"NQ",
    "text storage": b"Pabc\n",
    "storage of a class": b"(S'storage'\ncos\nsystem\nS'0'\nS'cpu'\nK\x01tQ",
    "source": b"(S'module'\ncforeign\nClass\nS'/etc/passwd'\nS'source'\ntQ",
    "view": b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nK\x01(S'v'\nK\x00L99999999999L\nttQ",
    "no name": b"KK\x93".replace(b"KK", b"K\x01K\x02"),
    # --- structure
    "deep lists": b"]" * 5000 + b"a" * 4999,
    "deep tuples": b")" + b"\x85" * 5000,
    "deep dictionaries": b"}S'a'\n" * 500 + b"}" + b"s" * 500,
    "deep objects": (_OBJECT) * 500 + b"b" * 499,
    "own list": b"]q\xf0h\xf0a",
    "own dictionary": b"}q\xf1S'a'\nh\xf1sS'b'\nh\xf1s",
    "own state": _OBJECT + b"q\xf2h\xf2b",
    "laughs": b"}S'w'\n" + _TENSOR % (b"K\x01t", b"K\x01t") + b"s" + b"q\xf30}S'a'\nh\xf3sS'b'\nh\xf3s" * 60,
    "module inside itself": _OBJECT + b"q\xf4}(S'_parameters'\n}S'_buffers'\n}S'_modules'\n}S'm'\nh\xf4sub",
    "key is an object": b"}" + _OBJECT + b"Ns",
    "key is a list": b"}]Ns",
    "keys that collide": b"}(" + b"".join(b"L%dL\nN" % (k * (2**61 - 1)) for k in range(1, 300)) + b"u",
    "items of an object": _OBJECT + b"(S'weight'\n" + _TENSOR % (b"K\x01t", b"K\x01t") + b"u",
    "items of a number": b"K\x01S'a'\nNs",
    "odd items": b"}(Nu",
    "append to a number": b"K\x01Na",
    "set": b"\x8f(K\x01]\x90",
    "frozen set": b"(K\x01]\x91",
    "names that cannot be printed": b"}X\x03\x00\x00\x00\x1b[J" + _TENSOR % (b"K\x01t", b"K\x01t") + b"s",
    "surrogate": b"}V\\ud800\n" + _TENSOR % (b"K\x01t", b"K\x01t") + b"s",
    "buffer": b"\x97",
    "read-only buffer": b"N\x98",
    "mark": b"(",
    "marks": b"(" * 1000,
    "pop": b"0",
    "pop mark": b"1",
    "duplicate": b"2",
    "stop": b".",
    "protocol": b"\x80\xff",
    "frame": b"\x95" + b"\xff" * 8,
}  # fmt: skip


# --- files


class _Settings:
    """Stands in for a class that the reader does not know."""

    def __init__(self) -> None:
        self.path, self.lr, self.history = pathlib.PurePosixPath("/runs"), np.float64(0.1), np.arange(3)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 3), nn.GELU())
        self.register_buffer("scale", torch.ones(3))
        self.act = functools.partial(nn.functional.gelu)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images) * self.scale


def save(content: object, **options: bool) -> bytes:
    """Return the bytes that torch.save writes."""
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def seeds() -> list[bytes]:
    """Return intact files in every format."""
    torch.manual_seed(0)
    vit = build_encoder(Architecture("custom", 8, width=64, depth=1, num_heads=1, patch_size=4)).vit
    training = {
        "model": vit.state_dict(), "args": argparse.Namespace(settings=_Settings()), "epoch": 3,
        "losses": collections.defaultdict(list, {"a": [1.0, 2.0]}), "optimizer": {"state": {0: {"step": 1}}},
        "shared": [torch.ones(4).expand(3, 4), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))],
    }  # fmt: skip
    old = {"_use_new_zipfile_serialization": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about TorchScript
        stream = io.BytesIO()
        torch.jit.save(torch.jit.trace(_Model(), torch.zeros(2, 3)), stream)
        saved = [save(training), save(_Model()), save(training, **old), save(_Model(), **old)]
    return [*saved, stream.getvalue()]


def with_pickle(archive: bytes, pickle: bytes) -> bytes:
    """Return a zip archive with another data.pkl."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(changed, "w") as target:
        for member in source.infolist():
            is_pickle = member.filename.endswith("/data.pkl")
            target.writestr(member, pickle if is_pickle else source.read(member))
    return changed.getvalue()


def split(file: bytes) -> tuple[bytes, bytes, Callable[[bytes], bytes]]:
    """Return the header before the main pickle, the pickle, and a function that makes a file from a changed pickle."""
    if file.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(file)) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return b"", archive.read(name), functools.partial(with_pickle, file)
    stream = io.BytesIO(file)
    for _ in range(3):
        collections.deque(pickletools.genops(stream), maxlen=0)
    start = stream.tell()
    collections.deque(pickletools.genops(stream), maxlen=0)
    header, rest = file[:start], file[stream.tell() :]
    return header, file[start : stream.tell()], lambda pickle: header + pickle + rest


def operations(pickle: bytes) -> list[bytes]:
    """Return the pickle's operations, each with its argument."""
    starts = [position for _, _, position in pickletools.genops(pickle)]
    return [pickle[start:end] for start, end in itertools.pairwise([*starts, len(pickle)])]


def mutations(draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield changed files endlessly, each with the kind of change."""
    files = [(file, *split(file)) for file in seeds()]
    parts = [operations(pickle) for _, _, pickle, _ in files]
    while True:
        number = draw.randrange(len(files))
        file, _, pickle, join = files[number]
        kind = draw.choice(("bytes", "operations", "fragment", "fragment", "fragments", "cut", "file", "cut file"))
        if kind in ("file", "cut file"):
            changed = flip(file, draw) if kind == "file" else file[: draw.randrange(len(file))]
            yield f"{kind} of {number}", changed
            continue
        if kind == "bytes":
            pickle = flip(pickle, draw)
        elif kind == "cut":
            pickle = pickle[: draw.randrange(len(pickle))]
        elif kind == "operations":
            pickle = b"".join(shuffle(parts[number], draw))
        else:
            kind, pickle = insert(parts[number], draw, 1 if kind == "fragment" else draw.randrange(2, 5))
        yield f"{kind} of {number}", join(pickle)


def flip(content: bytes, draw: random.Random) -> bytes:
    """Change a few bytes."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def shuffle(parts: list[bytes], draw: random.Random) -> list[bytes]:
    """Swap, repeat or drop operations, or change their codes."""
    changed = list(parts)
    for _ in range(draw.choice((1, 1, 2, 5))):
        left, right = draw.randrange(len(changed)), draw.randrange(len(changed))
        change = draw.randrange(4)
        if change == 0:
            changed[left], changed[right] = changed[right], changed[left]
        elif change == 1:
            changed.insert(left, changed[right])
        elif change == 2:
            del changed[left]
        else:
            changed[left] = draw.choice(pickletools.opcodes).code.encode("latin-1") + changed[left][1:]
    return changed


def insert(parts: list[bytes], draw: random.Random, count: int) -> tuple[str, bytes]:
    """Insert fragments between operations, with or without keeping their value, or as an item of the content."""
    changed, names = list(parts), []
    for _ in range(count):
        name = draw.choice(list(FRAGMENTS))
        names.append(name)
        if draw.randrange(3) == 0:
            changed.insert(len(changed) - 1, b"S'item'\n" + FRAGMENTS[name] + b"s")
        else:
            changed.insert(draw.randrange(len(changed)), FRAGMENTS[name] + draw.choice((b"", b"0")))
    return " and ".join(names), b"".join(changed)


# --- reading


class Watch:
    """Records audit events during a read that a reader of plain data has no reason to cause."""

    def __init__(self) -> None:
        self.active, self.seen = False, list[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[object, ...]) -> None:
        if not self.active:
            return
        harmless = event in ("mmap.__new__", "object.__getattr__", "sys._getframe", "builtins.id", "gc.collect")
        harmless = harmless or (event == "import" and str(args[0]).startswith("encodings."))
        if event == "open":
            mode, flags = args[1], args[2]
            harmless = mode in ("r", "rb", None) and not int(str(flags)) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not harmless:
            self.seen.append(f"{event} {args}"[:200])


class Hang(BaseException):
    """Raised when a file takes too long."""

    @classmethod
    def start(cls, *_: object) -> None:
        raise cls


def read(path: pathlib.Path) -> str:
    """Return `read` or `refused`; every other outcome is an exception."""
    try:
        checkpoint = read_checkpoint(path)
        for tensor in checkpoint.tensors.values():
            tensor.reshape(-1)[-1:].clone()  # fails if part of the memory is missing
        return "read"
    except CheckpointError as error:
        cause = error.__cause__
        assert str(error).isprintable() and len(str(error)) < 1000, "more than one line"
        assert not isinstance(cause, MemoryError | RecursionError) and "allocat" not in str(cause), repr(cause)
        return "refused"


def watched(path: pathlib.Path, watch: Watch) -> str:
    """Return the outcome of reading a file, or what went wrong."""
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    watch.active = True
    try:
        return read(path)
    except (Hang, Exception) as error:
        return "".join(traceback.format_exception(error, limit=-4))
    finally:
        watch.active = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def peak_mb() -> float:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(files: Iterator[tuple[str, bytes]], path: pathlib.Path, watch: Watch) -> tuple[collections.Counter[str], int]:
    """Return how many files were read and refused, and how many had another outcome; each of those is printed."""
    counts: collections.Counter[str] = collections.Counter()
    failures, modules, peak = 0, set(sys.modules), peak_mb()
    for number, (kind, content) in enumerate(files):
        path.write_bytes(content)
        outcome = watched(path, watch)
        new = {name for name in sys.modules if not name.startswith("encodings.")} - modules
        if watch.seen or new or SENTINEL.exists():
            outcome = f"ran something: {watch.seen} {sorted(new)} {SENTINEL.exists()}"
            watch.seen, modules = [], modules | new
        elif peak_mb() > peak + MOST_MB:
            outcome, peak = f"took {peak_mb() - peak:.0f} MB", peak_mb()
        counts[outcome] += outcome in ("read", "refused")
        if outcome not in ("read", "refused"):
            failures += 1
            print(f"file {number}, {kind}: {outcome}", flush=True)
    return +counts, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, Hang.start)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "weights.pth"
        for intact in seeds():  # libraries do their late imports here
            path.write_bytes(intact)
            assert read(path) == "read"
        for late in ("cp437", "raw_unicode_escape"):
            codecs.lookup(late)
        before, started = peak_mb(), time.monotonic()
        files = itertools.islice(mutations(random.Random(options.seed)), options.files)
        counts, failures = run(files, path, Watch())
    print(f"{dict(counts)}, {failures} failed; {time.monotonic() - started:.0f} s, {peak_mb() - before:+.0f} MB")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
