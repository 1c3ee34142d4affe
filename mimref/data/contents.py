"""Descriptions of files that cannot be read as images, by their first bytes."""

import re

HEAD = 1024
"""Number of bytes that `what_is` needs."""
_CONVERT = "convert it to JPEG or PNG"
_FOREIGN = f"which Pillow cannot read; {_CONVERT}"
_TIFF = (
    "TIFF of a kind that Pillow cannot read (many channels, a camera's raw file) or damaged; pass --channels N for N "
    f"channels, or {_CONVERT}"
)
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), f"AVIF, which this version of Pillow cannot read; {_CONVERT}"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), f"HEIC, {_FOREIGN}"),
    b"crx ": f"a camera's raw file, {_FOREIGN}",
}
"""Descriptions of ISO media files, by the four bytes after `ftyp`."""
_IMAGES = {
    b"\xff\x0a": f"JPEG XL, {_FOREIGN}",
    b"\0\0\0\x0cJXL ": f"JPEG XL, {_FOREIGN}",
    b"\x76\x2f\x31\x01": f"OpenEXR, {_FOREIGN}",
    b"#?R": f"Radiance HDR, {_FOREIGN}",
    b"SIMPLE  =": f"FITS, {_FOREIGN}",
    b"\xff\xd8\xff": "a damaged JPEG",
    b"\x89PNG": "a damaged PNG",
    b"GIF8": "a damaged GIF",
    b"II*\0": _TIFF,
    b"MM\0*": _TIFF,
    b"II+\0": _TIFF,
    b"MM\0+": _TIFF,
    b"BM": "a damaged BMP",
}
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer; run git lfs pull",
    b"/annex/objects/": "a git-annex pointer; run git annex get",
    b"%PDF": "a PDF document",
    b"%!PS": "PostScript",
    b"PK\x03\x04": "a ZIP archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it",
    b"\x1f\x8b": "a file compressed by gzip; unpack it",
    b"BZh": "a file compressed by bzip2; unpack it",
    b"\xfd7zXZ\0": "a file compressed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "a file compressed by zstd; unpack it",
    b"\x1aE\xdf\xa3": "a video (Matroska or WebM)",
    b"FLV\x01": "a video (Flash)",
    b"\0\0\x01\xba": "a video (MPEG)",
    b"\x89HDF": "an HDF5 file",
    b"CDF": "a NetCDF file",
    b"\x93NUMPY": "a NumPy array; save it as an image",
    b"\0\x05\x16\x07": "metadata that macOS stores beside a file (AppleDouble); remove it",
}
_AGAIN = "its download failed, so get it again"


def what_is(head: bytes) -> str:
    """Return why a file that starts with `head` cannot be read as an image, and what to do."""
    if not head:
        return "empty file"
    if image := _unreadable_image(head):
        return image
    other = next((what for start, what in _OTHERS.items() if head.startswith(start)), None) or _container(head)
    return "not an image" + (f" but {other}" if other else "")


def _unreadable_image(head: bytes) -> str | None:
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12])
    if head[128:132] == b"DICM":
        return f"DICOM, {_FOREIGN}"
    text = _text(head)
    if text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in text:
        return f"SVG, {_FOREIGN}"
    return next((what for start, what in _IMAGES.items() if head.startswith(start)), None)


def _container(head: bytes) -> str | None:
    """Describe videos, archives, and what servers send in place of an image; None for other files."""
    if head[4:8] == b"ftyp":
        return "a video (MP4 or QuickTime)"
    if head[:4] == b"RIFF":
        return {b"AVI ": "a video (AVI)", b"WAVE": "sound (WAV)"}.get(head[8:12])
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    if len(head) > 15 and not any(head):
        return "zeros, as an interrupted copy leaves them"
    text = _text(head)
    if re.match(rb"<(!doctype html|html|head|body|script|title)\b", text) or b"<html" in text:
        return f"an HTML page; {_AGAIN}"
    if text.startswith((b"<?xml", b"<error")):
        return f"an XML document; {_AGAIN}"
    if re.match(rb'[\[{]\s*["\[{]', text):
        return f"JSON; {_AGAIN}"
    return None


def _text(head: bytes) -> bytes:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
