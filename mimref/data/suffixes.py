"""Which files are images, by the suffixes of their names, and which of the others could be."""

import os
from collections.abc import Mapping
from functools import cache

from PIL import Image

from mimref.data.decode import printable

# What Pillow recognises and cannot decode alone: it needs Ghostscript, a handler or Windows, or finds no still image.
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
"""Images where `data.channels` says how many channels they have."""


@cache
def image_suffixes(*, arrays: bool = False) -> frozenset[str]:
    """Suffixes, in lower case with their dot, of the formats that this Pillow decodes to still images.

    arrays: those of NumPy's files as well.
    """
    if arrays:
        return image_suffixes() | ARRAYS
    Image.preinit()  # the common formats first, which is the order in which files are tried
    known = Image.registered_extensions()
    # Pillow registers .mpo for writing alone, and reads it as JPEG.
    return frozenset(
        suffix for suffix, kind in known.items() if kind == "MPO" or (kind in Image.OPEN and kind not in _NOT_DECODED)
    )


def is_image(name: str, *, arrays: bool = False) -> bool:
    """Whether a file's name says that Pillow decodes it; with `arrays`, or that it is an array."""
    return os.path.splitext(name)[1].lower() in image_suffixes(arrays=arrays)


def unused_kind(name: str) -> str | None:
    """The kind of a file that is not used and could be an image; None for what is surely none, and hidden files."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    suffix = suffix.lower()
    if suffix == ".icloud":
        return suffix  # `.photo.jpg.icloud` stands for a file that macOS has not downloaded
    if stem.startswith(".") or suffix in _OTHER_FILES or (not suffix and stem.strip().upper() in _OTHER_NAMES):
        return None
    return suffix if 1 < len(suffix) <= _LONGEST_SUFFIX and not suffix.isspace() else "without a suffix"


def unused_files(where: str, kinds: Mapping[str, int]) -> list[str]:
    """A notice of the files by kind, as a list of one line or none. where: printable."""
    if not kinds:
        return []
    count = sum(kinds.values())
    return [f"{where}: {count} {'file is' if count == 1 else 'files are'} not used: {count_kinds(kinds)}"]


def count_kinds(kinds: Mapping[str, int]) -> str:
    """`8 .heic, 4 .svg`: the most frequent kinds."""
    common = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{count} {printable(kind)}" for kind, count in common[:_NAMED_KINDS]]
    rest = sum(count for _, count in common[_NAMED_KINDS:])
    return ", ".join([*named, *([f"{rest} of other kinds"] if rest else [])])
