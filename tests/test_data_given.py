"""Images passed by a caller: every form of an image gives the same pixels, and errors name what is not an image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimref.data.given import GivenSource
from mimref.data.pixels import Decoding
from mimref.errors import DataError

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GRAY = RGB[:, :, 0]
EXPECTED = torch.from_numpy(RGB).permute(2, 0, 1)
FORMS = {
    "array": RGB,
    "array, channels first": RGB.transpose(2, 0, 1),
    "array, reversed": RGB[:, ::-1][:, ::-1],
    "floats": RGB.astype(np.float32) / 255,
    "doubles": RGB / 255,
    "tensor": torch.from_numpy(RGB).permute(2, 0, 1),
    "tensor, floats": torch.from_numpy(RGB).permute(2, 0, 1) / 255,
    "PIL": Image.fromarray(RGB),
    "RGBA": Image.fromarray(np.dstack([RGB, GRAY])),
    "array with alpha": np.dstack([RGB, GRAY]),
}
GRAYS = {
    "array": GRAY,
    "one channel": GRAY[:, :, None],
    "channel first": GRAY[None],
    "tensor": torch.from_numpy(GRAY)[None],
    "PIL": Image.fromarray(GRAY),
}


def source(images: Any, **decoding: str) -> GivenSource:
    return GivenSource(images, Decoding(**decoding))


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_colours(form: str) -> None:
    image = source([FORMS[form]]).read(0)
    assert image.dtype == torch.uint8 and image.is_contiguous() and torch.equal(image, EXPECTED)


@pytest.mark.parametrize("form", GRAYS)
def test_forms_of_gray(form: str) -> None:
    assert torch.equal(source([GRAYS[form]]).read(0), EXPECTED[:1].expand(3, -1, -1))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_are_turned_as_their_files_are(orientation: int, form: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{form.lower()}"
    Image.fromarray(RGB).save(path, form, exif=exif)
    for how in ("exif", "file"):
        found = source([str(path), Image.open(path)], orientation=how)
        assert torch.equal(found.read(0), found.read(1)), how


def test_forms_of_many() -> None:
    stacked = np.stack([RGB, RGB[::-1]])
    for images in (stacked, list(stacked), tuple(stacked), torch.from_numpy(stacked).permute(0, 3, 1, 2)):
        found = source(images)
        assert len(found) == 2 and torch.equal(found.read(0), EXPECTED) and found.in_memory
    # Sizes may differ.
    assert source([RGB, GRAY[:2]]).read(1).shape == (3, 2, 7)


def test_paths(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    for images in ([tmp_path / "a.png"], np.array([str(tmp_path / "a.png")]), np.array([tmp_path / "a.png"], object)):
        found = source(images)
        assert torch.equal(found.read(0), EXPECTED) and found.path(0) == str(tmp_path / "a.png")
        assert not found.in_memory


def test_true_and_false_are_white_and_black() -> None:
    assert source([GRAY > 128]).read(0).unique().tolist() == [0, 255]


def test_alpha_is_decoded_as_settings_say() -> None:
    clear = np.dstack([RGB, np.zeros_like(GRAY)])
    for image in (clear, Image.fromarray(clear)):
        assert source([image], alpha="white").read(0).unique().tolist() == [255]


MISTAKES: dict[str, tuple[Any, str]] = {
    "a path": ("a.png", "X is one path"),
    "an image": (Image.new("L", (2, 2)), "X is one image"),
    "nothing": ([], "no image"),
    "a number": (3, "int"),
    "rows": (np.zeros((4, 64)), r"\(4, 64\)"),
    "numbers": ([1, 2], r"X\[0\].*int"),
    "a row among images": ([GRAY, np.zeros(4)], r"X\[1\].*\(4,\)"),
    "an empty image": ([np.zeros((0, 4), np.uint8)], r"X\[0\].*\(0, 4\)"),
    "five channels": ([np.zeros((5, 6, 7), np.uint8)], r"\(5, 6, 7\)"),
    "a table": ({"a": 1}, "dict"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_no_list_of_images(name: str) -> None:
    images, words = MISTAKES[name]
    with pytest.raises(DataError, match=words):
        source(images)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (GRAY.astype(np.int64), "int64"),
        (GRAY.astype(np.float32), "from .* to 248"),
        (np.full((2, 2), np.nan), "nan"),
        (np.full((2, 2), -0.5), "-0.5"),
    ],
)
def test_pixels_of_unknown_range(pixels: Any, words: str) -> None:
    with pytest.raises(DataError, match=rf"X\[1\].*{words}"):
        source([GRAY, pixels]).read(1)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "gone.png"):
        with pytest.raises(DataError, match=name):
            source([tmp_path / name]).read(0)


def test_the_fingerprint(tmp_path: Path) -> None:
    """The fingerprint depends on the pixels and their order, not on the form of the images."""
    same = {source([FORMS[form], GRAY]).fingerprint for form in ("array", "floats", "tensor", "PIL", "RGBA")}
    assert len(same) == 1
    others = [[GRAY, RGB], [RGB], [RGB, GRAY, GRAY], [RGB, GRAY.T], [RGB, 255 - GRAY]]
    assert len(same | {source(images).fingerprint for images in others}) == 6
    Image.fromarray(RGB).save(tmp_path / "a.png")
    before = source([tmp_path / "a.png"]).fingerprint
    assert source([str(tmp_path / "a.png")]).fingerprint == before
    Image.fromarray(RGB[:3]).save(tmp_path / "a.png")
    assert source([tmp_path / "a.png"]).fingerprint != before
