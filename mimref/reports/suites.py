"""Results of suites: entries as lines, models as columns, averages and ranks below."""

from collections.abc import Sequence

from mimref.results import Row

_SUMMARIES = ("suite_average", "suite_rank")


def suite_lines(rows: Sequence[Row]) -> list[Row]:
    """The rows of `run_suite` as tables and figures of comparisons show them: every entry as a metric of its name."""
    kept = ("model", "value", "mean", "std")
    return [
        {key: row[key] for key in kept if key in row} | {"metric": row.get("entry", row["metric"])}
        for row in sorted(rows, key=lambda row: row["metric"] in _SUMMARIES)
    ]
