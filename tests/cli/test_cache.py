"""`mimref cache`: what it lists and deletes besides features (for these, see `test_features_cache.py`)."""

from pathlib import Path

import pytest

from mimref.cli import run
from mimref.config.base import DataConfig
from mimref.data.index import cache as index_cache
from mimref.data.open import open_source
from mimref.files import cache_folder
from tests.tiny import write_images


@pytest.fixture
def two_listings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of two listings; the cache also holds a (damaged) encoder pass."""
    monkeypatch.setattr(index_cache, "SAVE_FROM_IMAGES", 1)
    for name in ("one", "two"):
        open_source(DataConfig(spec=str(write_images(tmp_path / name, per_class=2))), "train")
    features = cache_folder() / "features/0123abcd0123abcd0123"
    features.mkdir(parents=True)
    (features / "block").write_bytes(bytes(2_000_000))
    return cache_folder() / "listings"


def printed(capsys: pytest.CaptureFixture[str], *line: str) -> list[str]:
    assert run(["cache", *line]) == 0
    return capsys.readouterr().out.splitlines()


def test_listings_are_counted(two_listings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (two_listings / "folder-0.npz").write_bytes(bytes(5_000_000))
    lines = printed(capsys, "list")
    assert lines[-2:] == [
        f"2.0 MB in {cache_folder()}/features",
        f"5.0 MB in {two_listings} (listings of folders and shards: 3)",
    ]
    assert any("0123abcd" in line for line in lines)
    # A folder chosen with --cache contains only features.
    assert printed(capsys, "list", "--cache", str(two_listings.parent / "other")) == [
        f"0.0 MB in {two_listings.parent}/other"
    ]


@pytest.mark.parametrize(
    ("line", "listings", "features"),
    [
        ([], 0, 0),
        (["listings"], 0, 1),
        (["0123"], 2, 0),
        (["0123", "listings"], 0, 0),
        (["--cache", "elsewhere"], 2, 1),
        (["listings", "--cache", "elsewhere"], 0, 1),
    ],
)
def test_clear(
    line: list[str],
    listings: int,
    features: int,
    two_listings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = printed(capsys, "clear", *line)
    assert len(list(two_listings.iterdir())) == listings
    assert len(list((cache_folder() / "features").iterdir())) == features
    assert any(line.endswith(f"MB freed in {two_listings}") for line in lines) == (listings == 0)
    assert ("2.0 MB freed in " in lines[0]) == (features == 0)


@pytest.mark.parametrize("keys", [[], ["r"]])
def test_only_passes_are_deleted(keys: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("runs", "r", "0123abcd0123abcd012"):
        (tmp_path / name / "partial").mkdir(parents=True)
    (tmp_path / "f0123abcd0123abcd012").mkdir()
    assert "runs" not in "".join(printed(capsys, "list", "--cache", str(tmp_path)))
    assert run(["cache", "clear", *keys, "--cache", str(tmp_path)]) == (2 if keys else 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["0123abcd0123abcd012", "r", "runs", *(["f0123abcd0123abcd012"] if keys else [])]
    )


def test_an_empty_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "list")[-1] == f"0.0 MB in {cache_folder()}/listings (listings of folders and shards: 0)"
    assert len(printed(capsys, "clear")) == 2
