"""Image sources in one line, folders of tiny images, and the memory that reading costs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from mimref.config.base import DataConfig
from mimref.data.decode import decode_file
from mimref.data.open import open_source
from mimref.data.sources import ImageSource


def opened(spec: object, split: Any = "train", *, need_labels: bool = False, **settings: Any) -> ImageSource:
    """Open the images of a spec; `settings` are those of `DataConfig`."""
    return open_source(DataConfig(spec=str(spec), **settings), split, need_labels=need_labels)


def decode_image(path: str) -> Tensor:
    """Return an image file at full size, as sources read it."""
    return decode_file(path).image.contiguous()


def names(source: ImageSource, root: Path) -> list[str]:
    """Return the paths of all images below `root`, in the source's order."""
    return [Path(source.path(index)).relative_to(root).as_posix() for index in range(len(source))]


def classes_of(source: ImageSource) -> list[str]:
    """Return the class name of every image."""
    assert source.labels is not None and source.class_names is not None
    return [source.class_names[label] for label in source.labels]


def write_images(folder: Path, *names: str, shade: int = 0) -> None:
    """Write images of 4 x 3 pixels of one colour, whose red counts up from `shade`; the suffix sets the format."""
    for offset, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (shade + offset, 1, 2)).save(path)


def private_kib() -> int:
    """Return the memory of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean")))


def growth_in_a_child(read: Callable[[int], object], count: int) -> int:
    """Return by how many KiB a forked process grows when it reads `count` items that its parent holds."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        before = private_kib()
        for index in range(count):
            read(index)
        os.write(theirs, str(private_kib() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(theirs)
    with open(ours) as pipe:
        return int(pipe.read())
