"""Every example in help texts, README.md and docs/*.md is run up to the actual work, which is replaced.

Covered: the parser, presets, `load_config`, the checks of output folders and files that come before the work, and the
work itself where it is quick (`presets`, `cache`, `inspect quickstart`, `--help`). Not covered: what the work does with
the user's weights, images and files; only presets (*.toml) have stand-ins.
"""

import pkgutil
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import mimref
from mimref.cli import app, run
from mimref.cli.parser import Options
from mimref.encoders import inspection
from mimref.errors import Checks

ROOT = Path(__file__).parents[2]
WORK = (
    "mimref.cli.evaluation.run_on_ranks",
    "mimref.cli.suite.run_on_ranks",
    "mimref.cli.training.run_on_ranks",
    "mimref.cli.transfer.run_on_ranks",
    "mimref.cli.robustness.run_on_ranks",
    "mimref.cli.segment.run_on_ranks",
    "mimref.reports.html.runs.newest_run",
    "mimref.reports.html.runs.read_run",
    "mimref.refinement.plan.make_plan",
    "mimref.reproduce.plan.make_suite",
    "mimref.reproduce.run.run_ablations",
    "mimref.pretraining.plan.make_plan",
    "mimref.transfer.finetune.plan.make_plan",
    "mimref.evaluation.interpolate.interpolate",
    "mimref.encoders.export.read_encoder",
    "mimref.sharing.export.read_subject",
    "mimref.sharing.push.check_access",
    "mimref.benchmarks.evaluations.benchmark_evaluations",
    "mimref.benchmarks.views.benchmark_views",
    "mimref.benchmarks.stage.fitted",
    "mimref.benchmarks.suite.run.run_suite",
    "mimref.doctor.diagnosis.diagnose",
)


def lines_of(text: str) -> Iterator[str]:
    """Yield the lines of code blocks that run mimref, directly or under torchrun; continued lines are joined."""
    fenced = False
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith(("    ", "\t")):
            match = re.match(r"(?:\w+=\S+ )*(?:pip install \S+ && |torchrun .*-m )?(mimref\b.*)", line.strip())
            if match:
                yield match[1].removesuffix("&").strip()


def epilogs(command: Any) -> Iterator[str]:
    yield command.epilog or ""
    for below in getattr(command, "commands", {}).values():
        yield from epilogs(below)


HELP = [line.strip() for epilog in epilogs(get_command(app)) for line in epilog.splitlines()[1:]]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
}
EXAMPLES = [pytest.param(line, id=f"help: {line}") for line in HELP] + [
    pytest.param(line, id=f"{name}: {line}") for name, path in DOCUMENTS.items() for line in lines_of(path.read_text())
]


class Reached(Exception):
    """Raised when a line reaches its work."""


@pytest.fixture(scope="module")
def all_imported() -> None:
    """Import every module first: one imported while a name is replaced would keep the replacement."""
    for module in pkgutil.walk_packages(mimref.__path__, "mimref."):
        if not module.name.endswith("__main__"):
            import_module(module.name)


@pytest.fixture
def no_work(all_imported: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reach(*args: object, checks: Checks | None = None, **named: object) -> Any:
        for options in args:
            checks = options.checks if isinstance(options, Options) else checks
        if checks is not None:
            checks.finish()
        raise Reached

    for name in WORK:
        monkeypatch.setattr(name, reach)
    inspect = inspection.inspect_file
    quick = lambda file, *given: inspect(file, *given) if file == "quickstart" else reach(file)  # noqa: E731
    monkeypatch.setattr(inspection, "inspect_file", quick)
    monkeypatch.chdir(tmp_path)


def runs(line: str) -> bool:
    """Return whether a line reaches its work or finishes successfully."""
    words = shlex.split(line, comments=True)[1:]
    for word in words:
        if word.endswith(".toml") and not Path(word).exists():
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            Path(word).write_text("")
    try:
        return run(words) == 0
    except Reached:
        return True


def test_examples_are_found() -> None:
    assert len(HELP) >= 2 * 24 - 6 and len(EXAMPLES) > len(HELP)


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_runs(line: str, no_work: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs(line), capsys.readouterr().err


@pytest.mark.parametrize("line", ["mimref knn --set heads.temperature=0.3", "mimref refine --preset mae_b17"])
def test_a_wrong_example_fails(line: str, no_work: None) -> None:
    assert not runs(line)


def test_lines_of_code_blocks() -> None:
    indented = "text\n\n    mimref a \\\n        --b  # c\n    torchrun --x -m mimref d\n\nmimref no\n"
    text = indented + "```sh\nA=1 mimref f\n```\nmimref no"
    assert list(lines_of(text)) == ["mimref a --b  # c", "mimref d", "mimref f"]
