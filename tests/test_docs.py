"""The documentation agrees with itself and with the settings; the site itself is built by `mkdocs build --strict`."""

import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

from pydantic import BaseModel

import mimref
from mimref.config.base import Section
from mimref.reports.curves import LABELS

ROOT = Path(__file__).parents[1]


def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(picture: str) -> set[str]:
    svg = (ROOT / "docs" / "images" / picture).read_text(encoding="utf-8")
    return set(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_the_pictures_show_the_results() -> None:
    drawing, page = figures(), ROOT / "docs" / "results.md"
    curves = {name: [r["value"] for r in drawing.read_curves(page) if r["model"] == name] for name in LABELS}
    shown = {f"{value:.1f}" for curve in curves.values() for value in (max(curve), curve[-1])}
    for theme in drawing.THEMES:
        for name, (_, base, refined) in drawing.read_scores(page).items():
            assert {name, str(base), str(refined)} <= texts(f"digits-{theme}.svg")
        assert {*shown, *LABELS.values()} <= texts(f"blocks-{theme}.svg")


def test_the_readme_tells_the_results() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rows = figures().read_table(ROOT / "docs" / "results.md", "The effect at small size")
    for name, metric in (("k-NN", "k-NN"), ("1-shot", "1-shot"), ("k-means accuracy", "k-means ACC")):
        cells = next(row[2:] for row in rows if row[0].startswith(metric) and len(row) == 4)
        base, refined = (cell.split(" (")[0] for cell in cells)
        assert re.search(rf"{name}[a-z ]* from {base} to {refined}\b", readme), name


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r'(?:\]\(|srcset="|src=")([^)"#:]+)[)"#]', page.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_every_file_that_contributing_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## From an image file")[1].split("### Conventions")[0]
    named = re.findall(r"^\d\. `([^`]+)`", section, re.MULTILINE)
    assert named
    assert [name for name in named if not (ROOT / "mimref" / name).is_file()] == []


def all_sections(section: type[BaseModel] = Section) -> Iterator[type[BaseModel]]:
    for below in section.__subclasses__():
        if below.__module__.startswith("mimref."):
            yield below
        yield from all_sections(below)


def test_every_setting_has_a_meaning() -> None:
    for module in pkgutil.walk_packages(mimref.__path__, "mimref."):
        if ".config" in module.name:
            import_module(module.name)
    fields = {
        f"{section.__name__}.{name}": field
        for section in all_sections()
        for name, field in section.model_fields.items()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    }
    assert len(fields) > 100
    assert [name for name, field in fields.items() if not field.description] == []
