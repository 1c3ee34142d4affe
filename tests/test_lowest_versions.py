"""tests/lowest-versions.txt contains the minimum version of every package that pyproject.toml requires."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_constraints_are_the_minima_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    minima = {}
    for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
        name, minimum = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)(?:;.*)?", requirement).groups()
        minima[name] = minimum
    lines = (ROOT / "tests/lowest-versions.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned.keys() == minima.keys()
    assert {name: version for name, version in pinned.items() if not f"{version}.".startswith(f"{minima[name]}.")} == {}
