"""Layouts of torchvision, OpenMMLab, MAE-pytorch and Hiera, against torchvision, timm and plain tensor code."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mimref.config.base import ReadingConfig
from mimref.encoders.backbones import BackboneArchitecture
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.formats import recognise
from mimref.encoders.grids import flat_sincos_positions
from mimref.encoders.parts import Unrecognised
from mimref.encoders.vit import Architecture, Encoder
from mimref.errors import CheckpointError
from tests.checkpoints import DEPTH, IMAGE, PATCH, WIDTH, State, load_encoder, prefixed, rows, timm_vit, tokens


def loaded(content: Any, path: Path, **options: Any) -> Encoder:
    torch.save(content, path)
    checkpoint = read_checkpoint(path, ReadingConfig(**options))
    encoder = encoder_from(checkpoint, choose_architecture(checkpoint))
    assert isinstance(encoder, Encoder)
    return encoder.eval()


def assert_same(encoder: Encoder, images: Tensor, expected: list[Tensor], normed: Tensor | None = None) -> None:
    for ours, theirs in zip(encoder.blocks(images, range(1, encoder.depth + 1)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    if normed is not None:
        last = encoder.blocks(images, [encoder.depth], final_norm=True)[0]
        torch.testing.assert_close(last, normed, rtol=0, atol=1e-5)


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def outline(model: torch.nn.Module) -> State:
    """A state dict with the real shapes that takes no memory."""
    return {name: torch.zeros(1, device="cpu").expand(tensor.shape) for name, tensor in model.state_dict().items()}


# --- torchvision


@pytest.mark.parametrize("before_0_13", [False, True])
@pytest.mark.parametrize("prefix", ["", "backbone.", "student_backbone.vit."])
@torch.no_grad()
def test_torchvision(prefix: str, before_0_13: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(IMAGE, PATCH, DEPTH, 2, WIDTH, 4 * WIDTH, num_classes=5).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    outputs: list[Tensor] = []
    for layer in (*model.encoder.layers, model.encoder.ln):
        layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
    images = torch.randn(2, 3, IMAGE, IMAGE)
    model(images)
    state = prefixed(prefix, model.state_dict())
    if before_0_13:
        state = renamed(state, (r"mlp\.0\.", "mlp.linear_1."), (r"mlp\.3\.", "mlp.linear_2."))
    encoder = loaded({"state_dict": state} if prefix else state, tmp_path / "vit_b_16.pth")
    assert_same(encoder, images, outputs[:-1], outputs[-1])
    found = read_checkpoint(tmp_path / "vit_b_16.pth").recognised
    assert found is not None and found.format == "torchvision ViT" and set(found.dropped) == {"classifier"}


@torch.no_grad()
def test_torchvisions_published_sizes() -> None:
    with torch.device("meta"):
        state = outline(torchvision.models.vit_l_32())
    found = recognise(state)
    assert found.architecture == Architecture(
        "custom", 224, 1024, 24, 16, 32, fixed_positions=False, interpolation="torchvision"
    )
    assert found.notices == [] and set(found.dropped) == {"classifier"}


# --- OpenMMLab


def openmmlab(state: State) -> State:
    """The state dict under mmpretrain's names."""
    return renamed(
        state,
        (r"^norm\.", "ln1."),
        (r"patch_embed\.proj", "patch_embed.projection"),
        (r"^blocks\.", "layers."),
        (r"norm([12])", r"ln\1"),
        (r"mlp\.fc1", "ffn.layers.0.0"),
        (r"mlp\.fc2", "ffn.layers.1"),
        (r"ls1\.gamma", "attn.gamma1.weight"),
        (r"ls2\.gamma", "ffn.gamma2.weight"),
    )


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}], ids=["plain", "layer scale"])
@torch.no_grad()
def test_mmpretrain(options: dict[str, Any], tmp_path: Path) -> None:
    vit = timm_vit(**options)
    neck = {"neck.mask_token": torch.zeros(1, 1, 8), **rows(8, "neck.decoder_embed"), **rows(3, "head.fc")}
    state = prefixed("backbone.", openmmlab(dict(vit.state_dict()))) | neck | {"data_preprocessor.mean": torch.ones(3)}
    encoder = loaded({"meta": {"epoch": 3}, "state_dict": state}, tmp_path / "epoch_3.pth")
    images = torch.randn(2, 3, IMAGE, IMAGE)
    expected = tokens(vit, images)
    assert_same(encoder, images, expected, vit.norm(expected[-1]))
    found = read_checkpoint(tmp_path / "epoch_3.pth").recognised
    assert found is not None and found.format.startswith("OpenMMLab") and "neck" in found.dropped


@torch.no_grad()
def test_mmsegmentation(tmp_path: Path) -> None:
    vit = timm_vit(final_norm=False)
    state = renamed(
        openmmlab(dict(vit.state_dict())),
        (r"attn\.qkv\.", "attn.attn.in_proj_"),
        (r"(layers\.\d+)\.attn\.proj\.", r"\1.attn.attn.out_proj."),
    )
    content = {
        "state_dict": prefixed("backbone.", state) | rows(8, "decode_head.conv_seg"),
        "meta": {"classes": ("a",)},
    }
    encoder = loaded(content, tmp_path / "iter_80000.pth")
    images = torch.randn(2, 3, IMAGE, IMAGE)
    assert_same(encoder, images, tokens(vit, images))
    assert (
        "the encoder has no final norm"
        in read_checkpoint(tmp_path / "iter_80000.pth").notices(encoder.architecture)[-1]
    )


