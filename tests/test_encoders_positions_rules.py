"""The rule that interpolates positions: from a file's layout, a name or a setting; where it is saved and reported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mimref
from mimref.cli import run as cli_run
from mimref.config.base import Interpolation, ReadingConfig
from mimref.encoders.checkpoints import Checkpoint, read_checkpoint, save_encoder
from mimref.encoders.layouts import format_interpolation
from mimref.encoders.published import find_published
from mimref.encoders.vit import Architecture, Encoder
from mimref.errors import ConfigError
from mimref.evaluation.knn.config import KnnConfig
from mimref.features.inputs import EncoderInputs
from mimref.progress import Silent
from tests.checkpoints import IMAGE, SIDE, WIDTH, State, dino, load_encoder, rows, timm_vit

# --- which rule


LEARNED = dict(timm_vit().state_dict())


def about_positions(checkpoint: Checkpoint, *sizes: int) -> list[str]:
    """The notices for images of these sizes that explain how to choose the rule."""
    assert checkpoint.architecture is not None
    notices = checkpoint.notices(checkpoint.architecture, sizes)
    return [notice for notice in notices if "encoder.interpolation" in notice]


@pytest.mark.parametrize(
    ("extra", "interpolation", "guessed"),
    [
        ({}, "dino", True),
        (rows(10, "head"), "timm", True),
        (rows(10, "head") | rows(WIDTH, "fc_norm"), "mae", True),
        ({"head.last_layer.weight_g": torch.ones(4, 1)}, "dino", False),
        ({"mask_token": torch.zeros(1, 1, WIDTH)}, "dino", True),
    ],
)
def test_shared_layouts(extra: State, interpolation: Interpolation, guessed: bool, tmp_path: Path) -> None:
    torch.save(LEARNED | extra, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    architecture = checkpoint.architecture
    assert architecture is not None and architecture.interpolation == interpolation
    assert about_positions(checkpoint, IMAGE) == []
    assert [f" {interpolation} " in notice for notice in about_positions(checkpoint, IMAGE, 12)] == [True] * guessed
    chosen = read_checkpoint(tmp_path / "a.pth", ReadingConfig(interpolation="torchvision"))
    assert chosen.architecture == replace(architecture, interpolation="torchvision")
    assert about_positions(chosen, 12) == []


def test_libraries_with_rules_of_their_own() -> None:
    architecture = Architecture("custom", 16, 32, 2, 4, patch_size=4, fixed_positions=False)
    formats = {"torchvision ViT": "torchvision", "OpenMMLab ViT (mmpretrain)": "mae", "MAE-pytorch": "mae_pytorch"}
    for name, interpolation in formats.items():
        assert format_interpolation(name, None, set(), architecture, as_image=False, grid=(4, 4)) == (
            interpolation,
            False,
        )


def test_positions_by_row_and_column_are_interpolated_as_by_the_releases(tmp_path: Path) -> None:
    image = LEARNED["pos_embed"][:, 1:].reshape(1, SIDE, SIDE, WIDTH)
    torch.save(LEARNED | {"pos_embed": image}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.architecture is not None and checkpoint.architecture.interpolation == "mae"
    assert about_positions(checkpoint, 12) == []


def test_published_names_settle_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMREF_CACHE", str(tmp_path))
    for name, interpolation in {"ibot_b16": "dino", "msn_b16": "mae", "mae_b16": "mae"}.items():
        published = find_published(name)
        assert published is not None
        published.file.parent.mkdir(exist_ok=True)
        torch.save(LEARNED | rows(10, "head"), published.file)
        checkpoint = read_checkpoint(name)
        assert checkpoint.architecture is not None and checkpoint.architecture.interpolation == interpolation
        assert about_positions(checkpoint, 12) == []


def test_unknown_rules_are_refused(tmp_path: Path) -> None:
    torch.save(LEARNED, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"dnio.*did you mean 'dino'"):
        mimref.load(tmp_path / "a.pth", interpolation="dnio")  # type: ignore[arg-type]


# --- our own files


def test_headers_keep_the_rule_and_those_without_one_keep_theirs(tmp_path: Path) -> None:
    torch.save(dino(LEARNED), tmp_path / "a.pth")
    encoder, _ = load_encoder(tmp_path / "a.pth")
    assert isinstance(encoder, Encoder)
    save_encoder(tmp_path / "own.safetensors", encoder, {})
    checkpoint = read_checkpoint(tmp_path / "own.safetensors")
    assert checkpoint.architecture == encoder.architecture and encoder.architecture.interpolation == "dino"
    # A header from before the rule could be chosen.
    older = encoder.architecture.to_dict()
    del older["interpolation"]
    assert Architecture.from_dict(older) == replace(encoder.architecture, interpolation="mae")
    assert Architecture.from_dict(older).to_dict() == older
    for value in ("dnio", 1, ["dino"]):
        with pytest.raises(ConfigError, match="interpolation = "):
            Architecture.from_dict(older | {"interpolation": value})


# --- commands


def test_cache_keys_change_only_where_positions_are_interpolated(tmp_path: Path) -> None:
    torch.save(dino(LEARNED), tmp_path / "a.pth")

    def spec(file: str = "a.pth", **settings: Any) -> dict[str, Any]:
        config = KnnConfig.model_validate({"data": {"spec": "digits"}, "device": "cpu", **settings})
        inputs = EncoderInputs(config, str(tmp_path / file), Silent())
        return inputs.spec(inputs.source("val"))["architecture"]  # type: ignore[no-any-return]

    assert "interpolation" not in spec() and spec() == spec(resolution=IMAGE, encoder={"interpolation": "timm"})
    assert spec(resolution=28)["interpolation"] == "dino"
    assert spec(resolution=28, encoder={"interpolation": "timm"})["interpolation"] == "timm"
    assert "interpolation" not in spec(resolution=28, encoder={"interpolation": "mae"})
    # A grid that is not square is interpolated for images of every size.
    torch.save(LEARNED | {"pos_embed": torch.randn(1, 1 + 32, WIDTH)}, tmp_path / "wide.pth")
    assert spec("wide.pth")["interpolation"] == "timm"
    assert spec("wide.pth", encoder={"interpolation": "dino"})["interpolation"] == "dino"
    # The same holds for a file that mimref wrote with the rule.
    encoder, _ = load_encoder(tmp_path / "a.pth")
    assert isinstance(encoder, Encoder)
    save_encoder(tmp_path / "a.pth", encoder, {})
    assert "interpolation" not in spec() and spec(resolution=28)["interpolation"] == "dino"


def test_evaluations_refinement_and_inspection_name_the_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(dino(LEARNED), tmp_path / "a.pth")

    def run(command: str, *line: str) -> str:
        assert cli_run([command, *line, *([] if command == "inspect" else ["--device=cpu"])]) == 0
        printed = capsys.readouterr()
        return " ".join((printed.out + printed.err).split())

    common = ["--data=digits", "--set=data.train_limit=40"]
    path = str(tmp_path / "a.pth")
    assert "interpolated as" not in run("knn", path, *common, "--resolution=16")
    assert "interpolated as dino does" in run("knn", path, *common, "--resolution=28")
    assert "interpolated as" not in run("knn", path, *common, "--resolution=28", "--set=encoder.interpolation=timm")
    assert "dino (bicubic, by scale factor with an offset of 0.1), a guess" in run("inspect", path)
    views = [
        "--preset=quickstart",
        "--weights",
        path,
        *common,
        "--dry-run",
        "--set=batch_size=8",
        "--set=heads.queue_size=20",
        "--set=heads.blocks=last2",
    ]
    local = [*views, "--set=views.local_views=2", "--set=views.local_size=8"]
    assert "interpolated as dino does" in run("refine", *local)
    assert "interpolated as" not in run("refine", *local, "--set=encoder.interpolation=dino")
    assert "interpolated as" not in run("refine", *views, "--set=views.local_views=0")
