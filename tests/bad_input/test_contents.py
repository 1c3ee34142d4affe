"""Files that are named like images but hold something else: the reasons given for them."""

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from mimref.data.decode import BadImage, BadImages, none_readable
from mimref.errors import DataError
from tests.sources import decode_image


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a", "b")
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return stream.getvalue()


def many_channels() -> bytes:
    """A TIFF of 1 x 1 pixel with five channels of 8 bits."""
    entries = ((256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 5), (278, 1), (279, 5))
    listed = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + listed + bytes(4)


def media(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1" + bytes(500)


CONTENTS = {
    "heic": (media(b"heic"), "HEIC"),
    "mif1": (media(b"mif1"), "HEIC"),
    "mp4": (media(b"isom"), "video"),
    "mov": (media(b"qt  "), "video"),
    "jxl": (b"\xff\x0a" + bytes(50), "JPEG XL"),
    "jxl in a box": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL"),
    "avi": (b"RIFF\0\0\0\0AVI LIST", "video"),
    "webm": (b"\x1aE\xdf\xa3" + bytes(30), "video"),
    "html": (b"<html>404 not found</html>", "HTML"),
    "doctype": (b"\n<!DOCTYPE html>\n<html lang='en'>", "HTML"),
    "bom": (b"\xef\xbb\xbf<!doctype HTML>", "HTML"),
    "s3": (b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>", "XML"),
    "json": (b'{"message": "not found"}', "JSON"),
    "svg": (b"<?xml version='1.0'?><!-- x --><svg xmlns='x'/>", "SVG"),
    "bare svg": (b"<svg viewBox='0 0 1 1'></svg>", "SVG"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", "git lfs pull"),
    "annex": (b"/annex/objects/MD5E-s1--0.jpg\n", "git annex get"),
    "pdf": (b"%PDF-1.7\n", "PDF"),
    "zip": (zipped(), "ZIP"),
    "tar": (tarred(), "tar"),
    "gzip": (gzip.compress(b"image"), "gzip"),
    "dicom": (bytes(128) + b"DICM" + bytes(100), "DICOM"),
    "numpy": (b"\x93NUMPY\x01\0", "NumPy"),
    "apple": (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "AppleDouble"),
    "zeros": (bytes(4096), "zeros"),
    "jpeg": (b"\xff\xd8\xff\xe0", "damaged JPEG"),
    "png": (b"\x89PNG\r\n\x1a\nxxxx", "damaged PNG"),
    "many channels": (many_channels(), "TIFF of a kind"),
    "empty": (b"", "empty file"),
    "text": (b"text", "not an image"),
    "binary": (b"\x01\x02\x03\x04" * 9, "not an image"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_content_is_named(tmp_path: Path, name: str) -> None:
    content, expected = CONTENTS[name]
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImage) as caught:
        decode_image(str(path))
    assert expected in caught.value.reason
    assert caught.value.reason.isprintable()


def test_none_readable_names_three() -> None:
    bad = [(f"{n}.jpg", "empty file") for n in range(4)]
    message = str(none_readable("data", bad))
    assert message.startswith("data: no readable image of 4: 0.jpg (empty file), 1.jpg (empty file), 2.jpg (")
    assert "3.jpg" not in message and ", ..." in message
    assert "(empty file)" in str(none_readable("data", bad[:1]))


def test_advice_to_allow_more_needs_a_readable_image() -> None:
    for readable in (True, False):
        bad = BadImages(0)
        bad.some_readable = readable
        with pytest.raises(DataError) as caught:
            bad.add("a.jpg", "empty file")
        assert ("raise data.max_bad" in str(caught.value)) == readable
