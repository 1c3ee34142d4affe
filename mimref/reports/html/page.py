"""`report.html`: one self-contained HTML page about one or several runs."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mimref.evaluation.exhibits.contents import Thumbnail
from mimref.files import write_bytes
from mimref.reports.html.charts import Chart, block_charts, log_charts, map_chart, run_names
from mimref.reports.html.environment import base64_text, page_environment
from mimref.reports.html.images import Pool, encode
from mimref.reports.html.runs import Run, settings
from mimref.reports.html.tables import block_tables, facts, results_table, short

MOST_BYTES = 5_000_000
"""Maximum size of a page."""
MOST_LISTED = 200
"""Maximum number of skipped images that a page lists; results.json has all."""
MOST_SHOWN = (60, 20, 5)
"""Maximum confusions and clusters per model on a page: the first number that leaves room for the page's images."""
IMAGE_BYTES = 500
"""Space on the page that is enough for one image."""


def write_report(path: Path, runs: Sequence[Run]) -> None:
    """Write the report of the runs. Raises OutputError if the file cannot be written."""
    write_bytes(path, make_page(runs).encode())


def make_page(runs: Sequence[Run]) -> str:
    """Return the page, of less than `MOST_BYTES`. Only pages of a single run show maps and galleries."""
    environment = page_environment()
    environment.filters |= {"short": short, "right": _right}
    template = environment.get_template("page.html")
    content = _content(runs)
    images = content["exhibits"].images if content["exhibits"] else []
    for most_shown in MOST_SHOWN:
        content["most_shown"] = most_shown
        # Everything but the images, which get the remaining space.
        page = template.render(**content, data=_data(content["charts"], Pool("", [])), images_note="")
        room = MOST_BYTES - len(page.encode()) - 1000
        if room >= IMAGE_BYTES * len(images):
            break
    pool = encode(images, room)
    return template.render(**content, data=_data(content["charts"], pool), images_note=pool.note)


def _right(numbers: Sequence[int], images: Sequence[Thumbnail], label: str) -> int:
    """Return how many of the images have the label."""
    return sum(images[number].label == label for number in numbers)


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the variables of the template."""
    single = runs[0] if len(runs) == 1 else None
    exhibits = single.exhibits if single else None
    logs, blocks = log_charts(runs), block_charts(runs)
    maps = [map_chart(exhibits)] if exhibits and exhibits.maps and exhibits.map_images else []
    charts = {f"{name}-{number}": chart for name, group in (("log", logs), ("block", blocks), ("map", maps))
              for number, chart in enumerate(group, start=1)}  # fmt: skip
    names = run_names(runs)
    return {
        "title": f"Report of {names[0]}" if single else f"Report of {len(runs)} runs",
        "runs": [(name, run, facts(run), settings(run)) for name, run in zip(names, runs, strict=True)],
        "notes": _notes(runs, names),
        "results": results_table(runs),
        "block_tables": block_tables(runs),
        "charts": charts,
        "exhibits": exhibits,
        "most_listed": MOST_LISTED,
        "styles": _text("style.css"),
        "library": library(),
        "script": _text("page.js"),
        "policy": _policy(),
    }


def _notes(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    if len(runs) == 1:
        return runs[0].notes
    notes = [f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.notes if not run.finished]
    return [*notes, "Maps and galleries are in the report of each run."]


def _data(charts: dict[str, Chart], pool: Pool) -> Markup:
    """Return charts and images for the page's script, as JSON that cannot end its script element or start another."""
    data = {
        "charts": {name: chart.spec for name, chart in charts.items()},
        "prefix": pool.prefix,
        "images": pool.encoded,
    }
    return Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", r"\u003c"))


# --- scripts and styles


@lru_cache(maxsize=1)
def library() -> Markup:
    """Return Vega, Vega-Lite and Vega-Embed as one script."""
    import altair
    import vl_convert

    version = "_".join(altair.SCHEMA_VERSION.split(".")[:2])
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    return Markup(script.replace("</script", r"<\/script").replace("<!--", r"<\!--"))


def _text(name: str) -> Markup:
    """Return a file from the templates' folder, unescaped."""
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _policy() -> str:
    """Return the content security policy: run the page's own two scripts, show embedded images, fetch nothing.

    Vega compiles its expressions, hence `unsafe-eval`; Vega and browsers set styles of elements.
    """
    hashes = [
        f"'sha256-{base64_text(hashlib.sha256(script.encode()).digest())}'" for script in (library(), _text("page.js"))
    ]
    scripts = " ".join([*hashes, "'unsafe-eval'"])
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {scripts}"
