"""Recognition of image files by suffix, and of unused files that could be images."""

import os
from collections.abc import Mapping
from functools import cache

from PIL import Image

from mimref.data.decode import printable

# Formats that Pillow recognises but cannot decode: they need Ghostscript, a handler or Windows, or hold no still image.
_NOT_DECODED = frozenset(["BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"])
_NOTES = ".txt .md .rst .rtf .tex .bib .doc .docx .odt .csv .tsv .xls .xlsx .ods .json .jsonl .geojson .xml .cls"
_CODE = ".yaml .yml .toml .ini .cfg .conf .log .html .htm .css .js .py .pyc .ipynb .r .sh .bat .mk"
_LEFTOVERS = (
    ".db .lnk .url .webloc .torrent .aae .xmp .md5 .sha1 .sha256 .sfv .pth .pt .ckpt .onnx .safetensors .wav .mp3"
)
_OTHER_FILES = frozenset(f"{_NOTES} {_CODE} {_LEFTOVERS}".split())
_WITHOUT_SUFFIX = "README LICENSE LICENCE COPYING NOTICE AUTHORS CHANGELOG CITATION MAKEFILE DOCKERFILE ICON"
_OTHER_NAMES = frozenset(f"{_WITHOUT_SUFFIX} MD5SUMS SHA1SUMS SHA256SUMS".split())
_LONGEST_SUFFIX = 12
_NAMED_KINDS = 5


ARRAYS = frozenset([".npy", ".npz"])
"""Suffixes of arrays, which are images if `data.channels` states their number of channels."""


@cache
def image_suffixes(*, arrays: bool = False) -> frozenset[str]:
    """Return the suffixes (lower case, with the dot) of the formats that the installed Pillow decodes to still images.

    arrays: include the suffixes of NumPy files.
    """
    if arrays:
        return image_suffixes() | ARRAYS
    Image.preinit()  # the common formats first, as Pillow tries formats in this order
    known = Image.registered_extensions()
    # Pillow registers .mpo for writing only, and reads it as JPEG.
    return frozenset(
        suffix for suffix, kind in known.items() if kind == "MPO" or (kind in Image.OPEN and kind not in _NOT_DECODED)
    )


def is_image(name: str, *, arrays: bool = False) -> bool:
    """Return whether a file has the suffix of an image that Pillow decodes or, with `arrays`, of an array."""
    return os.path.splitext(name)[1].lower() in image_suffixes(arrays=arrays)


def unused_kind(name: str) -> str | None:
    """Return the kind of an unused file that could be an image; None for hidden files and those that surely cannot."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    suffix = suffix.lower()
    if suffix == ".icloud":
        return suffix  # `.photo.jpg.icloud` stands for a file that macOS has not downloaded
    if stem.startswith(".") or suffix in _OTHER_FILES or (not suffix and stem.strip().upper() in _OTHER_NAMES):
        return None
    return suffix if 1 < len(suffix) <= _LONGEST_SUFFIX and not suffix.isspace() else "without a suffix"


def unused_files(where: str, kinds: Mapping[str, int]) -> list[str]:
    """Return a list with a notice that counts unused files by kind; empty if there are none. where: printable."""
    if not kinds:
        return []
    count = sum(kinds.values())
    return [f"{where}: {count} {'file is' if count == 1 else 'files are'} not used: {count_kinds(kinds)}"]


def count_kinds(kinds: Mapping[str, int]) -> str:
    """Return the most frequent kinds with their counts, such as `8 .heic, 4 .svg`."""
    common = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{count} {printable(kind)}" for kind, count in common[:_NAMED_KINDS]]
    rest = sum(count for _, count in common[_NAMED_KINDS:])
    return ", ".join([*named, *([f"{rest} of other kinds"] if rest else [])])
