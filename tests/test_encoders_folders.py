"""Folders of `save_pretrained`, shards and their index."""

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from mimref.api import load
from mimref.config.base import ReadingConfig
from mimref.data.transforms import IMAGENET_MEAN
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint, save_encoder
from mimref.encoders.export import export_release, export_timm
from mimref.encoders.vit import Architecture, Encoder
from mimref.errors import CheckpointError, UserError
from tests.checkpoints import IMAGE, State, timm_vit, tokens

transformers = pytest.importorskip("transformers")


def vit_of(heads: int = 4, eps: float = 1e-6) -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=256, image_size=IMAGE,
        patch_size=4, layer_norm_eps=eps,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def assert_reads(path: Path, model: Any) -> None:
    checkpoint = read_checkpoint(path)
    encoder = encoder_from(checkpoint, choose_architecture(checkpoint))
    assert isinstance(encoder, Encoder)
    images = torch.randn(2, 3, IMAGE, IMAGE)
    expected = model(images, output_hidden_states=True).hidden_states[1:]
    for ours, theirs in zip(encoder.eval().blocks(images, [1, 2]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def write_shards(folder: Path, state: State, ending: str, name: str = "model") -> Path:
    """Write two shards and their index, named as by `save_pretrained`; return the index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(state)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        shard = f"{name}-{number:05}-of-00002.{ending}"
        own = {each: state[each].contiguous() for each in half}
        save_file(own, folder / shard) if ending == "safetensors" else torch.save(own, folder / shard)
        weight_map |= dict.fromkeys(half, shard)
    index = folder / f"{name}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_folders_of_the_library(tmp_path: Path) -> None:
    model = vit_of()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for path in (
        tmp_path / "one",
        tmp_path / "one" / "model.safetensors",
        tmp_path / "shards",
        tmp_path / "shards" / "model.safetensors.index.json",
    ):
        assert_reads(path, model)
        # A width of 64 alone suggests one head.
        (notice,) = read_checkpoint(path).notices(choose_architecture(read_checkpoint(path)))
        assert "4 attention heads are taken from config.json" in notice
    assert choose_architecture(read_checkpoint(tmp_path / "one", ReadingConfig(num_heads=2))).num_heads == 2  # type: ignore[union-attr]


@torch.no_grad()
def test_the_epsilon_of_every_norm(tmp_path: Path) -> None:
    model = vit_of(1, eps=0.125)
    model.save_pretrained(tmp_path / "hf")
    assert_reads(tmp_path / "hf", model)
    checkpoint = read_checkpoint(tmp_path / "hf")
    architecture = tiny_of(tmp_path / "hf")
    assert any("LayerNorm's epsilon of 0.125" in notice for notice in checkpoint.notices(architecture))
    encoder = encoder_from(checkpoint, architecture)
    assert isinstance(encoder, Encoder)
    # The epsilon is kept in our own files and in exports.
    save_encoder(tmp_path / "ours.safetensors", encoder, {})
    assert_reads(tmp_path / "ours.safetensors", model)
    line = export_timm(encoder, tmp_path / "timm.pth", {}).read_with
    assert "norm_layer=functools.partial(torch.nn.LayerNorm, eps=0.125)" in line
    _, _, call = line.partition("model = ")
    vit = eval(call.partition(";")[0], {"timm": timm, "functools": functools, "torch": torch})
    timm.models.load_checkpoint(vit, str(tmp_path / "timm.pth"))
    images = torch.randn(2, 3, IMAGE, IMAGE)
    expected = model(images).last_hidden_state
    torch.testing.assert_close(vit.eval().forward_features(images), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError):
        export_release(encoder, tmp_path / "release.th", {})


def test_the_epsilon_of_timms_models(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=IMAGE,
        layer_norm_eps=1e-12,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    for arch in (None, "vit_tiny_patch16_224"):
        found = encoder_from(checkpoint, choose_architecture(checkpoint, arch, resolution=IMAGE))
        assert {each.eps for each in found.modules() if isinstance(each, torch.nn.LayerNorm)} == {1e-12}
        assert isinstance(found, Encoder)
        export = export_timm(found, tmp_path / f"{arch}.pth", {})
        assert export.timm_name and export.read_with.endswith("eps=1e-12))")


@pytest.mark.parametrize("eps", [1e-6, 0, 1, "1e-12", None, -1.0, math.nan])
def test_epsilons_that_are_usual_or_none(eps: object, tmp_path: Path) -> None:
    vit_of(1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": eps}))
    assert tiny_of(tmp_path).norm_eps == 1e-6 and "norm_eps" not in tiny_of(tmp_path).to_dict()
    assert not any("LayerNorm" in notice for notice in read_checkpoint(tmp_path).notices(tiny_of(tmp_path)))


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_shards(ending: str, tmp_path: Path) -> None:
    model = vit_of(1)
    name = "pytorch_model" if ending == "bin" else "model"
    index = write_shards(tmp_path / "shards", model.state_dict(), ending, name)
    assert_reads(tmp_path / "shards", model)
    assert_reads(index, model)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_reads(tmp_path, model)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_saved_beside_the_weights(tmp_path: Path) -> None:
    model = vit_of()
    model.save_pretrained(tmp_path)
    assert load(tmp_path).transform.mean == IMAGENET_MEAN
    saved = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 1], "size": {"height": 16}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    found = load(tmp_path).transform
    assert (found.mean, found.std, found.image_size) == ((0.5, 0.5, 0.5), (0.5, 0.25, 1.0), IMAGE)
    assert any(
        "configuration beside the file" in notice for notice in read_checkpoint(tmp_path).notices(tiny_of(tmp_path))
    )
    for value in (0.5, [0.5]):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": value, "image_std": value}))
        found = load(tmp_path).transform
        assert found.mean == found.std == (0.5, 0.5, 0.5)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**saved, "do_normalize": False}))
    found = load(tmp_path).transform
    assert (found.mean, found.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for wrong in ({"image_mean": [0.5, 0.5], "image_std": 0.5}, {"image_mean": 3}, {"image_mean": "0.5"}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
        assert load(tmp_path).transform.mean == IMAGENET_MEAN
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "quick_gelu"}))
    assert "quick_gelu" in refusal(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_normalisation_beside_weights_whose_model_is_named(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "pytorch_model.bin")
    saved = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 1]}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": saved}))
    found = load(tmp_path, arch="test_convnext").transform
    assert (found.mean, found.std) == ((0.5, 0.4, 0.3), (0.5, 0.25, 1.0))


@pytest.mark.parametrize("name", ["vit_small_patch16_rope_ape_224", "vit_base_patch32_siglip_gap_256"])
def test_models_of_timm_that_no_tensor_shows(name: str, tmp_path: Path) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    torch.save(timm.create_model(name, num_classes=0, depth=1).state_dict(), tmp_path / "pytorch_model.bin")
    assert isinstance(tiny_of(tmp_path), Architecture)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "model_args": {"depth": 1}}))
    assert f"pass --arch {name}" in refusal(tmp_path)


def test_the_heads_of_timms_model(tmp_path: Path) -> None:
    args = {"embed_dim": 192, "depth": 1, "num_heads": 6}
    config = json.dumps({"architecture": "vit_base_patch16_224", "model_args": args})
    torch.save(timm.create_model("vit_base_patch16_224", **args).state_dict(), tmp_path / "pytorch_model.bin")
    assert tiny_of(tmp_path).num_heads == 3
    (tmp_path / "config.json").write_text(config)
    assert tiny_of(tmp_path).num_heads == 6
    (tmp_path / "config.json").write_text(config.replace("192", '"?"'))
    assert tiny_of(tmp_path).num_heads == 3


def tiny_of(path: Path) -> Architecture:
    architecture = choose_architecture(read_checkpoint(path))
    assert isinstance(architecture, Architecture)
    return architecture


@torch.no_grad()
def test_shards_of_other_layouts(tmp_path: Path) -> None:
    vit = timm_vit()
    index = write_shards(tmp_path, dict(vit.state_dict()), "safetensors", "weights")
    checkpoint = read_checkpoint(index)
    encoder = encoder_from(checkpoint, choose_architecture(checkpoint))
    images = torch.randn(2, 3, IMAGE, IMAGE)
    torch.testing.assert_close(encoder.eval().blocks(images, [3])[0], tokens(vit, images)[2], rtol=0, atol=1e-5)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        choose_architecture(read_checkpoint(path))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_a_shard_alone(tmp_path: Path) -> None:
    index = write_shards(tmp_path, vit_of().state_dict(), "safetensors")
    shard = tmp_path / "model-00001-of-00002.safetensors"
    assert "one of 2 shards" in refusal(shard) and str(index) in refusal(shard)
    index.unlink()
    assert "shard 1 of 2" in refusal(shard) and "model.safetensors.index.json" in refusal(shard)
    assert "--arch" not in refusal(shard)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_shard_that_may_not_be_read(tmp_path: Path) -> None:
    index = write_shards(tmp_path, vit_of().state_dict(), "safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: cannot be read"):
        read_checkpoint(index)


def test_damaged_shards(tmp_path: Path) -> None:
    index = write_shards(tmp_path, vit_of().state_dict(), "safetensors")
    content = json.loads(index.read_text())
    second = tmp_path / "model-00002-of-00002.safetensors"
    moved = tmp_path / "moved"
    second.rename(moved)
    assert second.name in refusal(index)
    moved.rename(second)
    content["weight_map"]["surprise"] = second.name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="lacks surprise"):
        read_checkpoint(index)
    for bad in ("../model.bin", "", 3, None):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        assert "no index of weights" in refusal(index)
    for text in ("{}", "{", '{"weight_map": 3}', '{"weight_map": []}', '{"weight_map":' + "[" * 100_000):
        index.write_text(text)
        assert "no index of weights" in refusal(index)
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    assert "no index of weights" in refusal(tmp_path / "config.json")


def test_other_folders(tmp_path: Path) -> None:
    empty, run, many = tmp_path / "empty", tmp_path / "run", tmp_path / "many"
    for path in (empty, run / "state", many):
        path.mkdir(parents=True)
    for name in "abcd":
        torch.save({"a": torch.zeros(2)}, many / f"{name}.pth")
    assert "--resume" not in refusal(empty) and "model.safetensors" in refusal(empty)
    assert "--resume" in refusal(run)
    assert "a.pth, b.pth, c.pth and 1 more" in refusal(many)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", '{"hidden_size": 64, "num_attention_heads": "4"}', '{"vision_config": 3}']
)
def test_a_config_that_says_nothing(text: str, tmp_path: Path) -> None:
    vit_of(1).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    architecture = choose_architecture(read_checkpoint(tmp_path))
    assert architecture.num_heads == 1  # type: ignore[union-attr]
