"""`mimref report`: finished runs as a page."""

from functools import partial
from pathlib import Path

from mimref.cli.execution import note
from mimref.cli.options import Force
from mimref.cli.parser import argument, option
from mimref.errors import ConfigError
from mimref.files import check_new_file


class ReportOptions(Force, panel="Output"):
    runs: list[Path] | None = argument(
        "Output folders of runs; default: the newest finished one in runs/.", "RUN", required=False
    )
    out: Path | None = option("Page to write; default: report.html in the run's folder.", "FILE.html")

    def page(self, folders: list[Path]) -> Path:
        """Return the page's path. Raises ConfigError if it is ambiguous, OutputError if it cannot be written."""
        if self.out is not None:
            check_new_file(self.out, (".html",), self.force)
        elif len(folders) > 1:
            raise ConfigError("--out FILE.html is required: the page of several runs belongs to no single run's folder")
        return self.out or folders[0] / "report.html"


def report(options: ReportOptions) -> None:
    """Write a page about runs: numbers, curves, images.

    The page is one HTML file that needs no network. Several runs are overlaid. An unfinished run shows what it has
    logged so far.

    Examples:
      mimref report
      mimref report runs/mae_l16
      mimref report runs/seed0 runs/seed1 --out seeds.html
    """
    from mimref.reports.html.runs import newest_run, read_run

    folders = options.runs or [newest_run(Path("runs"))]
    page = options.checks.run("out", lambda: options.page(folders))
    runs = [options.checks.run("runs", partial(read_run, folder)) for folder in folders]
    options.checks.finish()

    from mimref.reports.html.page import write_report

    assert page is not None
    write_report(page, [run for run in runs if run is not None])
    note(f"report in {page}", options)
