"""The process of one run: `python -m mimref.reproduce.worker COMMAND SETTINGS.toml FOLDER`.

It saves its state and ends when the suite's process is gone. Its output goes to standard error, which is the run's log.
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
    """Start the run, or resume what a killed process has left of it."""
    listener = Log()
    if command == RefineConfig.command:
        refine(load_config(RefineConfig, str(settings)), folder, resume=RunFolder(folder).unfinished, listener=listener)
        return
    config = load_config(BlocksConfig, str(settings))
    result = evaluate_blocks(config, listener=listener)
    used, bad = config.model_dump(mode="json"), result.bad_images
    write_results(folder, command, used, result.elapsed_s, result.rows, bad_images=bad)


def _stop_when_left() -> None:
    """Stop this process when the suite's process, which holds the other end of standard input, is gone."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(command: str, settings: str, folder: str) -> int:
    """Carry out the run. Returns the exit code that its command would."""
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
