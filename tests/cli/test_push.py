"""`mimref push` against a stand-in for the hub: what arrives, and a one-line error for everything that can go wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load

from mimref.cli import run
from mimref.encoders.vit import Architecture
from tests.checkpoints import timm_vit
from tests.hub import TOKEN, Hub, serving
from tests.tiny import write_weights

TINY = Architecture("custom", 16, width=32, depth=2, num_heads=2, patch_size=8)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as served:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(write_weights(tmp_path / "encoder.safetensors", architecture=TINY))


@pytest.fixture
def folder(weights: str, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run(["export", weights, "--to", "hf", "--layout", "timm", "--out", "exported", "--quiet"]) == 0
    capsys.readouterr()
    return Path("exported")


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert run(["push", *args, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and TOKEN not in captured.err, captured.err
    return captured.err.removeprefix("mimref: error: ").strip()


def test_a_folder(folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["push", str(folder), "tiny", "--private", "--message", "first"]) == 0
    assert capsys.readouterr().out.split() == ["address", f"{hub.address}/me/tiny"]
    repository = hub.repositories["me/tiny"]
    assert repository.private and repository.messages == ["first"]
    assert repository.files == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_owners_default_decides_whether_a_repository_is_private(folder: Path, hub: Hub) -> None:
    hub.private = True
    assert run(["push", str(folder), "lab/tiny", "--quiet"]) == 0
    assert hub.repositories["lab/tiny"].private


def test_a_checkpoint(weights: str, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["push", weights, "lab/tiny-vit", "--layout", "timm"]) == 0
    assert TOKEN not in "".join(capsys.readouterr())
    repository = hub.repositories["lab/tiny-vit"]
    assert not repository.private and repository.messages == ["Upload from mimref"]
    assert set(repository.files) == {"README.md", "config.json", "model.safetensors"}
    assert b"# tiny-vit" in repository.files["README.md"]
    assert "cls_token" in load(repository.files["model.safetensors"])
    assert [file.name for file in Path().iterdir()] == ["encoder.safetensors"]


def test_a_checkpoint_that_needs_options_to_be_read(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = timm_vit(embed_dim=48, num_heads=3).state_dict()
    torch.save({"teacher": state, "student": state}, tmp_path / "two.pth")
    path = str(tmp_path / "two.pth")
    assert "width of 48" in refusal(capsys, path, "me/tiny") and not hub.repositories
    assert "--grid 4x4" in refusal(capsys, path, "me/tiny", "--num-heads", "3", "--grid", "4x4")
    options = ["--num-heads", "3", "--encoder", "student", "--grid", "4,4", "--source", "dino", "--layout", "timm"]
    assert run(["push", path, "me/tiny", "--quiet", *options]) == 0
    assert json.loads(hub.repositories["me/tiny"].files["config.json"])["model_args"]["num_heads"] == 3


@pytest.mark.parametrize("option", ["--arch=vit_b16", "--num-heads=3", "--encoder=teacher", "--layout=timm"])
def test_options_without_effect_on_an_exported_folder(
    option: str, folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert option.replace("=", " ") in refusal(capsys, str(folder), "me/tiny", option) and not hub.repositories


def test_a_repository_that_exists(folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["push", str(folder), "me/tiny", "--quiet"]) == 0
    capsys.readouterr()
    line = refusal(capsys, str(folder), "me/tiny")
    assert line.startswith("me/tiny: exists") and "--force" in line
    assert len(hub.repositories["me/tiny"].messages) == 1
    (folder / "README.md").write_text("changed")
    assert run(["push", str(folder), "me/tiny", "--force", "--quiet"]) == 0
    assert hub.repositories["me/tiny"].files["README.md"] == b"changed"


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/api/repos/create", 403, ("may not write", "write access")),
        ("/api/repos/create", 404, ("no such owner",)),
        ("/preupload/", 403, ("may not write",)),
        ("/commit/", 400, ("status 400", "it went wrong")),
        ("/commit/", 409, ("status 409",)),
    ],
)
def test_what_the_server_refuses(
    path: str, status: int, words: tuple[str, ...], folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fails[path] = status
    line = refusal(capsys, str(folder), "me/tiny")
    assert line.startswith("me/tiny: ") and all(word in line for word in words), line


def test_a_token_that_is_not_accepted(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = refusal(capsys, str(folder), "me/tiny")
    assert "does not accept the token" in line and "hf_wrong" not in line


def test_a_token_that_was_copied_badly(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ünï…")
    line = refusal(capsys, str(folder), "me/tiny")
    assert "characters that no token has" in line and "hf_" not in line and hub.requests == []


def test_all_mistakes_at_once(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert run(["push", "gone.pth", "a/b/c"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "gone.pth: no such file" in lines[0]
    assert any("a/b/c" in line for line in lines) and any("HF_TOKEN" in line for line in lines)
    assert hub.requests == []


def test_a_layout_of_an_exported_folder(folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--layout timm" in refusal(capsys, str(folder), "me/tiny", "--layout", "timm")


def test_without_a_network(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(capsys, str(folder), "me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = refusal(capsys, str(folder), "me/tiny")
    assert "http://127.0.0.1:9" in line and "HF_ENDPOINT" in line


def test_a_traceback_shows_no_token(folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.fails["/commit/"] = 403
    assert run(["push", str(folder), "me/tiny", "--debug", "--quiet"]) == 2
    captured = capsys.readouterr()
    assert "Traceback" in captured.err and "may not write" in captured.err and TOKEN not in captured.err


@pytest.mark.slow
def test_a_process_of_its_own(folder: Path) -> None:
    """Nothing is replaced: address and token come from the environment."""
    with serving() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        command = [sys.executable, "-m", "mimref", "push", str(folder), "me/tiny"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["address", f"{hub.address}/me/tiny"] and TOKEN not in done.stderr
        assert "model.safetensors" in hub.repositories["me/tiny"].files
