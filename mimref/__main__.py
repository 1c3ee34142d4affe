"""`python -m mimref`, the `mimref` script and torchrun's entry."""

import sys

from mimref.cli import run


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
