"""Lists of labelled images in files, one image file name per line (the format of MSN's low-shot splits)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mimref.errors import DataError
from mimref.features.matrix import Labels


def read_split_files(paths: Sequence[str | Path], names: Sequence[str]) -> list[Labels]:
    """Return the training indices of the images that each file lists, in the file's order.

    names (N,): paths of the training images. A line with a folder (`n01440764/n01440764_10026.JPEG`) means the image
    whose path ends with it; a bare file name means the image of that name. Empty lines are ignored. All files are read
    first, so that one pass over the names is enough. Raises DataError for a file that cannot be read or lists nothing,
    and for a line that names no training image, several of them, or one that an earlier line names.
    """
    files = [(path, _lines(Path(path))) for path in paths]
    places: dict[str, list[int]] = {_base(line): [] for _, lines in files for line in lines.values()}
    for index, name in enumerate(names):
        base = _base(name)
        if base in places:
            places[base].append(index)
    return [_indices(path, lines, names, places) for path, lines in files]


def _lines(path: Path) -> dict[int, str]:
    """Return the lines that are not empty, by their number, counted from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give a text file with one image name per line") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file; give one image name per line") from None
    lines = {number: line.strip() for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    if not lines:
        raise DataError(f"{path}: lists no images; give one image name per line")
    return lines


def _indices(path: str | Path, lines: dict[int, str], names: Sequence[str], places: dict[str, list[int]]) -> Labels:
    seen: dict[int, int] = {}
    for number, line in lines.items():
        found = _matches(line, names, places[_base(line)])
        where = f"{path}, line {number}: {line!r}"
        if not found:
            raise DataError(
                f"{where} is none of the {len(names)} training images, whose names are like {names[0]!r}; "
                "use splits of this data set"
            )
        if len(found) > 1:
            examples = f"{names[found[0]]!r} and {names[found[1]]!r}"
            raise DataError(f"{where} names {len(found)} training images, such as {examples}; add the folder to it")
        if found[0] in seen:
            raise DataError(f"{where} is already listed in line {seen[found[0]]}; list each image once")
        seen[found[0]] = number
    return np.fromiter(seen, dtype=np.int64, count=len(seen))


def _matches(name: str, names: Sequence[str], candidates: list[int]) -> list[int]:
    """Return the candidates (images with the right base name) in the folder that the line names, if any."""
    if "/" not in name:
        return candidates
    name = name.removeprefix("./")
    exact = [index for index in candidates if names[index] == name]
    return exact or [index for index in candidates if names[index].endswith("/" + name.lstrip("/"))]


def _base(name: str) -> str:
    return name.rpartition("/")[2]
