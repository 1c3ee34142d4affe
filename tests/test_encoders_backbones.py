"""Other timm models: tokens against their own features, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone, find_architecture
from mimref.encoders.checkpoints import encoder_from, read_checkpoint
from mimref.encoders.vit import Architecture
from mimref.errors import ConfigError

# Name: blocks, widths of the first and the last one, prefix tokens, CLS token, pixels per token of the last block.
BACKBONES = {
    "hiera_tiny_224": (4, 96, 768, 0, False, 32),
    "convnextv2_atto": (4, 40, 320, 0, False, 32),
    "swin_tiny_patch4_window7_224": (4, 96, 768, 0, False, 32),
    "eva02_tiny_patch14_224": (12, 192, 192, 1, True, 14),
    "test_vit_relpos": (9, 96, 96, 0, False, 16),
    "deit_tiny_distilled_patch16_224": (12, 192, 192, 2, True, 16),
    "test_efficientnet": (5, 16, 64, 0, False, 32),
}

# Before timm 1.0.16, the first block of a ConvNeXt is its stem.
STEMS = int(timm.__version__ == "1.0.15")


def build(name: str, size: int | None = None) -> TimmBackbone:
    architecture = find_architecture(name, None, size)
    assert isinstance(architecture, BackboneArchitecture)
    torch.manual_seed(0)
    return TimmBackbone(architecture).eval()


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_tokens_of_every_block(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    encoder = build(name)
    depth, first, last, prefix, has_cls, patch_size = BACKBONES[name]
    if name == "convnextv2_atto":
        depth += STEMS
    assert (encoder.depth, encoder.embed_dim) == (depth, last)
    assert (encoder.num_prefix_tokens, encoder.has_cls_token, encoder.patch_size) == (prefix, has_cls, patch_size)
    size = encoder.architecture.image_size
    images = torch.randn(1, 3, size, size)
    model: Any = encoder.model
    maps = model.forward_intermediates(images, intermediates_only=True)
    tokens = encoder.blocks(images, range(1, depth + 1))
    assert (tokens[0].shape[2], tokens[-1].shape[2]) == (first, last)
    for block_BLD, map_BDHW in zip(tokens, maps, strict=True):
        batch, channels, rows, columns = map_BDHW.shape
        assert block_BLD.shape == (batch, prefix + rows * columns, channels)
        at = (rows - 1) * columns + 2
        assert torch.equal(block_BLD[:, prefix + at], map_BDHW[:, :, rows - 1, 2])
        pooled = encoder.pool(block_BLD, "mean")
        torch.testing.assert_close(pooled, map_BDHW.mean(dim=(2, 3)))
        cls = encoder.pool(block_BLD, "cls")
        assert cls.shape == (1, channels)
        if not has_cls:
            assert torch.equal(cls, pooled)
    reordered = encoder.blocks(images, [depth, 1, depth])
    assert [torch.equal(a, tokens[b]) for a, b in zip(reordered, (-1, 0, -1), strict=True)] == [True] * 3


@torch.no_grad()
def test_prefix_tokens_come_first() -> None:
    backbone = build("eva02_tiny_patch14_224")
    model: Any = backbone.model
    images = torch.randn(1, 3, 224, 224)
    (patches, prefix) = model.forward_intermediates(
        images, indices=[4], return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
    )[0]
    tokens = backbone.blocks(images, [5])[0]
    assert torch.equal(tokens, torch.cat([prefix, patches], dim=1))
    assert torch.equal(backbone.pool(tokens, "cls"), prefix[:, 0])


@torch.no_grad()
def test_the_final_norm_touches_the_last_block_only() -> None:
    backbone = build("swin_tiny_patch4_window7_224")
    model: Any = backbone.model
    torch.nn.init.normal_(model.norm.weight)
    images = torch.randn(1, 3, 224, 224)
    raw, normed = (backbone.blocks(images, [3, 4], final_norm=final_norm) for final_norm in (False, True))
    assert torch.equal(raw[0], normed[0])
    assert torch.equal(normed[1], model.norm(raw[1]))
    eva = build("eva02_tiny_patch14_224")
    plain = eva.blocks(images, [1, 2])
    assert all(map(torch.equal, plain, eva.blocks(images, [1, 2], final_norm=True)))
    with pytest.raises(ConfigError, match=r"^--final-norm .*hiera_tiny_224"):
        build("hiera_tiny_224").blocks(images, [4], final_norm=True)


def test_blocks_after_the_last_one_are_not_run() -> None:
    backbone = build("convnextv2_atto", 64)
    model: Any = backbone.model
    ran: list[int] = []
    for number, stage in enumerate(model.stages, start=1):
        stage.register_forward_hook(lambda *_, number=number: ran.append(number))
    backbone.blocks(torch.randn(1, 3, 64, 64), [2 + STEMS])
    assert ran == [1, 2]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("hiera_tiny_224", 250, "^hiera_tiny_224 .* 250.*--resolution 256"),
        ("convnextv2_atto", 20, "^convnextv2_atto .* 20 .*--resolution"),
        ("vit_base_patch16_xyz", None, "'vit_base_patch16_xyz'; did you mean"),
        ("custom", None, "^--arch custom"),
    ],
)
def test_refusals(name: str, size: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, size)


def test_blocks_outside_are_refused() -> None:
    backbone = build("convnextv2_atto", 64)
    with pytest.raises(ConfigError, match=f"block 6 does not exist: the encoder has blocks 1 to {backbone.depth}"):
        backbone.blocks(torch.randn(1, 3, 64, 64), [6])


def test_names_become_architectures() -> None:
    assert find_architecture("vit_l16", "d2v2", None) == Architecture("vit_l16", 224, 1024, 24, 16, 16, post_norm=True)
    assert find_architecture("vit_b16", None, 96).image_size == 96
    plain = find_architecture("vit_small_patch14_dinov2", None, None)
    assert isinstance(plain, Architecture) and plain.image_size == 518
    assert find_architecture("convnextv2_atto", None, None) == BackboneArchitecture("convnextv2_atto", 224)
    assert find_architecture("test_convnext", None, None).image_size == 160


def test_a_file_with_two_classifiers(tmp_path: Path) -> None:
    # A norm beside each classifier belongs to it.
    torch.manual_seed(0)
    model: Any = timm.create_model("levit_128s", num_classes=10).eval()
    assert {"head_dist.bn.weight", "head_dist.linear.weight"} <= model.state_dict().keys()
    torch.save(model.state_dict(), tmp_path / "levit.pth")
    encoder = encoder_from(read_checkpoint(tmp_path / "levit.pth"), find_architecture("levit_128s", None, None)).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        (tokens_BLD,) = encoder.blocks(images, [encoder.depth])
        expected = model.forward_features(images)
    torch.testing.assert_close(tokens_BLD, expected)
