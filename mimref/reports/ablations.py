"""Tables of `mimref reproduce ablations`: our results beside the paper's, on the terminal and as a Markdown page."""

import math
from collections.abc import Sequence

from rich.console import Console

from mimref.benchmarks.duration import readable
from mimref.reports.html.page import MOST_LISTED
from mimref.reports.metrics import metric_label
from mimref.reports.tables import plain_table
from mimref.reproduce.run import AblationsResult
from mimref.reproduce.summary import BLOCK_METRIC
from mimref.reproduce.table1 import TITLES
from mimref.results import Row

_COUNTED = {
    "agrees": "agree with the paper's",
    "disagrees": "disagree",
    "undecided": "are within the seeds' spread, unlike the paper's",
    "one seed": "are from one seed, without a spread",
}
_METRICS = {"knn_top1": "k-NN", "lowshot_top1": "1-shot"}


def print_ablations(rows: Sequence[Row]) -> None:
    """Print every table of `summarise`."""
    console = Console()
    names = ("setting", "the paper's", "metric", "ours", "paper", "difference", "paper's")
    for table, lines in _by_table(rows).items():
        console.print(f"({table}) {TITLES[table]}", style="bold", markup=False)  # type: ignore[index]
        console.print(plain_table(names, [_cells(row) for row in lines], right=names[3:]))
        for sentence in _sentences(lines):
            console.print(sentence, markup=False, highlight=False)
        console.print()


def ablations_page(result: AblationsResult, command: str) -> str:
    """Return a Markdown page: command, agreement, before and after, curves, tables, and the images left out."""
    rows, config = result.rows, result.suite.plan.config
    text = [
        "# Ablations",
        "",
        f"```bash\n{command}\n```",
        "",
        f"Seeds {', '.join(map(str, result.suite.seeds))}; {readable(result.elapsed_s)} of training in all runs "
        "together. Values are means over the seeds, with the range; differences are between runs with the same seed."
        f"{_fewer(rows, len(result.suite.seeds))}",
        "The paper's results are for data2vec 2.0 ViT-L/16 on ImageNet-1K (Table 1), ours for "
        f"{config.encoder.weights or config.encoder.arch} on {config.data.spec}.",
        "",
        *_agreement(rows),
        *_before_and_after(rows),
        *_curves(rows),
    ]
    for table, lines in _by_table(rows).items():
        text += [f"## ({table}) {TITLES[table]}", ""]  # type: ignore[index]
        text += [
            "| setting | the paper's | metric | ours | paper | difference | the paper's |",
            "|---|---|---|---|---|---|---|",
        ]
        text += [f"| {' | '.join(_cells(row))} |" for row in lines]
        text += ["", *_sentences(lines), ""]
    text += _skipped(result.bad_images)
    return "\n".join(text).rstrip() + "\n"


def _fewer(rows: Sequence[Row], seeds: int) -> str:
    """Return a sentence that names the tables whose lines have fewer seeds."""
    tables = sorted({str(row["table"]) for row in rows if "table" in row and int(row.get("seeds", seeds)) < seeds})
    return f" Lines of ({'), ('.join(tables)}) have fewer seeds." if tables else ""


def _skipped(images: Sequence[tuple[str, str]]) -> list[str]:
    """Return the section that lists the images left out in the runs."""
    if not images:
        return []
    count = "1 image" if len(images) == 1 else f"{len(images)} images"
    listed = f"; the first {MOST_LISTED} are listed, results.json has all" if len(images) > MOST_LISTED else ""
    text = ["## Skipped images", "", f"{count} could not be read{listed}.", "", "| image | reason |", "|---|---|"]
    cells = ((each.replace("|", "\\|") for each in pair) for pair in images[:MOST_LISTED])
    return [*text, *(f"| {' | '.join(pair)} |" for pair in cells), ""]


