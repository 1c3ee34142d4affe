"""JPEG files decoded at a fraction of their size; bad_input/test_images.py tests the rest of `decode_image`."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimref.data.decode import BadImage, decode_file
from tests.sources import decode_image

SIZE = (61, 90)  # height and width: 61 is not divisible by 2, 90 not by 4 or 8


@pytest.fixture(autouse=True)
def no_warnings() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def photograph(mode: str = "RGB") -> Image.Image:
    """An image with smooth colours and some texture."""
    down, right = np.mgrid[: SIZE[0], : SIZE[1]]
    waves = [128 + 90 * np.sin(down / a + right / b) for a, b in ((9, 14), (17, -8), (25, 5))]
    noise = np.random.default_rng(0).normal(0, 6, (*SIZE, 3))
    return Image.fromarray(np.clip(np.stack(waves, axis=2) + noise, 0, 255).astype(np.uint8)).convert(mode)


def means(image: torch.Tensor, factor: int) -> torch.Tensor:
    """Means of squares of factor x factor pixels; pixels beyond the edge are ignored."""
    return torch.nn.functional.avg_pool2d(image.float(), factor, ceil_mode=True)


@pytest.mark.parametrize("factor", [2, 8])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 0}),
        ("L", {}),
        ("CMYK", {}),
        ("RGB", {"exif": 6}),
        ("RGB", {"format": "MPO"}),
    ],
    ids=["plain", "progressive", "full colour", "gray", "cmyk", "turned", "several pictures"],
)
def test_jpeg_is_reduced_by_the_factor(tmp_path: Path, mode: str, options: dict[str, Any], factor: int) -> None:
    path = str(tmp_path / "image.jpg")
    options = {**options, "quality": 95}
    if "exif" in options:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    if options.get("format") == "MPO":
        options |= {"save_all": True, "append_images": [photograph(mode)]}
    photograph(mode).save(path, **options)
    asked: list[tuple[int, int]] = []

    def reduce(height: int, width: int) -> int:
        asked.append((height, width))
        return factor

    decoded = decode_file(path, reduce)
    assert asked == [SIZE]
    assert (decoded.height, decoded.width) == SIZE
    assert decoded.image.dtype == torch.uint8
    assert decoded.image.shape == (3, -(-SIZE[0] // factor), -(-SIZE[1] // factor))
    whole = decode_image(path)
    assert whole.shape == (3, *SIZE)
    # The last row and column may contain padding from the JPEG encoder.
    apart = (decoded.image - means(whole, factor)).abs()[:, :-1, :-1]
    assert apart.mean() < 2
    decoded.image[0, 0, 0] = 1  # writable


@pytest.mark.parametrize("height", [8, 9, 15, 16, 17, 25])
def test_every_size_is_rounded_up(tmp_path: Path, height: int) -> None:
    path = str(tmp_path / "image.jpg")
    Image.new("RGB", (31, height)).save(path)
    for factor in (1, 2, 4, 8):
        assert decode_file(path, lambda *_, factor=factor: factor).image.shape == (
            3,
            -(-height // factor),
            -(-31 // factor),
        )


def test_factor_1_decodes_in_full(tmp_path: Path) -> None:
    path = str(tmp_path / "image.jpg")
    photograph().save(path)
    whole = decode_image(path)
    for decoded in (decode_file(path), decode_file(path, lambda *_: 1)):
        assert torch.equal(decoded.image, whole)
        assert decoded.image[None].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_other_formats_are_decoded_in_full(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"image.{suffix}")
    photograph().save(path)

    def reduce(height: int, width: int) -> int:
        raise AssertionError("asked for a factor")

    decoded = decode_file(path, reduce)
    assert torch.equal(decoded.image, decode_image(path))
    assert (decoded.height, decoded.width) == SIZE


def test_bad_files_have_the_same_reason_at_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.jpg"
    photograph().save(path, quality=95)
    content = path.read_bytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert reasons(path) == {"more than 1000 pixels"}  # the pixels of the file, not of the decoded image
    monkeypatch.undo()
    path.write_bytes(content[: len(content) // 2])
    (truncated,) = reasons(path)
    assert "truncated" in truncated
    path.write_bytes(b"")
    assert reasons(path) == {"empty file"}
    path.unlink()
    assert reasons(path) == {"no such file or directory"}


def reasons(path: Path) -> set[str]:
    """The reasons given for a bad file at full and at reduced size."""
    said = set()
    for factor in (1, 8):
        with pytest.raises(BadImage) as caught:
            decode_file(str(path), lambda *_, factor=factor: factor)
        said.add(caught.value.reason)
    return said


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadImage, match=r"a\.png \(not a regular file\)"):
        decode_file(str(tmp_path / "a.png"))
    with pytest.raises(BadImage, match="not a regular file"):
        decode_file("/dev/zero")
