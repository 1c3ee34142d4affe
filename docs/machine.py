"""Generate this machine's pages, which docs/gpu.md includes: `python docs/machine.py` (about 3 min on two cores)."""

import subprocess
import sys
import tempfile
from pathlib import Path

PAGES = Path(__file__).parent / "machine"
COMMANDS = {"doctor": ("doctor",), "benchmark": ("benchmark", "all")}


def main() -> int:
    """Run both commands in a temporary folder, copy their pages, and return the higher exit code."""
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        for name, command in COMMANDS.items():
            run = subprocess.run([sys.executable, "-m", "mimref", *command, "--out", name], cwd=folder)
            codes.append(run.returncode)
            (PAGES / f"{name}.md").write_bytes(Path(folder, name, "results.md").read_bytes())
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
