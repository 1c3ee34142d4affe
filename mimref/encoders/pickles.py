"""Pickles read as data: nothing that they name is imported, and nothing that they call is run.

Python's own unpickler imports and calls whatever a pickle asks for. This one knows strings, numbers, tuples, lists and
dictionaries with string keys; `values` determines what a call returns. Nothing recurses, nothing but strings is hashed,
and no operation costs more than the bytes that ask for it.
"""

import pickletools
from collections.abc import Callable
from io import RawIOBase
from typing import IO, Any, cast

from mimref.encoders.values import Global, Inert, Unreadable, Values


def unpickle(stream: RawIOBase, values: Values) -> Any:
    """Return the value of one pickle, and leave the stream at the position after it.

    Raises Unreadable, and whatever Python's decoders raise for damaged numbers and strings.
    """
    return _Machine(values).run(stream)


_ARGUMENTS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"),
        *("SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    )
)
_BYTES = frozenset(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# Sets become lists: they are only iterated over, and a list hashes nothing.
_CONTAINERS: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
_LONGEST_NAME = 10_000
_WITHOUT_EFFECT = frozenset(("PROTO", "FRAME", "READONLY_BUFFER", "STOP"))


class _Machine:
    """Runs the operations of one pickle."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: RawIOBase) -> Any:
        """Return the pickle's value."""
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], stream)):
            name = opcode.name
            self._values.spend_objects(1)
            if name in _ARGUMENTS:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _CONTAINERS:
                self._stack.append(_CONTAINERS[name]())
            elif name in _BYTES:
                self._stack.append(b"")  # no plain tensor is built from bytes
            elif operation := _OPERATIONS.get(name):
                operation(self, argument)
            elif name not in _WITHOUT_EFFECT:
                raise Unreadable(f"its pickle holds {name}, which no checkpoint needs")
        return self._pop()

    # --- the stack

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise Unreadable("its pickle takes a value where none is left")
        return self._stack.pop()

    def _peek(self) -> Any:
        self._stack.append(value := self._pop())
        return value

    def _pop_marked(self) -> list[Any]:
        if not self._marks:
            raise Unreadable("its pickle takes values from a mark that it never sets")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _mark(self, _: object) -> None:
        self._marks.append(len(self._stack))

    def _drop(self, _: object) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _drop_marked(self, _: object) -> None:
        self._pop_marked()

    def _duplicate(self, _: object) -> None:
        self._stack.append(self._peek())

    def _put(self, number: Any) -> None:
        self._memo[number] = self._peek()

    def _memoize(self, _: object) -> None:
        self._memo[len(self._memo)] = self._peek()

    def _get(self, number: Any) -> None:
        if number not in self._memo:
            raise Unreadable("its pickle refers to a value that it does not hold")
        self._stack.append(self._memo[number])

    # --- containers

    def _tuple_of(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def _tuple(self, _: object) -> None:
        self._stack.append(tuple(self._pop_marked()))

    def _list(self, _: object) -> None:
        self._stack.append(self._pop_marked())

    def _dict(self, _: object) -> None:
        values = self._pop_marked()
        self._stack.append({})
        self._set(values)

    def _append(self, _: object) -> None:
        self._extend([self._pop()])

    def _append_marked(self, _: object) -> None:
        self._extend(self._pop_marked())

    def _extend(self, values: list[Any]) -> None:
        if type(target := self._peek()) is list:
            target.extend(values)
        elif not isinstance(target, Inert):
            raise Unreadable(f"its pickle appends to a {type(target).__name__}")

    def _set_item(self, _: object) -> None:
        value = self._pop()
        self._set([self._pop(), value])

    def _set_marked(self, _: object) -> None:
        self._set(self._pop_marked())

    def _set(self, values: list[Any]) -> None:
        """Set items given as key, value, key, value, ...

        Only strings name tensors. All other keys are left out: some cannot be hashed, and some may be made to collide.
        """
        target = self._peek()
        if isinstance(target, Inert):
            target.items = target.items if target.items is not None else {}
            target = target.items
        if type(target) is not dict or len(values) % 2:
            raise Unreadable(f"its pickle sets items of a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) is str:
                target[key] = value

    # --- objects

    def _global(self, name: Any) -> None:
        self._stack.append(Global(str(name)))

    def _global_from_stack(self, _: object) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise Unreadable("its pickle names a class by something other than a string")
        if len(name) + len(module) > _LONGEST_NAME:  # short operations could join long strings again and again
            raise Unreadable("its pickle names a class by an overlong text")
        self._stack.append(Global(f"{module} {name}"))

    def _extension(self, code: Any) -> None:
        self._stack.append(Global(f"copyreg extension_{code}"))

    def _reduce(self, _: object) -> None:
        args = self._pop()
        self._stack.append(self._values.call(self._pop(), args))

    def _reduce_with_keywords(self, _: object) -> None:
        keywords, args = self._pop(), self._pop()
        self._stack.append(self._values.call(self._pop(), (args, keywords)))

    def _object(self, _: object) -> None:
        values = self._pop_marked()
        if not values:
            raise Unreadable("its pickle makes an object of no class")
        self._stack.append(self._values.call(values[0], tuple(values[1:])))

    def _instance(self, name: Any) -> None:
        self._stack.append(self._values.call(Global(str(name)), tuple(self._pop_marked())))

    def _build(self, _: object) -> None:
        state = self._pop()
        # Other values keep no state: neither a state dict's metadata nor a tensor's attributes are weights.
        if isinstance(target := self._peek(), Inert):
            target.state = state

    def _persistent(self, identity: Any) -> None:
        self._stack.append(self._values.resolve(identity))

    def _persistent_from_stack(self, _: object) -> None:
        self._stack.append(self._values.resolve(self._pop()))


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine._mark, "POP": _Machine._drop, "POP_MARK": _Machine._drop_marked, "DUP": _Machine._duplicate,
    "PUT": _Machine._put, "BINPUT": _Machine._put, "LONG_BINPUT": _Machine._put, "MEMOIZE": _Machine._memoize,
    "GET": _Machine._get, "BINGET": _Machine._get, "LONG_BINGET": _Machine._get,
    "TUPLE1": lambda self, _: self._tuple_of(1), "TUPLE2": lambda self, _: self._tuple_of(2),
    "TUPLE3": lambda self, _: self._tuple_of(3), "TUPLE": _Machine._tuple, "LIST": _Machine._list,
    "FROZENSET": _Machine._list, "DICT": _Machine._dict, "APPEND": _Machine._append,
    "APPENDS": _Machine._append_marked, "ADDITEMS": _Machine._append_marked, "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_marked, "GLOBAL": _Machine._global, "STACK_GLOBAL": _Machine._global_from_stack,
    "EXT1": _Machine._extension, "EXT2": _Machine._extension, "EXT4": _Machine._extension,
    "REDUCE": _Machine._reduce, "NEWOBJ": _Machine._reduce, "NEWOBJ_EX": _Machine._reduce_with_keywords,
    "OBJ": _Machine._object, "INST": _Machine._instance, "BUILD": _Machine._build,
    "PERSID": _Machine._persistent, "BINPERSID": _Machine._persistent_from_stack,
}  # fmt: skip
