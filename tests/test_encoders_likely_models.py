"""Files with timm's tensor names: the refusal names the models that fit, and no others."""

from fnmatch import fnmatch
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from mimref.cli import run
from mimref.encoders.likely_models import likely_models, named_models
from mimref.encoders.meta import RatesOnCpu

LISTED = {
    "swin_transformer": ["swin_small_patch4_window7_224", "swin_tiny_patch4_window7_224"],
    "swin_transformer_v2": ["swinv2_tiny_window16_256", "swinv2_tiny_window8_256", "swinv2_small_window8_256"],
    "convnext": ["convnext_atto", "convnext_atto_ols", "convnextv2_atto"],
    "hieradet_sam2": ["hieradet_small"],
    "eva": ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "eva02_tiny_patch14_224"],
    "vision_transformer": ["vit_base_patch16_224", "aimv2_large_patch14_224"],
}


@pytest.fixture(autouse=True)
def few_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """List few models, because building all models of a module takes seconds."""
    listed = lambda pattern, module: [name for name in LISTED[module] if fnmatch(name, pattern or "*")]  # noqa: E731
    monkeypatch.setattr(timm, "list_models", listed)


def state(name: str, classes: int = 10) -> dict[str, Tensor]:
    with torch.device("meta"), RatesOnCpu():
        return dict(timm.create_model(name, num_classes=classes).state_dict())


@pytest.mark.parametrize(
    "name",
    [
        *("swin_tiny_patch4_window7_224", "convnext_atto", "convnext_atto_ols", "convnextv2_atto", "hieradet_small"),
        *("vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "eva02_tiny_patch14_224"),
        "aimv2_large_patch14_224",
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.backbone."])
def test_the_model_is_found(name: str, prefix: str) -> None:
    own = {prefix + key: tensor for key, tensor in state(name).items()}
    assert likely_models({**own, "decoder.weight": torch.empty(2)}) == [name]


def test_windows_that_no_tensor_shows() -> None:
    found = state("swinv2_tiny_window8_256", 0)
    found["layers.0.blocks.1.attn_mask"] = torch.empty(4)  # older files have this mask
    assert likely_models(found) == ["swinv2_tiny_window16_256", "swinv2_tiny_window8_256"]
    assert named_models(found).endswith("--arch swinv2_tiny_window16_256 (or swinv2_tiny_window8_256)")


@pytest.mark.parametrize("change", ["wider", "missing", "further"])
def test_other_tensors_are_no_models(change: str) -> None:
    found = state("convnext_atto")
    if change == "wider":
        found["stem.0.weight"] = torch.empty(48, 3, 4, 4)
    elif change == "missing":
        del found["stages.2.blocks.1.norm.bias"]
    else:
        found["stages.2.blocks.1.extra"] = torch.empty(1)
    assert likely_models(found) == [] and named_models(found) == ""


@pytest.mark.parametrize("command", [["knn"], ["inspect"], ["refine", "--weights"]])
def test_commands_name_it(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.pth"
    shapes = {name: tensor.shape for name, tensor in state("convnext_atto").items()}
    torch.save({"state_dict": {name: torch.zeros(shape) for name, shape in shapes.items()}}, path)
    data = [] if command == ["inspect"] else ["--data", "digits"]
    assert run([*command, str(path), *data]) == 2
    error = capsys.readouterr().err
    assert "timm" in error and "--arch convnext_atto" in error and error.count("\n") == 1, error
