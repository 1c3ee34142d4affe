"""Entry point of `python -m mimref`, the `mimref` script and torchrun."""

import os
import signal
import sys
import traceback

from mimref.cli import run


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        code = run(sys.argv[1:])
    except Exception:
        if not _abandoned():
            raise
        traceback.print_exc()
        code = 1
    if _abandoned():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code > 128:
        # A signal has stopped the run and everything is saved: another signal would only change the exit code.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _abandoned() -> bool:
    """See `distributed.group.abandoned`; False for commands that have not imported that module."""
    group = sys.modules.get("mimref.distributed.group")
    return group is not None and bool(group.abandoned())


if __name__ == "__main__":
    main()
