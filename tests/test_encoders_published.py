"""Published weights by name: cached copies, failed downloads, and unknown pairs of architecture and source."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mimref.cli import run
from mimref.config.presets import choose_refine_preset
from mimref.encoders import published as known
from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.published import ADDRESSES, fetch, find_published, official_name
from mimref.errors import CheckpointError
from tests.checkpoints import load_encoder, mae_vit


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIMREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def publish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, md5: str | None = None) -> bytes:
    """Make `mae_l16` refer to a small local file; return its content."""
    torch.save({"model": dict(mae_vit().state_dict())}, tmp_path / "published.pth")
    content = (tmp_path / "published.pth").read_bytes()
    monkeypatch.setitem(ADDRESSES, "mae_l16", (tmp_path / "published.pth").as_uri())
    monkeypatch.setitem(known._MD5, "mae_l16", md5 or hashlib.md5(content).hexdigest()[:6])
    return content


def test_weights_are_downloaded_once_and_cached(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = publish(monkeypatch, tmp_path)
    reports: list[tuple[str, int, int]] = []
    checkpoint = read_checkpoint("mae_l16", progress=lambda *values: reports.append(values))
    assert [path.name for path in cache.iterdir()] == ["mae_l16.pth"]
    assert (cache / "mae_l16.pth").read_bytes() == content
    assert reports[-1] == ("download of mae_l16 in MB", len(content) // 10**6, len(content) // 10**6)
    assert (checkpoint.source, checkpoint.licence) == ("mae", "CC-BY-NC-4.0")
    (tmp_path / "published.pth").unlink()
    assert read_checkpoint("mae_l16").path == cache / "mae_l16.pth"
    # Under another name, the source of the same file is unknown.
    (cache / "mae_l16.pth").rename(tmp_path / "mine.pth")
    mine = read_checkpoint(tmp_path / "mine.pth")
    assert (mine.source, mine.licence) == (None, None)


def test_other_content_than_published_is_not_cached(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, tmp_path, md5="000000")
    with pytest.raises(CheckpointError, match=r"^mae_l16: .*MD5.*000000"):
        read_checkpoint("mae_l16")
    assert list(cache.iterdir()) == []


def test_short_downloads_are_not_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Response:
        def __init__(self) -> None:
            self.headers = {"Content-Length": "10"}
            self.pieces = [b"1234", b""]

        def read(self, _: int) -> bytes:
            return self.pieces.pop(0)

        def __enter__(self) -> "Response":
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(known, "urlopen", lambda *_, **__: Response())
    with pytest.raises(CheckpointError, match=r"^dino_b16: .*4 of 10 bytes"):
        fetch(find_published("dino_b16"))  # type: ignore[arg-type]
    assert list(cache.iterdir()) == []


def test_without_a_network_one_line_says_which_file_to_put_where(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(known, "urlopen", refuse)
    assert run(["inspect", "d2v2_refined_h14"]) == 2
    message = capsys.readouterr().err
    assert (
        message.count("\n") == 1 and "cannot be fetched (Name or service not known); save https://ml.jku.at" in message
    )
    assert f"as {cache / 'd2v2_refined_h14.th'}" in message


@pytest.mark.parametrize(
    ("arch", "source", "name", "preset"),
    [
        ("vit_h14", "d2v2", "d2v2_h14", "refine/d2v2_h14"),
        ("vit_2b14", "mae", "mae_2b14", "refine/mae_2b14"),
        ("vit_b16", "ibot", "ibot_b16", "refine/mae_b16"),
        ("vit_l16", "crossmae", "crossmae_l16", "refine/mae_l16"),
    ],
)
def test_arch_and_source_name_preset_and_weights(arch: str, source: str, name: str, preset: str) -> None:
    assert official_name(arch, source) == name
    assert choose_refine_preset(None, arch, source, None) == preset


def test_pairs_that_do_not_exist_say_which_do() -> None:
    sources = "mae, maws, d2v2, dbot, crossmae, ibot, mugs, msn"
    with pytest.raises(CheckpointError, match=rf"vit_l16 from ijepa: .* {sources}; ijepa .* vit_h14; .*--weights"):
        official_name("vit_l16", "ijepa")
    with pytest.raises(CheckpointError, match=r"vit_s32 from magic: .*--weights"):
        official_name("vit_s32", "magic")


def test_the_papers_eight_released_models_are_known() -> None:
    released = [name for name in ADDRESSES if "_refined_" in name]
    assert len(released) == 8
    assert all(re.fullmatch(r"https://ml\.jku\.at/.*\.th", ADDRESSES[name]) for name in released)
    assert all(find_published(name).licence is None for name in released)  # type: ignore[union-attr]


def test_the_documentation_lists_all_names_with_their_licence() -> None:
    page = (Path(__file__).parents[1] / "docs" / "refine.md").read_text(encoding="utf-8")
    section = page.partition("### Published weights\n")[2].partition("\n### ")[0]
    listed = {
        name: licence
        for line in section.splitlines()
        if line.startswith("| ") and "`" in line
        for _, names, licence in [line.strip("| ").split(" | ")]
        for name in re.findall(r"`(\w+)`", names)
    }
    published = map(find_published, ADDRESSES)
    assert listed == {each.name: each.licence or "not stated" for each in published if each is not None}


def test_misspelt_names_have_a_hint() -> None:
    with pytest.raises(CheckpointError, match=r"^mae_l61: .*'mae_l16'"):
        read_checkpoint("mae_l61")


def test_weights_by_timms_names(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained and name == "test_vit2":
            raise RuntimeError("no network")
        torch.manual_seed(3)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    encoder, header = load_encoder("timm:test_vit")
    assert header["source"] == "timm" and encoder.depth == 6
    assert header["transform"]["mean"] == header["transform"]["std"] == [0.5] * 3  # not ImageNet's
    with pytest.raises(CheckpointError, match=r"^timm:test_vit2: .*no network"):
        load_encoder("timm:test_vit2")
    backbone, header = load_encoder("timm:resnet18")
    assert header["source"] == "timm" and backbone.widths == [64, 64, 128, 256, 512]


def test_refine_takes_published_weights_by_name(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    publish(monkeypatch, tmp_path)
    line = ["refine", "--weights", "mae_l16", "--data", "digits", "--dry-run", "--batch-size", "64"]
    small = {"heads.blocks": "last2", "heads.queue_size": "512", "views.global_size": "16", "views.local_size": "8"}
    settings = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    assert run([*line, *settings]) == 0
    captured = capsys.readouterr()
    assert "runs/refine-recipe" in captured.out and str(cache / "mae_l16.pth") in captured.out


@pytest.mark.parametrize(
    "line",
    [
        ["knn", "mae_l16"],
        ["extract", "mae_l16", "--out", "features.npz"],
        ["compare", "mae_l16", "mae_h14"],
        ["segment", "mae_l16"],
        ["finetune", "mae_l16"],
        ["refine", "--arch", "vit_l16", "--source", "mae"],
        ["refine", "--weights", "timm:test_vit"],
    ],
)
def test_nothing_is_downloaded_before_images_are_named(
    line: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    publish(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run([*line, "--device", "cpu"]) == 2
    assert "pass --data" in capsys.readouterr().err
    assert not cache.exists()
