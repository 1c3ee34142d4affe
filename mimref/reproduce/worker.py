"""The process of one run: `python -m mimref.reproduce.worker COMMAND SETTINGS.toml FOLDER`.

It ends, after saving, when the suite's process is gone. What it reports goes to standard error, the run's log.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from mimref.config.load import load_config
from mimref.errors import Interrupted, UserError
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.evaluation.blocks.protocol import evaluate_blocks
from mimref.progress import Listener
from mimref.refinement.config import RefineConfig
from mimref.refinement.run import refine
from mimref.results import write_results
from mimref.training.folder import RunFolder


class Log(Listener):
    """Writes notes and warnings with their time of day."""

    def note(self, message: str) -> None:
        """See `Listener`."""
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {message}\n")
        sys.stderr.flush()

    def warn(self, message: str) -> None:
        """See `Listener`."""
        self.note(f"warning: {message}")


def work(command: str, settings: Path, folder: Path) -> None:
    """Start the run, or continue what a killed process has left of it."""
    listener = Log()
    if command == RefineConfig.command:
        refine(load_config(RefineConfig, str(settings)), folder, resume=RunFolder(folder).unfinished, listener=listener)
        return
    config = load_config(BlocksConfig, str(settings))
    result = evaluate_blocks(config, listener=listener)
    write_results(folder, command, config.model_dump(mode="json"), result.elapsed_s, result.rows)


def _stop_when_left() -> None:
    """Wait until the suite's process is gone, which holds the other end of standard input."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(command: str, settings: str, folder: str) -> int:
    """Exit code as that of the command."""
    threading.Thread(target=_stop_when_left, daemon=True).start()
    try:
        work(command, Path(settings), Path(folder))
    except UserError as error:
        Log().note(f"error: {' '.join(str(error).split())}")
        return 2
    except Interrupted as interruption:
        Log().note(interruption.message)
        return 128 + interruption.signum
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
