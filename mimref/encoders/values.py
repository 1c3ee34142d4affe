"""What a pickle may build: plain values and dense tensors, by functions of this module; all else is `Inert`.

A pickle names classes and functions, and passes them any arguments. Here, a name is only text. What a file can build is
bounded: tensors share its memory, and everything that is counted has a limit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOST_OBJECTS = 10_000_000  # the optimizer state of a thousand tensors has 100,000
_MOST_DIMENSIONS = 64


class Unreadable(Exception):
    """A file cannot be read; the message is the reason, in one line without the file's name."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """The name of a class or a function, which is never looked up."""

    name: str
    """Module and name, with a space between them."""


@dataclass(slots=True, eq=False)
class Inert:
    """Stands in for the result of calling a class or function, which is never called."""

    name: str
    """Module and name of the class or function, with a space between them."""
    args: Any = ()
    state: Any = None
    items: dict[str, Any] | None = None
    """Items under string keys, if the object is a mapping."""


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Numbers of one type, or bytes, in the file's memory."""

    memory: torch.UntypedStorage
    dtype: torch.dtype


LoadStorage = Callable[[str, int, torch.dtype], torch.UntypedStorage]
"""Returns the storage of a key, for a count of numbers of a type. Raises Unreadable if the file holds fewer."""

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64, "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8, "QUInt8Storage": torch.quint8, "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2, "QUInt2x4Storage": torch.quint2x4,
}  # fmt: skip
_STORAGE_TYPES = {f"{module} {name}": _STORAGES[name] for module in ("torch", "torch.cuda") for name in _STORAGES}
_STORAGE_TYPES["torch.storage UntypedStorage"] = torch.uint8
_QUANTISED = {dtype for name, dtype in _STORAGES.items() if name.startswith("Q")}
DTYPES = {
    f"torch {name}": getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex128",
        "complex64", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    )
}  # fmt: skip


