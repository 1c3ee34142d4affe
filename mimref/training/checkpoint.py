"""Saved training states, and whether they fit the run that resumes from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mimref.data.sources import ImageSource
from mimref.distributed.collectives import gather_lists
from mimref.errors import DataError, OutputError
from mimref.files import is_whole
from mimref.progress import Listener


def _read_state(file: Path) -> dict[str, Any] | None:
    """A state on the CPU; None when the file is no longer as torch.save has written it."""
    try:
        with open(file, "rb") as opened:
            if not is_whole(opened):
                return None
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(file, error.strerror) from error
    except Exception as error:
        if "PytorchStreamReader" in str(error):
            return None
        # Not damaged: there is no memory for it, or it was written by a torch that this one does not understand.
        raise _unreadable(file, str(error).partition("\n")[0] or type(error).__name__) from error
    return state


def _unreadable(file: Path, reason: str | None) -> OutputError:
    return OutputError(f"{file}: cannot be read ({reason})")


def check_ranks(state: Mapping[str, Any] | None, source: ImageSource) -> None:
    """Raise DataError unless all ranks go on from the same step with as many images."""
    own = (state["step"] if state else 0, len(source))
    if len(found := set(gather_lists([own]))) > 1:
        steps, images = ({pair[place] for pair in found} for place in (0, 1))
        differing = f"images: {sorted(images)}" if len(images) > 1 else f"saved states: of steps {sorted(steps)}"
        raise DataError(f"the processes see different {differing}; --data and --out must be the same for all of them")


def images_of(source: ImageSource) -> tuple[int, str]:
    """What a state keeps of the images, for `check_images`."""
    return len(source), source.fingerprint


def check_images(state: Mapping[str, Any], source: ImageSource, listener: Listener) -> None:
    """Compare the images with those a run was started with.

    Raises DataError when there are more or fewer, since order and schedules follow their number; warns of other ones.
    """
    count, fingerprint = state["images"]
    if count != len(source):
        raise DataError(
            f"cannot resume with {len(source)} images, the run was started with {count}; "
            "bring the others back, or start anew in another --out"
        )
    if fingerprint != source.fingerprint:
        listener.warn("image files have changed since the run was started; it goes on with them as they are now")
