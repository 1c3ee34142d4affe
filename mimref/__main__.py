"""`python -m mimref`, the `mimref` script and torchrun's entry."""

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
        # A signal stopped the run, and all is saved: another one would only change the exit code.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _abandoned() -> bool:
    """See `distributed.group.abandoned`; that module is not imported for commands without it."""
    group = sys.modules.get("mimref.distributed.group")
    return group is not None and bool(group.abandoned())


if __name__ == "__main__":
    main()
