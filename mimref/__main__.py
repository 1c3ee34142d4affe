"""`python -m mimref`, the `mimref` script and torchrun's entry."""

import signal
import sys

from mimref.cli import run


def main() -> None:
    """Run the command line and exit with its code."""
    code = run(sys.argv[1:])
    if code > 128:
        # A signal stopped the run, and all is saved: another one would only change the exit code.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    main()
