"""The rooms of the package: they import from lower layers only, and files and functions stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mimref

PACKAGE = Path(mimref.__file__).parent
# Lowest first. A room may import from the layers below its own, and from its own layer unless `APART` forbids it.
LAYERS = (
    {"errors"},
    {"config", "files", "locks", "draws", "results", "progress"},
    {"devices"},
    {"distributed"},
    {"data", "encoders"},
    {"training"},
    {"features"},
    {"evaluation", "sharing"},
    {"refinement", "pretraining", "transfer"},
    {"benchmarks", "reproduce"},
    {"api", "doctor", "embedder"},
    {"reports"},
    {"cli"},
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# The version and the lazily imported API, and the entry point of `python -m mimref`.
ENTRIES = {"__init__", "__main__"}
APART = (
    {"data", "encoders"},
    {"evaluation", "sharing"},
    {"refinement", "pretraining", "transfer"},
    {"benchmarks", "reproduce"},
)
MOST_LINES = {"file": 400, "function": 60}


def modules() -> dict[str, str]:
    """Return path within the package -> source."""
    return {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imported_rooms(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and room of every import of mimref, also in functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "mimref" and len(parts) > 1 and not parts[1].startswith("__"):
                yield node.lineno, parts[1]


def wrong_imports(sources: dict[str, str]) -> list[str]:
    """Return every import that is not allowed, as `path:line room -> room`."""
    wrong = []
    for path, source in sources.items():
        room = room_of(path)
        if room in ENTRIES:
            continue
        for line, other in imported_rooms(source):
            upwards = LAYER[other] > LAYER[room]
            apart = other != room and any({room, other} <= rooms for rooms in APART)
            if upwards or apart:
                wrong.append(f"{path}:{line} {room} -> {other}")
    return wrong


def too_long(sources: dict[str, str]) -> list[str]:
    """Return every file and function with too many lines, as `path lines` and `path:name lines`."""
    long = []
    for path, source in sources.items():
        if (lines := len(source.splitlines())) > MOST_LINES["file"]:
            long.append(f"{path} {lines}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (lines := node.end_lineno - node.lineno + 1) > MOST_LINES["function"]:
                    long.append(f"{path}:{node.name} {lines}")
    return long


def test_every_room_has_a_layer() -> None:
    assert {room_of(path) for path in modules()} == LAYER.keys() | ENTRIES


def test_imports_run_down() -> None:
    assert wrong_imports(modules()) == []


def test_files_and_functions_are_short() -> None:
    assert too_long(modules()) == []


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("data/loader.py", "from mimref.encoders.vit import Encoder", "data/loader.py:1 data -> encoders"),
        ("config/run.py", "import mimref.cli.options", "config/run.py:1 config -> cli"),
        ("files.py", "from mimref import reports", "files.py:1 files -> reports"),
        ("errors.py", "def f():\n    from mimref.files import write_bytes", "errors.py:2 errors -> files"),
        (
            "features/encode.py",
            "if TYPE_CHECKING:\n    from mimref.api import load",
            "features/encode.py:2 features -> api",
        ),
    ],
)
def test_an_import_upwards_is_found(path: str, source: str, found: str) -> None:
    assert path in modules() and wrong_imports({path: source}) == [found]


def test_imports_down_and_within_a_room_are_allowed() -> None:
    down = "from mimref import __version__\nfrom mimref.errors import UserError\nimport mimref.data.views"
    beside = "from mimref.files import write_bytes"
    assert wrong_imports({"data/loader.py": down, "results.py": beside, "__init__.py": "import mimref.cli"}) == []


def test_what_is_too_long_is_found() -> None:
    function = "def f():\n" + "    pass\n" * 60
    assert too_long({"a.py": function, "b.py": "pass\n" * 401, "c.py": "pass\n" * 400}) == ["a.py:f 61", "b.py 401"]
