"""Backbones of every family: tokens against timm's own code, image sizes, layers, gradients, headers."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone, architecture_from, reached
from mimref.encoders.checkpoints import encoder_from, read_checkpoint, save_encoder
from mimref.encoders.parameters import encoder_groups, freeze_untrained
from mimref.errors import CheckpointError, ConfigError
from tests.families import BATCH_NORM, FAMILIES, backbone, timms_own, write_backbone

NORMED = {"dinov3", "swin", "swinv2", "gray"}
"""Families whose norm comes before pooling."""
NAMES = [*FAMILIES]


def images(architecture: BackboneArchitecture, size: int | None = None) -> Tensor:
    side = size or architecture.image_size
    return torch.randn(2, architecture.channels, side, side, generator=torch.Generator().manual_seed(1))


def timms_tokens(model: Any, x: Tensor) -> list[Tensor]:
    """Prefix tokens and maps in reading order, by plain loops over timm's own features."""
    prefix = bool(getattr(model, "num_prefix_tokens", 0))
    options = {"return_prefix_tokens": True} if prefix else {}
    found = model.forward_intermediates(x, intermediates_only=True, **options)
    rows = []
    for each in found:
        map_BDHW, prefix_BPD = each if prefix else (each, None)
        tokens = [
            map_BDHW[:, :, row, column] for row in range(map_BDHW.shape[2]) for column in range(map_BDHW.shape[3])
        ]
        first = [] if prefix_BPD is None else list(prefix_BPD.unbind(1))
        rows.append(torch.stack(first + tokens, dim=1))
    return rows


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_tokens_equal_timms(name: str) -> None:
    encoder = backbone(FAMILIES[name])
    own = timms_own(encoder)
    own.load_state_dict(encoder.model.state_dict())
    x, every = images(encoder.architecture), range(1, encoder.depth + 1)
    expected = timms_tokens(own, x)
    assert [tokens.shape[2] for tokens in expected] == encoder.widths == encoder.architecture.widths
    for found, wanted in zip(encoder.blocks(x, every), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert encoder.architecture.has_final_norm == (name in NORMED)
    if name in NORMED:
        raw, normed = encoder.blocks(x, [encoder.depth, encoder.depth], final_norm=[False, True])
        features = own.forward_features(x)
        features = features.flatten(1, 2) if features.ndim == 4 else features
        torch.testing.assert_close(normed, features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(raw, expected[-1], rtol=1e-5, atol=1e-5)
        assert (raw - normed).abs().max() > 0.1


def test_raw_and_normed_tokens_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, calls = backbone(FAMILIES["swin"]), list[int]()
    forward = encoder.model.forward_intermediates
    monkeypatch.setattr(encoder.model, "forward_intermediates", lambda *a, **k: calls.append(1) or forward(*a, **k))
    encoder.blocks(images(encoder.architecture), [1, 3, 3], final_norm=[False, False, True])
    assert calls == [1]


# --- sizes


@pytest.mark.parametrize("name", ["eva", "dinov3", "swin", "swinv2", "convnextv2"])
@torch.no_grad()
def test_other_sizes_equal_timms(name: str) -> None:
    encoder = backbone(FAMILIES[name])
    option = {"eva": "dynamic_img_size", "dinov3": "dynamic_img_size", "convnextv2": None}.get(name, "strict_img_size")
    own = timms_own(encoder, **({option: option != "strict_img_size"} if option else {}))
    own.load_state_dict(encoder.model.state_dict())
    for size in (16, 48):
        x = images(encoder.architecture, size)
        for found, wanted in zip(encoder.blocks(x, range(1, encoder.depth + 1)), timms_tokens(own, x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_beit_reads_a_part_of_its_relative_positions() -> None:
    encoder = backbone(FAMILIES["beit"])
    small = timms_own(encoder, 16)
    state = dict(encoder.model.state_dict())
    for key in state:
        if key.endswith("relative_position_bias_table"):
            # Table rows are offsets (rows, columns) between two patches: keep those within a 2 x 2 grid, out of 4 x 4.
            kept = [(down + 3) * 7 + right + 3 for down in (-1, 0, 1) for right in (-1, 0, 1)]
            state[key] = state[key][[*kept, 49, 50, 51]]
    small.load_state_dict(state)
    x = images(encoder.architecture, 16)
    for found, wanted in zip(encoder.blocks(x, [1, 2, 3]), timms_tokens(small, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["hiera", "abswin"])
@torch.no_grad()
def test_hiera_interpolates_its_positions(name: str) -> None:
    encoder = backbone(FAMILIES[name])
    small = timms_own(encoder, 16)
    state = dict(encoder.model.state_dict())
    if name == "hiera":
        map_1DRR = state["pos_embed"].reshape(1, 16, 16, 16).permute(0, 3, 1, 2)
        resized = F.interpolate(map_1DRR, (8, 8), mode="bicubic", antialias=True)
        state["pos_embed"] = resized.permute(0, 2, 3, 1).reshape(1, 64, 16)
    small.load_state_dict(state)
    x = images(encoder.architecture, 16)
    for found, wanted in zip(encoder.blocks(x, [1, 2, 3]), timms_tokens(small, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # A pass at another size has no lasting effect.
    assert encoder.blocks(images(encoder.architecture), [1])[0].shape[1] == 256


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [
        ("eva", 20, 24),
        ("swin", 20, 24),
        ("hiera", 3, 8),
        ("convnextv2", 36, 40),
        ("beit", 12, 16),
        ("beit", 64, 32),
        ("relpos", 24, 32),
    ],
)
def test_sizes_that_do_not_fit(name: str, size: int, nearest: int) -> None:
    architecture = FAMILIES[name]
    if not timm.is_model(architecture.name):
        pytest.skip(f"timm {timm.__version__} has no {architecture.name}")
    with pytest.raises(ConfigError, match=rf"^views\.local_size {size} .*; the nearest is {nearest}$"):
        architecture.check_size(size, "views.local_size")
    architecture.check_size(nearest, "views.local_size")


# --- parameters


@pytest.mark.parametrize("name", [*NAMES, "batch norm"])
def test_only_what_heads_reach_is_trained(name: str) -> None:
    architecture = BATCH_NORM if name == "batch norm" else FAMILIES[name]
    encoder = backbone(architecture)
    depth, x = encoder.depth, images(architecture)

    def with_gradient(last: int) -> set[str]:
        encoder.zero_grad(set_to_none=True)
        (tokens,) = encoder.blocks(x, [last], final_norm=architecture.has_final_norm)
        encoder.pool(tokens, "cls").square().sum().backward()
        return {key for key, weight in encoder.model.named_parameters() if weight.grad is not None}

    first, last, every = with_gradient(1), with_gradient(depth - 1), with_gradient(depth)
    assert (first, last, every) == tuple(reached(architecture, block) for block in (1, depth - 1, depth))
    assert first <= last < every
    for reads, frozen, expected in ((depth, 0, every), (depth - 1, 0, last), (depth, 1, every - first)):
        trained = copy.deepcopy(encoder)
        freeze_untrained(trained, first=frozen, last=reads)
        assert {key for key, weight in trained.model.named_parameters() if weight.requires_grad} == expected


def scales(architecture: BackboneArchitecture) -> dict[str, tuple[float, float]]:
    encoder = backbone(architecture)
    freeze_untrained(encoder, first=0, last=encoder.depth)
    groups = encoder_groups(encoder, weight_decay=0.05, layer_decay=0.5)
    return {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_layers_of_transformer_blocks_count_as_those_of_a_plain_vit() -> None:
    found = scales(FAMILIES["dinov3"])
    assert found["norm.weight"] == (1.0, 0.0)
    assert [found[f"blocks.{block}.attn.qkv.weight"] for block in range(3)] == [
        (0.125, 0.05),
        (0.25, 0.05),
        (0.5, 0.05),
    ]
    assert found["cls_token"] == found["reg_token"] == (0.0625, 0.0)
    assert found["patch_embed.proj.weight"] == (0.0625, 0.05)


def test_layers_of_stages_are_their_blocks() -> None:
    found = scales(FAMILIES["swin"])
    blocks = ("layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1", "layers.2.blocks.0")
    assert [found[f"{name}.attn.qkv.weight"] for name in blocks] == [(0.5**left, 0.05) for left in (4, 3, 2, 1)]
    # Relative positions have no weight decay, whatever their number of dimensions.
    assert found["layers.1.blocks.1.attn.relative_position_bias_table"] == (0.25, 0.0)
    assert found["norm.weight"] == (1.0, 0.0) and found["patch_embed.proj.weight"] == (0.5**5, 0.05)
    of_v2 = scales(FAMILIES["swinv2"])
    assert of_v2["layers.0.blocks.0.attn.logit_scale"][1] == of_v2["layers.0.blocks.0.attn.cpb_mlp.0.weight"][1] == 0
    of_convnext = scales(FAMILIES["convnextv2"])
    assert of_convnext["stages.3.blocks.0.mlp.fc1.weight"] == (0.5, 0.05)
    assert of_convnext["stages.2.blocks.0.mlp.grn.weight"][1] == 0.0


@pytest.mark.parametrize("name", ["eva", "beit", "swin", "hiera", "convnextv2"])
def test_recomputed_blocks_have_the_same_gradients(name: str) -> None:
    plain = backbone(FAMILIES[name])
    saving = copy.deepcopy(plain)
    saving.checkpointing = True
    gradients = []
    for encoder in (plain, saving):
        encoder.train()
        # Two image sizes before the backward pass, which recomputes both.
        outputs = [encoder.blocks(images(plain.architecture, size), [1, 2])[-1] for size in (32, 16)]
        sum(tokens.square().mean() for tokens in outputs).backward()  # type: ignore[union-attr]
        gradients.append([weight.grad for weight in encoder.parameters() if weight.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


# --- files


@pytest.mark.parametrize("name", NAMES)
def test_headers_say_everything(name: str, tmp_path: Path) -> None:
    architecture = FAMILIES[name]
    path = write_backbone(tmp_path / "a.safetensors", architecture)
    checkpoint = read_checkpoint(path)
    assert checkpoint.architecture == architecture and checkpoint.source == "mae"
    assert checkpoint.header["architecture"]["backbone"] is True
    read = encoder_from(checkpoint, architecture)
    state = backbone(architecture).model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in read.model.state_dict().items())


def test_counts_of_batches_stay_integers(tmp_path: Path) -> None:
    save_encoder(tmp_path / "a.safetensors", backbone(BATCH_NORM), {})
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    assert isinstance(encoder_from(checkpoint, BATCH_NORM), TimmBackbone)


def test_keys_of_caches_and_headers() -> None:
    plain = BackboneArchitecture("convnextv2_atto", 224)
    assert plain.key() == {"name": "convnextv2_atto", "image_size": 224}
    assert plain.to_dict() == {"backbone": True, "name": "convnextv2_atto", "image_size": 224}
    for architecture in FAMILIES.values():
        if not timm.is_model(architecture.name):
            continue  # added by a later timm
        assert architecture_from(architecture.to_dict()) == architecture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": "32"}, "image_size = '32'"),
        ({"image_size": 0}, "image_size = 0"),
        ({"width": 3}, "'width'"),
        ({"options": [1]}, r"options = \[1\]"),
        ({"options": {"depths": {}}}, "depths = {}"),
        ({"name": "swin_tinny_patch4_window7_224"}, "did you mean"),
    ],
)
def test_damaged_headers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        architecture_from(FAMILIES["swin"].to_dict() | changes)


@pytest.mark.parametrize("option", ["pretrained", "checkpoint_path", "in_chans", "img_size", "no_such"])
def test_options_set_sizes_alone(option: str) -> None:
    architecture = replace(FAMILIES["swin"], options=((option, 1),))
    with pytest.raises(ConfigError, match=option):
        TimmBackbone(architecture)


def test_weights_of_other_sizes_are_refused(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_backbone(tmp_path / "a.safetensors", FAMILIES["swin"]))
    wider = replace(FAMILIES["swin"], options=tuple({**dict(FAMILIES["swin"].options), "embed_dim": 32}.items()))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: does not fit swin_tiny"):
        encoder_from(checkpoint, wider)


@torch.no_grad()
def test_positions_are_interpolated_to_the_size_that_it_is_built_for(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_backbone(tmp_path / "a.safetensors", FAMILIES["eva"]))
    larger = encoder_from(checkpoint, replace(FAMILIES["eva"], image_size=48)).eval()
    x = images(FAMILIES["eva"], 48)
    (found,), (wanted,) = larger.blocks(x, [3]), backbone(FAMILIES["eva"]).blocks(x, [3])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
