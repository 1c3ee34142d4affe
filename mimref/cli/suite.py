"""`mimref transfer`: encoders on a list of data sets."""

from functools import partial
from pathlib import Path

from mimref.cli.execution import figure, note, run_on_ranks, write_page
from mimref.cli.options import CHECKPOINT, Report, Resume, Seed, Text
from mimref.cli.parser import argument, option
from mimref.errors import UserErrors


class SuiteOptions(Seed, Report, Resume, panel="Data"):
    checkpoints: list[str] | None = argument(
        f"{CHECKPOINT}; several are compared. Default: the packaged tiny encoder.",
        "CKPT",
        "checkpoints",
        required=False,
    )
    suite: Text = option("Suite to run; `mimref presets list` shows the built-in ones.", "NAME|FILE.toml")
    workers: Text = option("Processes that read images.", "N", "workers")


def transfer(options: SuiteOptions) -> None:
    """Measure encoders on several data sets.

    A suite lists data sets, each with a protocol. Its entries run one after another; finished entries never run again.
    The table includes their average and, for several encoders, the average rank.

    Examples:
      mimref transfer --suite quickstart
      mimref transfer mae_l16 runs/mae_l16 --suite vtab-natural --set data.root=/data/vtab --out runs/vtab
    """
    from mimref.config.load import flatten, load_config
    from mimref.transfer.suite.config import SuiteConfig
    from mimref.transfer.suite.plan import ask_for_suite

    earlier = options.resumed("suite.toml", None)
    config = options.load(SuiteConfig, earlier or options.suite, ask_for_suite)
    if earlier and (file := options.suite):
        # Encoders and common settings stay those of the suite in the folder.
        given = options.checks.run("suite", lambda: load_config(SuiteConfig, file))
        if given is not None:
            config = config.model_copy(update={"entries": given.entries})
            common, kept = (flatten(each.model_dump(exclude_unset=True)) for each in (given, config))
            if ignored := [key for key in common if key != "preset" and common[key] != kept.get(key)]:
                note(f"{file}: {', '.join(ignored)} not read; the settings in {earlier} hold", options)
    name = Path(config.preset or "suite").stem
    out = options.out = options.out or Path("runs") / f"{config.command}-{name}"

    from mimref.transfer.suite.run import run_suite

    work = partial(run_suite, out=out, resume=options.resume, force=options.force)
    advice = "--resume runs what is not finished"
    result = run_on_ranks(config, options, work, advice=advice)
    if result is None:
        return
    if result.rows:
        from mimref.files import write_bytes
        from mimref.reports.figures import plot_comparison
        from mimref.reports.metrics import suite_base, suite_lines
        from mimref.reports.tables import markdown_table
        from mimref.reports.terminal import print_comparison

        lines = suite_lines(result.rows)
        base = suite_base(result.rows)
        write_bytes(out / "results.md", markdown_table(lines, base).encode())
        print_comparison(lines, base)
        with figure(out / "suite.png", options):
            plot_comparison(out / "suite.png", lines, base)
        write_page(out, options)
    if result.failed:
        raise UserErrors(result.failed)
