"""Saved training states: files that are complete or absent, and whether they fit the run that resumes from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mimref.data.sources import ImageSource
from mimref.distributed.collectives import gather_lists
from mimref.errors import ConfigError, DataError, OutputError
from mimref.files import atomic_write, is_whole, remove_halves
from mimref.progress import Listener


def write_state(file: Path, state: Mapping[str, Any]) -> None:
    """Write a state atomically. Raises OutputError if it cannot be written."""
    with atomic_write(file) as stream:
        torch.save(dict(state), stream)


def read_state(file: Path) -> dict[str, Any] | None:
    """Return a state on the CPU, or None if the file is damaged.

    Reads the file twice, because torch verifies no checksums. Raises OutputError if it cannot be read.
    """
    try:
        with open(file, "rb") as opened:
            if not is_whole(opened):
                return None
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OutputError(f"{file}: cannot be read ({error.strerror})") from error
    except Exception as error:
        if "PytorchStreamReader" in str(error):
            return None
        # Not damaged: memory ran out, or the file was written by a version of torch that this one cannot read.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OutputError(f"{file}: cannot be read ({reason})") from error
    return state


def matching_state(file: Path, identity: Mapping[str, Any], what: str) -> dict[str, Any] | None:
    """Return the state in a file, whose `settings` must equal `identity`; None if the file does not exist.

    what: name of what is continued, such as `probe`. Raises ConfigError for a file with other settings or images,
    OutputError for a damaged one.
    """
    remove_halves(file.parent, file.name)
    if not file.exists():
        return None
    state = read_state(file)
    settings = None if state is None else state.get("settings")
    if state is None or not isinstance(settings, Mapping):
        raise damaged_state(file, what)
    for key, value in identity.items():
        if (other := settings.get(key)) != value:
            raise ConfigError(
                f"cannot continue the {what} of {file} with another {key}: it was {other!r} and is now {value!r}; "
                "restore it, or remove the file to start from scratch"
            )
    return state


def damaged_state(file: Path, what: str) -> OutputError:
    """Return the error for a state whose contents are not as expected."""
    return OutputError(f"{file}: damaged state of a {what}; remove the file to start from scratch")


def check_ranks(state: Mapping[str, Any] | None, source: ImageSource) -> None:
    """Raise DataError unless all ranks resume from the same step with the same number of images."""
    own = (state["step"] if state else 0, len(source))
    if len(found := set(gather_lists([own]))) > 1:
        steps, images = ({pair[place] for pair in found} for place in (0, 1))
        differing = f"images: {sorted(images)}" if len(images) > 1 else f"saved states: of steps {sorted(steps)}"
        raise DataError(f"the processes see different {differing}; --data and --out must be the same for all of them")


def check_images(state: Mapping[str, Any], source: ImageSource, listener: Listener) -> None:
    """Compare the images with those with which the run was started.

    state["images"]: their number and fingerprint. Raises DataError if the number differs, since order and schedules
    depend on it; warns if the fingerprint differs.
    """
    count, fingerprint = state["images"]
    if count != len(source):
        raise DataError(
            f"cannot resume with {len(source)} images, the run was started with {count}; "
            "restore the images, or start over in another --out"
        )
    if fingerprint != source.fingerprint:
        listener.warn("image files have changed since the run was started; it continues with the new ones")