def _agreement(rows: Sequence[Row]) -> list[str]:
    """Return a sentence with the number of differences that agree with the paper's."""
    words = [str(row["verdict"]).partition(":")[0] for row in rows if "verdict" in row]
    counts = {word: words.count(word) for word in ("agrees", "disagrees", "undecided", "one seed")}
    shown = ", ".join(f"{count} {_COUNTED[word]}" for word, count in counts.items() if count)
    return [f"Differences from the default: {shown}.", ""] if shown else []


def _by_table(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "table" in row:
            found.setdefault(str(row["table"]), []).append(row)
    return dict(sorted(found.items()))


def _cells(row: Row) -> tuple[str, ...]:
    """Return the cells of one line of a table."""
    known = not math.isnan(float(row["value"]))
    ours = _ranged(row, "", ".1f") if known else "-"
    difference = _ranged(row, "difference_", "+.1f") if "difference" in row else ""
    paper = f"{float(row['paper_difference']):+.1f}" if "paper_difference" in row else ""
    metric = _METRICS[str(row["metric"])]
    return str(row["setting"]), str(row["paper_setting"]), metric, ours, f"{float(row['paper']):.1f}", difference, paper


def _ranged(row: Row, prefix: str, form: str) -> str:
    """Format the value, with its range if there are several seeds."""
    value, least, most = (float(row[key]) for key in (prefix.rstrip("_") or "value", f"{prefix}least", f"{prefix}most"))
    ranged = f" ({least:{form}} to {most:{form}})" if int(row["seeds"]) > 1 else ""
    return f"{value:{form}}{ranged}"


def _sentences(lines: Sequence[Row]) -> list[str]:
    found = []
    for row in lines:
        if "verdict" in row:
            metric = f", {_METRICS[str(row['metric'])]}" if len({line["metric"] for line in lines}) > 1 else ""
            found.append(f"- {row['setting']} (the paper's {row['paper_setting']}){metric}: {row['verdict']}.")
    return found


def _before_and_after(rows: Sequence[Row]) -> list[str]:
    """Return the section with the default refinement's results."""
    models = ("raw pixels", "base", "refined")
    found = [row for row in rows if row["model"] in models and "table" not in row and row["metric"] != BLOCK_METRIC]
    if not found:
        return []
    text = ["## Before and after", "", f"| | {' | '.join(models)} |", "|---|---|---|---|"]
    for metric in dict.fromkeys(row["metric"] for row in found):
        by_model = {row["model"]: row for row in found if row["metric"] == metric}
        cells = (_ranged(by_model[model], "", ".1f") if model in by_model else "-" for model in models)
        label = metric_label({"metric": metric, "shots": 1})
        text.append(f"| {label} | {' | '.join(cells)} |")
    return [*text, ""]


def _curves(rows: Sequence[Row]) -> list[str]:
    """Return the section with figure and numbers of k-NN over the blocks, and the best block of each curve."""
    curves = {
        model: {
            int(row["block"]): float(row["value"])
            for row in rows
            if (row["model"], row["metric"]) == (model, BLOCK_METRIC)
        }
        for model in ("base", "refined")
    }
    curves = {model: curve for model, curve in curves.items() if curve}
    if not curves:
        return []
    blocks = list(next(iter(curves.values())))
    text = ["## k-NN of every block", ""]
    text += [
        f"![k-NN accuracy of every block before and after](blocks-{theme}.svg#only-{theme})"
        for theme in ("light", "dark")
    ]
    text += ["", f"| block | {' | '.join(map(str, blocks))} |", "|---" * (len(blocks) + 1) + "|"]
    text += [
        f"| {model} | {' | '.join(f'{curve[block]:.1f}' for block in blocks)} |" for model, curve in curves.items()
    ]
    text.append("")
    for model, curve in curves.items():
        best = max(curve, key=curve.__getitem__)
        fall = curve[best] - curve[blocks[-1]]
        text.append(
            f"The {model} encoder is best at block {best}"
            + (f", {fall:.1f} points above the last block." if fall else ".")
        )
    return [*text, ""]