class Values:
    """Builder of the values of one file.

    load_storage: provides the tensors' numbers. most_bytes: the limit for the sum of all tensors' logical sizes, as
    expanded tensors may repeat a few numbers without end.
    """

    def __init__(self, load_storage: LoadStorage, most_bytes: int) -> None:
        self._load_storage = load_storage
        self._bytes_left, self._objects_left = most_bytes, _MOST_OBJECTS

    def spend_objects(self, count: int) -> None:
        """Count objects that are created or iterated over. Raises Unreadable above the limit."""
        self._objects_left -= count
        if self._objects_left < 0:
            raise Unreadable(f"its pickle holds more than {_MOST_OBJECTS:,} objects")

    def call(self, called: Any, args: Any) -> Any:
        """Return the result of a call: a plain value for the few known functions, otherwise an inert object."""
        if type(called) is Global and type(args) is tuple and called.name in _BUILDERS:
            self.spend_objects(len(args))
            built = _BUILDERS[called.name](self, *args)
            return Inert(called.name, args) if built is None else built
        name = called.name if isinstance(called, Global | Inert) else f"builtins {type(called).__name__}"
        return Inert(name, args)

    def resolve(self, identity: Any) -> Any:
        """Return a storage by its persistent identity, or a class that an old format saves with its source code."""
        if type(identity) is tuple and len(identity) >= 2 and identity[0] == "module":
            return identity[1]
        if type(identity) is not tuple or len(identity) < 5 or identity[0] != "storage":
            raise Unreadable("its pickle refers to something else than a storage")
        kind, key, _, count, *views = identity[1:]
        if type(kind) is not Global or type(key) is not str or not _is_size(count):
            raise Unreadable("its pickle refers to a storage by a damaged name")
        dtype = _STORAGE_TYPES.get(kind.name)
        if dtype is None:
            return Inert(kind.name)
        memory = self._load_storage(key, count, dtype)
        view = views[0] if views else None
        if view is not None:
            if type(view) is not tuple or len(view) != 3 or not _are_sizes(view[1:]) or view[1] + view[2] > count:
                raise Unreadable("its pickle refers to a part of a storage that does not exist")
            memory = memory[view[1] * dtype.itemsize : (view[1] + view[2]) * dtype.itemsize]
        return Storage(memory, dtype)

    # --- the known functions; they return None for arguments that are not plain, so that the result is inert

    def _build_dict(self, items: Any = (), *_: object) -> dict[str, Any] | None:
        if type(items) is dict:
            return items
        if type(items) is not list:
            return {}
        self.spend_objects(len(items))
        pairs = [pair for pair in items if type(pair) in (list, tuple) and len(pair) == 2]
        return {key: value for key, value in pairs if type(key) is str}

    def _build_defaultdict(self, _: object = None, items: Any = (), *__: object) -> dict[str, Any] | None:
        return self._build_dict(items)

    def _build_list(self, items: Any = (), *_: object) -> list[Any] | None:
        return items if type(items) is list else []

    def _build_parameter(self, data: Any = None, *_: object) -> Tensor | None:
        return data if isinstance(data, Tensor) else None

    def _build_old_tensor(self, storage: Any = None, *layout: object) -> Tensor | None:
        return self._dense(storage, None, *layout) if len(layout) == 3 else None

    def _build_tensor(self, storage: Any = None, *layout: object) -> Tensor | None:
        # layout: offset, size, stride, whether it requires a gradient, hooks, and flags such as a lazy conjugation.
        return self._dense(storage, None, *layout[:3]) if len(layout) >= 5 and not any(layout[5:]) else None

    def _build_tensor_of_dtype(self, storage: Any = None, *layout: object) -> Tensor | None:
        kind = layout[5] if len(layout) >= 6 and not any(layout[6:]) else None
        dtype = DTYPES.get(kind.name) if type(kind) is Global else None
        return self._dense(storage, dtype, *layout[:3]) if dtype else None

    def _build_attributed(
        self, build: Any = None, kind: Any = None, args: Any = None, *_: object
    ) -> Tensor | Inert | None:
        """Build a tensor with attributes; one of a class other than torch's own becomes inert."""
        if type(build) is not Global or type(kind) is not Global or type(args) is not tuple:
            return None
        if kind.name in _TENSOR_CLASSES and build.name in _TENSOR_BUILDERS:
            tensor: Tensor | None = _TENSOR_BUILDERS[build.name](self, *args)
            return tensor
        return Inert(kind.name, args)

    def _build_object(self, kind: Any = None, *args: object) -> Inert | None:
        return Inert(kind.name, args) if type(kind) is Global else None

    def _dense(self, storage: Any, dtype: torch.dtype | None, offset: Any, size: Any, stride: Any) -> Tensor | None:
        if type(storage) is not Storage or storage.dtype in _QUANTISED:
            return None
        dtype = dtype or storage.dtype
        if not _is_size(offset) or not _are_sizes(size) or not _are_sizes(stride) or len(size) != len(stride):
            raise Unreadable("its pickle holds a tensor of a damaged shape")
        count = math.prod(size)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else 0
        if last >= storage.memory.nbytes() // dtype.itemsize and count:
            raise Unreadable("its pickle holds a tensor larger than the numbers saved for it")
        self._bytes_left -= count * dtype.itemsize
        if self._bytes_left < 0:
            raise Unreadable("its tensors repeat their numbers to many times the file's size")
        if not count:
            return torch.empty(size, dtype=dtype)
        return torch.empty(0, dtype=dtype).set_(storage.memory, offset, size, stride)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_sizes(values: Any) -> bool:
    return type(values) is tuple and len(values) <= _MOST_DIMENSIONS and all(map(_is_size, values))


_Build = Callable[..., Any]
_TENSOR_CLASSES = frozenset(("torch Tensor", "torch._tensor Tensor", "torch.nn.parameter Parameter"))
_TENSOR_BUILDERS: dict[str, _Build] = {
    "torch._utils _rebuild_tensor": Values._build_old_tensor,
    "torch._utils _rebuild_tensor_v2": Values._build_tensor,
    "torch._utils _rebuild_tensor_v3": Values._build_tensor_of_dtype,
}
_BUILDERS: dict[str, _Build] = {
    **_TENSOR_BUILDERS,
    "torch._utils _rebuild_parameter": Values._build_parameter,
    "torch._utils _rebuild_parameter_with_state": Values._build_parameter,
    "torch._tensor _rebuild_from_type_v2": Values._build_attributed,
    "torch.tensor _rebuild_from_type_v2": Values._build_attributed,
    "collections OrderedDict": Values._build_dict,
    "collections Counter": Values._build_dict,
    "collections defaultdict": Values._build_defaultdict,
    **{f"{module} dict": Values._build_dict for module in ("builtins", "__builtin__")},
    **{f"{module} set": Values._build_list for module in ("builtins", "__builtin__")},
    **{
        f"{module} {name}": Values._build_object
        for module in ("copyreg", "copy_reg")
        for name in ("_reconstructor", "__newobj__", "__newobj_ex__")
    },
}  # fmt: skip
