"""Named tensors in a pickle's value: in dictionaries, in modules, and in TorchScript modules.

Modules are recognised by their structure, since their classes are not known.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mimref.encoders.values import DTYPES, Global, Inert, Unreadable

Content = Mapping[Any, Any]
"""Nested mappings with tensors at the leaves, mapped into memory where the format allows it."""

_MOST_LEVELS, _MOST_REPEATS, _LONGEST_NAME = 100, 100_000, 1000
_SCRIPTED = ("__torch__ ", "__torch__.")
# Settings and numbers that public checkpoints hold beside tensors; they are left out without a notice.
_ARRAYS = frozenset(
    f"numpy{module} {name}"
    for module, name in (
        *((f".{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        *((f".{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        ("", "ndarray"),
    )
)
_COMMON = frozenset(
    f"{module} {name}"
    for modules, names in (
        (("builtins", "__builtin__"), ("set", "frozenset", "complex", "bytearray", "slice", "range", "list", "object")),
        (("collections",), ("deque",)),
        (("argparse",), ("Namespace",)),
        (("_codecs",), ("encode",)),
        (("numpy",), ("dtype",)),
        (("torch",), ("Size", "device", "strided", "dtype")),
        (("torch.serialization",), ("_get_layout",)),
        (("torch.jit._pickle",), ("build_intlist", "build_doublelist", "build_boollist", "restore_type_tag")),
    )
    for module in modules
    for name in names
)


def find_tensors(value: object, module_tensors: Mapping[str, frozenset[str]]) -> tuple[Content, list[str]]:
    """Return nested dictionaries of tensors under string keys, and names of classes from which no tensors were taken.

    module_tensors: the parameters and buffers of each TorchScript class; of other classes, all tensors are taken.
    """
    search = _Search(module_tensors)
    found = search.tree(value)
    if isinstance(found, dict):
        return found, list(search.ignored)
    return {}, list(search.ignored or search.arrays)


class _Search:
    def __init__(self, module_tensors: Mapping[str, frozenset[str]]) -> None:
        self._module_tensors = module_tensors
        self._repeats_left = _MOST_REPEATS
        self._seen: set[int] = set()
        self._open: set[int] = set()
        self._noted: set[int] = set()
        self._modules: dict[int, dict[str, Any] | None] = {}
        self.ignored: dict[str, None] = {}
        self.arrays: dict[str, None] = {}

    def tree(self, value: object, level: int = 0) -> dict[str, Any] | Tensor | None:
        """Return a tensor, or a dictionary with tensors below it; None for all else, whose classes are noted."""
        if isinstance(value, str | int | float | None):
            return None
        items = self._items(value)
        # A few dictionaries that hold each other twice can have more names than fit into memory.
        if id(value) in self._seen:
            self._repeats_left -= 1 + len(items or ()) // 64
        self._seen.add(id(value))
        if level > _MOST_LEVELS or self._repeats_left < 0:
            raise Unreadable("it is nested too deep, or without end")
        if isinstance(value, Tensor):
            return value
        if items is None:
            self._note(value)
            return None
        if id(value) in self._open:
            return None  # a dictionary inside itself
        self._open.add(id(value))
        found = {}
        for name, item in items.items():
            below = self.tree(item, level + 1)
            if below is None:
                continue
            if len(name) > _LONGEST_NAME or not name.isprintable():
                raise Unreadable("a tensor has a name that cannot be printed")
            found[name] = below
        self._open.remove(id(value))
        if not found:
            self._note(value)
        return found or None

    def _items(self, value: object) -> dict[str, Any] | None:
        """Return named items: those of a dictionary, even one of an unknown class, or the parts of a module."""
        if type(value) is dict:
            return value
        if type(value) is not Inert:
            return None
        if value.items is not None:
            return value.items
        if id(value) not in self._modules:
            self._modules[id(value)] = self._module_items(value)
        return self._modules[id(value)]

    def _module_items(self, value: Inert) -> dict[str, Any] | None:
        state = value.state
        if type(state) is not dict:
            return None
        if value.name.startswith(_SCRIPTED):
            return self._scripted(value.name, state)
        parameters, buffers, modules = (state.get(name) for name in ("_parameters", "_buffers", "_modules"))
        if type(parameters) is not dict or type(buffers) is not dict or type(modules) is not dict:
            return None
        transient = state.get("_non_persistent_buffers_set")
        names = {name for name in transient if type(name) is str} if type(transient) is list else set()
        return {**parameters, **{name: item for name, item in buffers.items() if name not in names}, **modules}

    def _scripted(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        tensors = self._module_tensors.get(name, state.keys())
        return {
            key: item
            for key, item in state.items()
            if (isinstance(item, Tensor) and key in tensors)
            or (type(item) is Inert and item.name.startswith(_SCRIPTED))
        }

    def _note(self, value: object) -> None:
        """Note the outermost classes in a value that holds no named tensors."""
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if not isinstance(value, dict | list | tuple | Inert | Global) or id(value) in self._noted:
                continue
            self._noted.add(id(value))
            if isinstance(value, dict):
                waiting += reversed(value.values())
            elif isinstance(value, list | tuple):
                waiting += reversed(value)
            elif value.name in _ARRAYS:
                self.arrays["numpy.ndarray"] = None
            elif self._is_module(value) or value.name in DTYPES:
                continue
            elif value.name not in _COMMON:
                # The name is whatever the file's author chose.
                self.ignored[re.sub(r"[^\w.<>]", ".", value.name, flags=re.ASCII)[:80]] = None
            elif isinstance(value, Inert):
                waiting += [value.items, value.state, value.args]

    def _is_module(self, value: Inert | Global) -> bool:
        return isinstance(value, Inert) and value.items is None and self._items(value) is not None
