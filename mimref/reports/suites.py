"""Results of suites: one line per entry, one column per model, averages and ranks below."""

from collections.abc import Sequence

from mimref.results import Row

_SUMMARIES = ("suite_average", "suite_rank")


def suite_lines(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of `run_suite` for comparison tables and figures: every entry becomes a metric of its name."""
    kept = ("model", "value", "mean", "std")
    return [
        {key: row[key] for key in kept if key in row} | {"metric": row.get("entry", row["metric"])}
        for row in sorted(rows, key=lambda row: row["metric"] in _SUMMARIES)
    ]