# --- MAE-pytorch, whose model is rewritten here in plain tensor code


def mae_pytorch(vit: VisionTransformer) -> State:
    state = {}
    for name, tensor in vit.state_dict().items():
        if name.endswith("qkv.bias"):
            state[name.replace("qkv.bias", "q_bias")] = tensor[:WIDTH]
            state[name.replace("qkv.bias", "v_bias")] = tensor[2 * WIDTH :]
        elif name != "pos_embed":
            state[name] = tensor
    return state


def sinusoid(patches: int) -> Tensor:
    table = [
        [
            (math.sin if channel % 2 == 0 else math.cos)(patch / 10_000 ** (2 * (channel // 2) / WIDTH))
            for channel in range(WIDTH)
        ]
        for patch in range(patches)
    ]
    return torch.tensor(table)[None]


def test_the_table_of_positions() -> None:
    torch.testing.assert_close(flat_sincos_positions(WIDTH, 30), sinusoid(30), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pretraining", [True, False])
@torch.no_grad()
def test_mae_pytorch(pretraining: bool, tmp_path: Path) -> None:
    vit = timm_vit(class_token=False, global_pool="avg", fc_norm=False)
    state = mae_pytorch(vit)
    rest = {"encoder_to_decoder.weight": torch.zeros(8, WIDTH), "mask_token": torch.zeros(1, 1, 8)}
    rest |= rows(8, "decoder.blocks.0.norm1") | {"decoder.blocks.0.attn.q_bias": torch.zeros(8)}
    content = {"model": prefixed("encoder.", state) | rest if pretraining else state | rows(5, "head")}
    encoder = loaded(content, tmp_path / "checkpoint-1599.pth", grid=(4, 4))
    # In the original, the bias of the keys is zero, and positions are a sine-cosine table over patch numbers.
    for block in vit.blocks:
        block.attn.qkv.bias[WIDTH : 2 * WIDTH] = 0
    assert vit.pos_embed is not None
    vit.pos_embed.copy_(sinusoid(16))
    images = torch.randn(2, 3, IMAGE, IMAGE)
    expected = tokens(vit, images)
    assert_same(encoder, images, expected, vit.norm(expected[-1]))
    found = read_checkpoint(tmp_path / "checkpoint-1599.pth").recognised
    assert found is not None and (found.format, found.source, found.grid) == ("MAE-pytorch", "mae", (56, 56))
    assert found.architecture.fixed_positions and any("56 x 56" in notice for notice in found.notices)


def test_timms_models_without_positions_are_not_taken_for_it() -> None:
    """BEiT's relatives in timm have rotary positions without tensors and are refused; BEiT itself is recognised."""
    # All variants exist in this width.
    for name in timm.list_models("*_base_*", module="beit"):
        with torch.device("meta"):
            state = outline(timm.create_model(name, num_classes=0))
        assert recognise(state).format == "BEiT (or BEiT v2, data2vec 1.0)"
    for name in timm.list_models("*_base_*", module="eva"):
        if "rope_ape" in name:  # has all the tensors of a plain vision transformer
            continue
        with torch.device("meta"):
            state = outline(timm.create_model(name, num_classes=0))
        with pytest.raises(Unrecognised) as caught:
            recognise(state)
        assert "without data" not in str(caught.value), name


# --- Hiera


@torch.no_grad()
def test_hiera_as_published(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("hiera_tiny_224", num_classes=0).eval()
    published = renamed(model.state_dict(), (r"^head\.norm\.", "encoder_norm."))
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 49, 8),
        **rows(8, "decoder_embed"),
        "multi_scale_fusion_heads.0.weight": torch.zeros(8, 96, 2, 2),
    }
    torch.save({"model_state": published | decoder}, tmp_path / "mae_hiera_tiny_224.pth")
    backbone, _ = load_encoder(tmp_path / "mae_hiera_tiny_224.pth", BackboneArchitecture("hiera_tiny_224", 224))
    images = torch.randn(1, 3, 224, 224)
    expected = model.forward_intermediates(images, intermediates_only=True)
    blocks = backbone.eval().blocks(images, range(1, backbone.depth + 1))
    for ours, theirs in zip(blocks, expected, strict=True):
        torch.testing.assert_close(ours, theirs.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
    torch.save({"model_state": {**published, "surprise": torch.zeros(2)}}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="surprise is unexpected"):
        load_encoder(tmp_path / "b.pth", BackboneArchitecture("hiera_tiny_224", 224))


@torch.no_grad()
def test_other_published_names_by_timms_filters(tmp_path: Path) -> None:
    """ConvNeXt as its authors publish it: no `blocks` in the names of stages, and other names for every layer."""
    torch.manual_seed(0)
    model: Any = timm.create_model("test_convnext", num_classes=0).eval()
    published = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^stem\.(\d)", r"downsample_layers.0.\1", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.(\d)", r"stages.\1.\2", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("head.norm", "norm")
        published[name] = tensor
    torch.save({"model": published}, tmp_path / "convnext.pth")
    backbone, _ = load_encoder(tmp_path / "convnext.pth", BackboneArchitecture("test_convnext", 160))
    images = torch.randn(1, 3, 160, 160)
    expected = model.forward_intermediates(images, intermediates_only=True)
    for ours, theirs in zip(backbone.eval().blocks(images, range(1, backbone.depth + 1)), expected, strict=True):
        torch.testing.assert_close(ours, theirs.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
