"""Reports in a real browser: nothing fails, nothing is fetched, and points of the map show their images on hover."""

import json
import os
import re
import shutil
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mimref.evaluation.config import CompareConfig
from mimref.reports.html.page import write_report
from mimref.reports.html.runs import read_run
from mimref.results import Row, write_results
from tests.exhibits import make_exhibits

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

HOSTILE = [
    "<img src=x onerror=window.hostile=1>",
    "</script><script>hostile=1</script>",
    "\"' onmouseover='window.hostile=1' x=\"",
]
DRAWN = "html[data-drawn=yes]"
LOCAL = ("file:", "data:", "blob:")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        # Root in a container has no sandbox, and often only a small /dev/shm.
        options = ["--disable-dev-shm-usage", *["--no-sandbox"] * (os.geteuid() == 0)]
        launched = started.chromium.launch(executable_path=CHROMIUM, args=options)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with everything that a report can show, and hostile names everywhere."""
    folder = tmp_path_factory.mktemp("run")
    rows: list[Row] = [
        {"model": model, "metric": metric, "value": 50.0 + number, **where}
        for number, model in enumerate(("base", "refined", HOSTILE[0]))
        for metric, where in (("knn_top1", {}), ("block_knn_top1", {"block": 1}), ("block_knn_top1", {"block": 2}))
    ]
    config = CompareConfig(base="base", refined=[*HOSTILE]).model_dump(mode="json")
    write_results(folder, "compare", config, 9.0, rows, bad_images=[(name, name) for name in HOSTILE])
    lines = [{"epoch": epoch, "stage": "encoder", "loss": 3 / epoch, "head_loss": [1, 2]} for epoch in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_exhibits(60, labels=HOSTILE, models=("base", "refined", HOSTILE[0]), paths=HOSTILE).write(folder)
    write_report(folder / "report.html", [read_run(folder)])
    return folder / "report.html"


class Opened:
    """The report in a page of the browser, with its console messages, errors and requests."""

    def __init__(self, browser: Any, report: Path, **context: Any) -> None:
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(**context)
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri())
        self.page.wait_for_selector(DRAWN)

    def check(self) -> None:
        """Assert that nothing failed, nothing hostile ran and nothing was fetched, and close the page."""
        assert self.said == []
        assert self.page.evaluate("window.hostile") is None
        assert [url for url in self.requests if not url.startswith(LOCAL)] == []
        assert [url for url in self.requests if url.startswith("file:")] == [self.page.url.partition("#")[0]]
        self.page.close()


def test_hovering_a_point_shows_its_image(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    exhibits = read_run(report.parent).exhibits
    assert exhibits is not None
    points = opened.page.locator("#map-1 .mark-symbol.role-mark path")
    assert points.count() == 60
    for place in (0, 1, 2, 40):
        points.nth(place).hover(force=True)
        tooltip = opened.page.locator("#vg-tooltip-element.visible")
        tooltip.wait_for()
        image, shown = tooltip.locator("img"), tooltip.inner_text()
        # Points may overlap: the last line names the point that is hovered.
        path = tooltip.locator("td.value").last.inner_text()
        thumbnail = next(each for each in exhibits.images if each.path == path)
        assert thumbnail.label in shown
        assert image.get_attribute("src") == f"data:image/jpeg;base64,{b64encode(thumbnail.jpeg).decode()}"
        assert image.evaluate("image => image.complete && image.naturalWidth") == 8
        opened.page.mouse.move(0, 0)
    opened.check()


def test_the_switch_moves_the_points(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    first = opened.page.locator("#map-1 .mark-symbol.role-mark path").first
    choices = opened.page.locator("#map-1 input[type=radio]")
    assert choices.count() == 3
    choices.nth(1).check()
    before = first.get_attribute("transform")
    choices.nth(0).check()
    opened.page.wait_for_function(
        "before => document.querySelector('#map-1 .mark-symbol.role-mark path').getAttribute('transform') !== before",
        arg=before,
    )
    opened.check()


def test_every_image_and_chart_is_drawn(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    images = "[...document.querySelectorAll('main img')]"
    assert opened.page.evaluate(f"{images}.length") > 300
    assert opened.page.evaluate(f"Promise.all({images}.map(image => image.decode())).then(() => true)")
    charts = opened.page.locator(".chart")
    assert charts.count() == opened.page.locator(".chart svg").count() == 4  # 2 x log, blocks, map
    assert (
        opened.page.locator(".chart svg[aria-label]").count() + opened.page.locator(".chart [aria-label]").count() >= 4
    )
    assert opened.page.locator("img:not([alt])").count() == 0
    assert opened.page.evaluate(
        "[...document.querySelectorAll('table')].every(table => table.querySelector('thead th'))"
    )
    opened.check()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_as_wide_as_its_window(browser: Any, report: Path, width: int) -> None:
    opened = Opened(browser, report, viewport={"width": width, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.check()


def test_light_and_dark(browser: Any, report: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        opened = Opened(browser, report, color_scheme=scheme)
        page, text = opened.page.evaluate(
            "(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))"
        )
        axis = opened.page.locator("#log-1 .role-axis-label text").first
        assert axis.evaluate("text => getComputedStyle(text).fill") == text
        colours[scheme] = [_lightness(page), _lightness(text)]
        opened.check()
    assert colours["light"][0] > 0.9 > 0.3 > colours["light"][1]
    assert colours["dark"][0] < 0.2 < 0.7 < colours["dark"][1]


def _lightness(colour: str) -> float:
    """Lightness of an `rgb(...)` colour, from 0 for black to 1 for white."""
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 765


def test_printing(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, color_scheme="dark")
    pdf = opened.page.pdf(format="A4")
    assert pdf.startswith(b"%PDF-") and len(re.findall(rb"/Type\s*/Page\b", pdf)) > 1
    opened.page.emulate_media(media="print")
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    opened.check()


def test_a_page_that_fetches_is_noticed(browser: Any, tmp_path: Path) -> None:
    """`Opened.check` would report the request and the error of a page without a policy."""
    (tmp_path / "x.html").write_text(
        "<html data-drawn=yes><body><img src='https://example.invalid/a.png'><script>throw 1</script></body></html>"
    )
    opened = Opened(browser, tmp_path / "x.html")
    opened.page.wait_for_timeout(200)
    assert any(not url.startswith(LOCAL) for url in opened.requests) and any("error" in line for line in opened.said)


def test_the_policy_stops_scripts_and_requests(browser: Any, report: Path, tmp_path: Path) -> None:
    text = report.read_text(encoding="utf-8")
    more = "<script>window.hostile=1</script><img src='https://example.invalid/a.png' onerror='window.hostile=1'>"
    (tmp_path / "x.html").write_text(text.replace("<main>", f"<main>{more}"), encoding="utf-8")
    opened = Opened(browser, tmp_path / "x.html")
    assert opened.page.evaluate("window.hostile") is None
    assert len(opened.said) >= 2 and all("Content Security Policy" in line for line in opened.said)
