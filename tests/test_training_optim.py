"""Learning rates at their corners, and what AdamW does with parameter groups."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from mimref.encoders.parameters import encoder_groups
from mimref.encoders.vit import Architecture, build_encoder
from mimref.refinement.config import HeadsConfig
from mimref.refinement.heads import Heads
from mimref.training.optim import adamw, learning_rate, module_groups, set_learning_rate, warmup_updates

TINY = Architecture("custom", image_size=8, width=8, depth=3, num_heads=2, patch_size=4)


def found_in(groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return learning-rate scale and weight decay by parameter name."""
    assert all(len(group["names"]) == len(group["params"]) for group in groups)
    return {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_groups_of_heads() -> None:
    heads = Heads(HeadsConfig(projector_hidden=4, predictor_hidden=4, output=4), [8, 8])
    found = found_in(module_groups(heads, weight_decay=1e-5))
    assert found.keys() == dict(heads.named_parameters()).keys()
    for name, value in found.items():
        assert value == (1.0, 1e-5 if "linear" in name else 0.0)


def test_groups_of_a_module_leave_out_frozen_and_named_parameters() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    module[0].weight.requires_grad_(False)
    module.no_decay_names = frozenset({"1.weight"})  # type: ignore[assignment]
    found = found_in(module_groups(module, weight_decay=0.1))
    assert found == {"0.bias": (1.0, 0.0), "1.weight": (1.0, 0.0), "1.bias": (1.0, 0.0)}


def test_an_update_without_gradient_shows_each_group_its_rate_and_decay() -> None:
    # AdamW multiplies weights by 1 - lr * decay; with a gradient of zero it does nothing else.
    encoder = build_encoder(TINY)
    optimizer = adamw(encoder_groups(encoder, weight_decay=0.5, layer_decay=0.5), betas=(0.9, 0.95))
    set_learning_rate(optimizer, 0.1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = {name: parameter.detach() for name, parameter in encoder.vit.named_parameters()}
    for name, factor in {
        "patch_embed.proj.weight": 1 - 0.1 * 0.5**4 * 0.5,
        "blocks.0.attn.qkv.weight": 1 - 0.1 * 0.5**3 * 0.5,
        "blocks.2.mlp.fc2.weight": 1 - 0.1 * 0.5**1 * 0.5,
        "blocks.2.mlp.fc2.bias": 1.0,
        "blocks.1.norm1.weight": 1.0,
        "cls_token": 1.0,
        "norm.weight": 1.0,
        "pos_embed": 1.0,
    }.items():
        torch.testing.assert_close(after[name], torch.full_like(after[name], factor), rtol=1e-6, atol=0)
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


def test_setting_the_rate_scales_it_by_layer_every_time() -> None:
    encoder = build_encoder(TINY)
    groups = encoder_groups(encoder, weight_decay=0.05, layer_decay=0.65)
    optimizer = adamw(groups + module_groups(nn.Linear(2, 2), weight_decay=0.0), betas=(0.9, 0.95))
    for rate in (1e-3, 2e-4):
        set_learning_rate(optimizer, rate)
        found = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
        assert found["cls_token"] == pytest.approx(rate * 0.65**4)
        assert found["blocks.2.norm1.bias"] == pytest.approx(rate * 0.65)
        assert found["norm.bias"] == found["weight"] == rate


def test_learning_rate_at_its_corners() -> None:
    def rate(update: int) -> float:
        return learning_rate(update, peak=4e-3, warmup_updates=10, total_updates=110, end=1e-6)

    assert rate(0) == pytest.approx(4e-3 * 1 / 11)
    assert rate(9) == pytest.approx(4e-3 * 10 / 11)  # last of the warm-up
    assert rate(10) == 4e-3  # first after it
    assert rate(60) == pytest.approx((4e-3 + 1e-6) / 2)
    assert rate(85) == pytest.approx(1e-6 + (4e-3 - 1e-6) * (1 - math.sqrt(0.5)) / 2)
    assert rate(109) == pytest.approx(1e-6 + (4e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * 0.99)))
    assert 1e-6 < rate(109) < 1e-6 + 4e-3 * 3e-4
    assert rate(110) == rate(500) == 1e-6
    steps = [rate(update) - rate(update - 1) for update in range(1, 110)]
    assert all(step > 0 for step in steps[:10]) and all(step < 0 for step in steps[10:])
    # The warm-up is a straight line whose next point is the peak.
    assert steps[:10] == pytest.approx([4e-3 / 11] * 10)


def test_learning_rate_without_warmup_and_with_nothing_else() -> None:
    assert learning_rate(0, peak=1.0, warmup_updates=0, total_updates=4, end=0.0) == 1.0
    assert learning_rate(2, peak=1.0, warmup_updates=0, total_updates=4, end=0.0) == pytest.approx(0.5)
    only = [learning_rate(update, peak=1.0, warmup_updates=4, total_updates=4, end=0.0) for update in range(5)]
    assert only == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert learning_rate(0, peak=1.0, warmup_updates=0, total_updates=1, end=0.1) == 1.0


@pytest.mark.parametrize(
    ("set_to", "epochs", "expected_epochs"),
    [
        *[(None, 30, 4), (None, 20, 4), (None, 19, 3.8), (None, 10, 2), (None, 1, 0.2), (None, 800, 4)],
        *[(0.0, 30, 0), (1.5, 30, 1.5), (40.0, 800, 40)],
    ],
)
def test_length_of_the_warmup(set_to: float | None, epochs: int, expected_epochs: float) -> None:
    assert warmup_updates(set_to, epochs, 1000) == expected_epochs * 1000
