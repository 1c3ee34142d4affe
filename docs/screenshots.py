"""Take the screenshots of reports.md from the report of a finished refinement, with an installed Chromium.

mimref refine --out runs/digits
python docs/screenshots.py runs/digits
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
COLORS = 256
"""Number of colours in the pictures; so few make them a third as large."""


def results(page: Page) -> None:
    """Scroll to the table and the first curves."""
    page.locator("#results").evaluate("section => scrollTo(0, section.offsetTop)")


def points(page: Page) -> None:
    """Scroll to the map, with the mouse at a point in the middle of the list."""
    page.locator("#map").evaluate("section => scrollTo(0, section.offsetTop)")
    marks = page.locator("#map-1 .mark-symbol.role-mark path")
    marks.nth(marks.count() // 2).hover(force=True)
    page.locator("#vg-tooltip-element.visible img").wait_for()


def neighbours(page: Page) -> None:
    """Scroll to the first galleries."""
    page.locator("#neighbours").evaluate("section => scrollTo(0, section.offsetTop)")


def take(report: Path) -> None:
    """Write report-results.png, report-map.png and report-neighbours.png."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    shots: dict[str, tuple[Callable[[Page], None], str]] = {
        "results": (results, "light"),
        "map": (points, "dark"),
        "neighbours": (neighbours, "light"),
    }
    with sync_playwright() as started:
        sandbox = ["--no-sandbox"] * (os.geteuid() == 0)
        browser = started.chromium.launch(executable_path=chromium, args=sandbox)
        for name, (show, scheme) in shots.items():
            page = browser.new_page(viewport={"width": 1100, "height": 760}, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(report.resolve().as_uri())
            page.wait_for_selector("html[data-drawn=yes]")
            show(page)
            file = IMAGES / f"report-{name}.png"
            page.screenshot(path=file)
            Image.open(file).convert("RGB").quantize(COLORS).save(file, optimize=True)
        browser.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]) / "report.html")
