"""Patch embeddings for other numbers of channels: the rules by value, against timm's rule, and on whole encoders."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.models._manipulate import adapt_input_conv

from mimref.config.base import ReadingConfig
from mimref.config.run import EncoderConfig
from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone
from mimref.encoders.channels import ChannelRule, first_channels, fit_channels, for_images
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.settings import architecture_to_train
from mimref.errors import ConfigError
from tests.tiny import ARCHITECTURE, write_weights

WEIGHT = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 13])
def test_repeat_is_timms_rule(channels: int) -> None:
    found = ChannelRule("repeat").adapt(WEIGHT, channels)
    torch.testing.assert_close(found, adapt_input_conv(channels, WEIGHT), rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_sum_gives_every_channel_the_same_share(channels: int) -> None:
    found = ChannelRule("sum").adapt(WEIGHT, channels)
    for channel in range(channels):
        torch.testing.assert_close(found[:, channel], (WEIGHT[:, 0] + WEIGHT[:, 1] + WEIGHT[:, 2]) / channels)


def test_random_keeps_the_first_or_the_named_channels() -> None:
    found = ChannelRule("random").adapt(WEIGHT, 5)
    assert torch.equal(found[:, :3], WEIGHT) and found[:, 3:].std() > 0
    assert torch.equal(found, ChannelRule("random").adapt(WEIGHT, 5))
    named = ChannelRule("random", (4, 3, 2)).adapt(WEIGHT, 13)
    for place, color in enumerate((4, 3, 2)):
        assert torch.equal(named[:, color - 1], WEIGHT[:, place])
    many = ChannelRule("random").adapt(torch.randn(400, 3, 4, 4, generator=torch.Generator().manual_seed(2)), 4)
    assert float(many[:, 3].std()) == pytest.approx(float(many[:, :3].std()), rel=0.05)
    for colors in ((4, 3), (4, 3, 3), (4, 3, 14)):
        with pytest.raises(ConfigError, match=r"encoder\.color_channels"):
            ChannelRule("random", colors).adapt(WEIGHT, 13)


@pytest.mark.parametrize(
    ("how", "channels"), [("sum", 1), ("sum", 2), ("sum", 4), ("sum", 13), ("repeat", 1), ("repeat", 6)]
)
def test_gray_images_keep_their_features(how: str, channels: int, tmp_path: Path) -> None:
    """With identical channels, an image has the same features in the adapted encoder as in the colour encoder."""
    path = write_weights(tmp_path / "x.safetensors")
    checkpoint = read_checkpoint(path, ReadingConfig(channel_init=how))
    colour = encoder_from(checkpoint, ARCHITECTURE)
    adapted = encoder_from(checkpoint, for_images(ARCHITECTURE, channels))
    gray = torch.randn(2, 1, 16, 16)
    blocks = range(1, 5)
    with torch.inference_mode():
        pairs = zip(
            colour.blocks(gray.expand(-1, 3, -1, -1), blocks),
            adapted.blocks(gray.expand(-1, channels, -1, -1), blocks),
            strict=True,
        )
        for wanted, found in pairs:
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert any(f"{channels} channel" in notice and how in notice for notice in checkpoint.notices(adapted.architecture))
    assert checkpoint.notices(ARCHITECTURE) == []


def test_everything_but_the_patch_embedding_is_untouched(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_weights(tmp_path / "x.safetensors"))
    adapted = encoder_from(checkpoint, for_images(ARCHITECTURE, 4)).vit.state_dict()
    stored = checkpoint.tensors
    changed = [name for name in stored if not torch.equal(stored[name], adapted[name])]
    assert changed == ["patch_embed.proj.weight"]


@pytest.mark.parametrize("name", ["convnext_atto"])
def test_the_first_convolution_whatever_its_name(name: str) -> None:
    three, five = (TimmBackbone(BackboneArchitecture(name, 32, channels)) for channels in (3, 5))
    given, wanted = three.model.state_dict(), five.model.state_dict()
    fitted = fit_channels(given, wanted, 5, ChannelRule("sum"))
    five.model.load_state_dict(dict(fitted))
    changed = [key for key in given if fitted[key] is not given[key]]
    assert changed == ["stem.0.weight"]
    gray = torch.randn(1, 1, 32, 32)
    for model in (three, five):
        model.eval()
    with torch.inference_mode():
        (before,), (after,) = (
            model.blocks(gray.expand(-1, channels, -1, -1), [2]) for model, channels in ((three, 3), (five, 5))
        )
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_gray_encoders_take_colour_as_they_are() -> None:
    gray = replace(ARCHITECTURE, channels=1)
    assert for_images(gray, 3) is gray and for_images(gray, None) is gray
    assert for_images(gray, 4).channels == 4 and for_images(ARCHITECTURE, 1) == gray


@pytest.mark.parametrize(
    "name",
    ["nf_regnet_b0", "vitamin_small_224", "visformer_tiny", "vit_tiny_r_s16_p8_224", "nextvit_small", "pnasnet5large",
     "repvgg_d2se", "convnext_atto", "swin_tiny_patch4_window7_224", "test_vit"],
)  # fmt: skip
def test_the_images_channels_whatever_the_order_of_the_tensors(name: str) -> None:
    """Files ending in .safetensors list their tensors by name, others as the model does."""
    for channels in (1, 3, 13) if name != "pnasnet5large" else (3,):
        with torch.device("meta"):
            tensors = timm.create_model(name, in_chans=channels).state_dict()
        assert first_channels(tensors) == first_channels(dict(sorted(tensors.items()))) == channels
        assert first_channels(tensors, name) == channels


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "densenet121", "tresnet_m"])
def test_the_first_convolution_that_timm_records(name: str) -> None:
    for channels in (1, 3, 5):
        with torch.device("meta"):
            tensors = timm.create_model(name, in_chans=channels).state_dict()
        wrapped = {f"module.{key}": tensor for key, tensor in sorted(tensors.items())}
        assert first_channels(tensors, name) == first_channels(wrapped, name) == channels


def test_a_named_model_keeps_the_channels_of_its_weights(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", in_chans=5).state_dict(), tmp_path / "file.pth")
    assert choose_architecture(read_checkpoint(tmp_path / "file.pth"), "test_resnet").channels == 5
    config = EncoderConfig(arch="test_resnet", weights=str(tmp_path / "file.pth"))
    assert architecture_to_train(config, read_checkpoint(tmp_path / "file.pth")).channels == 5
