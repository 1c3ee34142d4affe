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

ROOT = Path(__file__).parents[1]


def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_shows_the_results() -> None:
    drawing = figures()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, (_, base, refined) in drawing.read_scores(ROOT / "docs" / "results.md").items():
        for theme in drawing.THEMES:
            picture = (ROOT / "docs" / "images" / f"digits-{theme}.svg").read_text(encoding="utf-8")
            texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
            assert {name, str(base), str(refined)} <= set(texts), theme
        assert f"{base} to {refined}" in readme, name


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
