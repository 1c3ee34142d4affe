"""Run the tests of the checkout that this package belongs to, in a process of their own."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import mimref
from mimref.benchmarks.suite.lines import Found

ROOT = Path(mimref.__file__).parents[1]
_NAMED = 3


def tests(_device: str, *, line: str, mark: str, files: tuple[str, ...] = ()) -> Iterator[Found]:
    """Count the failing tests with a mark, in some files or in all files that use the mark.

    Raises RuntimeError if no test is run.
    """
    chosen = [*files] or marked_files(ROOT / "tests", mark)
    if not chosen or not all((ROOT / file).is_file() for file in chosen):
        yield Found(line, None, "the tests are in a checkout of the repository, not in an installed package")
        return
    if find_spec("pytest") is None:
        yield Found(line, None, "pytest is not installed (pip install '.[test]')")
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", mark, "-n", "0", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            [*command, f"--junitxml={report}", *chosen], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        sys.stderr.write(run.stdout + run.stderr)
        if not report.is_file():
            raise RuntimeError(f"pytest ended with exit code {run.returncode} and without a report")
        passed, failed, skipped = counted(report.read_text("utf-8"))
    if not passed and not failed:
        raise RuntimeError(f"none of the tests marked {mark} was run, {skipped} were skipped")
    named = f": {', '.join(failed[:_NAMED])}{', ...' * (len(failed) > _NAMED)}" if failed else ""
    note = f"{passed} passed, {len(failed)} failed, {skipped} skipped{named}"
    yield Found(line, float(len(failed)), note, {"passed": passed, "skipped": skipped})


def marked_files(folder: Path, mark: str) -> list[str]:
    """Return the test files that use a mark, relative to the checkout; reading the others takes pytest a minute."""
    used = re.compile(rf"\bmark\.{re.escape(mark)}\b")
    return [
        str(path.relative_to(ROOT))
        for path in sorted(folder.rglob("test_*.py"))
        if used.search(path.read_text("utf-8"))
    ]


def counted(report: str) -> tuple[int, list[str], int]:
    """Read a JUnit report: number of tests passed, names of those failed or not started, and number skipped."""
    passed, failed, skipped = 0, list[str](), 0
    for case in ElementTree.fromstring(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.append(str(case.get("name")))
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped
