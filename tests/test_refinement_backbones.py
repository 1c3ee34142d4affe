"""Refining timm backbones: which weights change, blocks of several widths, resuming, micro-batches, two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch.nn import functional as F

from mimref.config.load import load_config
from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone, find_architecture, reached
from mimref.encoders.checkpoints import encoder_from, read_checkpoint
from mimref.encoders.parameters import encoder_groups
from mimref.errors import ConfigError, Interrupted
from mimref.refinement.config import HeadsConfig, RefineConfig
from mimref.refinement.heads import Heads
from mimref.refinement.memory import check_exact
from mimref.refinement.method import PooledBlocks
from mimref.refinement.plan import make_plan
from mimref.refinement.recipe import fit
from mimref.refinement.run import refine
from mimref.refinement.sizes import describe
from mimref.training.ema import WeightAverage
from tests.families import BATCH_NORM, FAMILIES, backbone, write_backbone
from tests.family_files import PUBLISHED
from tests.ranks import run_ranks
from tests.test_refinement_ranks import SETTINGS
from tests.test_refinement_recipe import fitted, source
from tests.tiny import assert_same_run, header, refine_config, signal_at, tensors, write_labelled

# One epoch of four steps in each stage.
SHORT: dict[str, Any] = {"heads_stage__epochs": 1, "encoder_stage__epochs": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"))


def config_of(name: str, weights: Path, data: Path, **changes: Any) -> Any:
    """Return settings with heads on the last two blocks, and a local view of the nearest possible size to 16 pixels."""
    architecture = FAMILIES[name]
    blocks = {"heads__blocks": f"{architecture.depth - 1}-{architecture.depth}"}
    views = {"views__local_size": architecture.sizes.nearest(16)}
    return refine_config(weights, data, **{**SHORT, **blocks, **views, **changes})


SLOW = ("abswin", "swinv2", "relpos", "gray")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILIES])
def test_what_heads_reach_moves_and_nothing_else(name: str, data: Path, tmp_path: Path) -> None:
    weights = write_backbone(tmp_path / "base.safetensors", FAMILIES[name])
    refine(config_of(name, weights, data), tmp_path / "run")
    base, refined = read_checkpoint(weights).tensors, tensors(tmp_path / "run")
    moved = {key for key in base if not torch.equal(base[key], refined[key])}
    assert moved == reached(FAMILIES[name], FAMILIES[name].depth)
    written = read_checkpoint(tmp_path / "run")
    assert written.architecture == FAMILIES[name] and header(tmp_path / "run")["source"] == "mae refined"
    assert isinstance(encoder_from(written, FAMILIES[name]), TimmBackbone)


def test_frozen_stages_stay(data: Path, tmp_path: Path) -> None:
    weights = write_backbone(tmp_path / "base.safetensors", FAMILIES["swin"])
    refine(config_of("swin", weights, data, encoder_stage__freeze_blocks=1), tmp_path / "run")
    base, refined = read_checkpoint(weights).tensors, tensors(tmp_path / "run")
    moved = {key for key in base if not torch.equal(base[key], refined[key])}
    assert moved == reached(FAMILIES["swin"], 3) - reached(FAMILIES["swin"], 1)
    assert not any(key.startswith(("patch_embed", "layers.0")) for key in moved)


def test_resumed_equals_uninterrupted(data: Path, tmp_path: Path) -> None:
    weights = write_backbone(tmp_path / "base.safetensors", FAMILIES["hiera"])
    config = config_of("hiera", weights, data, micro_batch=5, activation_checkpointing=True)
    refine(config, tmp_path / "whole")
    for resume, step in ((False, 3), (True, 10)):
        # Watchers count the steps of stage 2 from eight on, although stage 1 has only four here.
        with pytest.raises(Interrupted):
            refine(config, tmp_path / "parts", resume=resume, listener=signal_at(step))
    refine(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def refine_both(weights: Path, data: Path, out: Path) -> None:
    refine(config_of("swin", weights, data, **SETTINGS), out)


def test_two_ranks_equal_one(data: Path, tmp_path: Path) -> None:
    weights = write_backbone(tmp_path / "base.safetensors", FAMILIES["swin"])
    refine_both(weights, data, tmp_path / "alone")
    run_ranks(refine_both, 2, tmp_path / "group", weights, data, tmp_path / "ranks")
    alone, other = tensors(tmp_path / "alone"), tensors(tmp_path / "ranks")
    for key, weight in alone.items():
        torch.testing.assert_close(other[key], weight, rtol=0, atol=1e-4)


def refuse_ranks(weights: Path, data: Path, out: Path) -> str:
    try:
        refine(refine_config(weights, data, heads__blocks="4-5", views__local_views=0, **SHORT), out)
    except ConfigError as error:
        return str(error)
    return ""


def test_batch_norm_needs_one_process_and_whole_batches(data: Path, tmp_path: Path) -> None:
    weights = write_backbone(tmp_path / "base.safetensors", BATCH_NORM)
    said = run_ranks(refuse_ranks, 2, tmp_path / "group", weights, data, tmp_path / "ranks")
    assert all("BatchNorm" in line and "one process" in line for line in said)
    with pytest.raises(ConfigError, match=r"^micro_batch: .* BatchNorm"):
        refine(refine_config(weights, data, heads__blocks="4-5", views__local_views=0, micro_batch=4), tmp_path / "a")
    refine(refine_config(weights, data, heads__blocks="4-5", views__local_views=0, **SHORT), tmp_path / "run")
    base, refined = read_checkpoint(weights).tensors, tensors(tmp_path / "run")
    assert not torch.equal(base["bn1.running_mean"], refined["bn1.running_mean"])
    assert refined["bn1.num_batches_tracked"] == 4


def test_frozen_blocks_keep_the_statistics_of_batch_norm(data: Path, tmp_path: Path) -> None:
    weights = write_backbone(tmp_path / "base.safetensors", BATCH_NORM)
    changes = {"heads__blocks": "4-5", "views__local_views": 0, "encoder_stage__freeze_blocks": 2}
    refine(refine_config(weights, data, **changes, **SHORT), tmp_path / "run")
    base, refined = (encoder_from(read_checkpoint(file), BATCH_NORM) for file in (weights, tmp_path / "run"))
    images = torch.randn(2, 3, 32, 32)
    for block in (1, 2):
        assert torch.equal(base.eval().blocks(images, [block])[0], refined.eval().blocks(images, [block])[0])
    counted = {name: int(tensor) for name, tensor in tensors(tmp_path / "run").items() if "num_batches" in name}
    trained = reached(BATCH_NORM, 5) - reached(BATCH_NORM, 2)
    assert counted == {name: 4 * (name.replace("num_batches_tracked", "weight") in trained) for name in counted}


def test_layers_that_timm_does_not_say_are_refused_before_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(SwinTransformer, "group_matcher")  # timm's MetaFormer has none
    weights = write_backbone(tmp_path / "base.safetensors", FAMILIES["swin"])
    with pytest.raises(ConfigError, match=r"^timm does not say which layers SwinTransformer has; .*layer_decay=1$"):
        make_plan(config_of("swin", weights, data, encoder_stage__layer_decay=0.8))
    make_plan(config_of("swin", weights, data, encoder_stage__layer_decay=0.8, stage="heads"))
    groups = encoder_groups(backbone(FAMILIES["swin"]), weight_decay=0.1, layer_decay=1)
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [(1, 0.1), (1, 0)]


def test_models_that_cannot_recompute_their_blocks_are_refused_before_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = write_backbone(tmp_path / "base.safetensors", FAMILIES["swin"])
    config = config_of("swin", weights, data, activation_checkpointing=True)
    make_plan(config)

    def refuse(self: SwinTransformer, enable: bool = True) -> None:
        assert not enable, "gradient checkpointing not supported"  # as timm's Twins and CoaT do

    monkeypatch.setattr(SwinTransformer, "set_grad_checkpointing", refuse)
    with pytest.raises(ConfigError, match=r"^activation_checkpointing: .* swin_tiny_.*set it to false$"):
        make_plan(config)
    monkeypatch.delattr(SwinTransformer, "set_grad_checkpointing")
    with pytest.raises(ConfigError, match=r"^activation_checkpointing: "):
        make_plan(config)


@pytest.mark.parametrize(
    ("name", "num_heads"), [("hiera_mae", None), ("swinv2", None), ("beit", None), ("dinov3", 4), ("dinov3", 2)]
)
def test_settings_of_a_run_name_the_encoder_of_a_publishers_file(
    name: str, num_heads: int | None, data: Path, tmp_path: Path
) -> None:
    case = PUBLISHED[name]
    file = {key: tensor for key, tensor in case.file(case.model()).items() if "rope" not in key}
    torch.save(file, tmp_path / "weights.pth")
    changes = {"heads__blocks": "last1", "views__local_views": 0}
    config = refine_config(tmp_path / "weights.pth", data, encoder__num_heads=num_heads, **changes)
    plan = make_plan(config)
    assert isinstance(plan.architecture, BackboneArchitecture) and plan.architecture.options
    assert make_plan(plan.config).architecture == plan.architecture  # as resuming does
    assert dict(plan.architecture.options).get("num_heads") == num_heads or num_heads is None


def test_stochastic_depth_needs_whole_batches() -> None:
    options = {**dict(FAMILIES["swin"].options), "drop_path_rate": 0.1}
    from dataclasses import replace

    check_exact(backbone(FAMILIES["swin"]))
    with pytest.raises(ConfigError, match=r"^out of memory: the encoder has BatchNorm layers, .* lower batch_size$"):
        check_exact(backbone(BATCH_NORM), "out of memory")
    with pytest.raises(ConfigError, match="stochastic depth"):
        check_exact(backbone(replace(FAMILIES["swin"], options=tuple(sorted(options.items())))))


def test_averages_hold_the_statistics_of_batch_norm() -> None:
    encoder = backbone(BATCH_NORM).train()
    kept = WeightAverage(encoder, 0.9)
    encoder.blocks(torch.randn(4, 3, 32, 32), [5])
    kept.update()
    for found, wanted in zip(kept.module.buffers(), encoder.buffers(), strict=True):
        assert torch.equal(found, wanted)
    assert not kept.module.training


# --- blocks of several widths


def test_gradients_in_parts_are_those_of_one_pass() -> None:
    encoder = backbone(FAMILIES["swin"]).double()
    wanted = [2, 3]
    pooled = PooledBlocks(encoder, wanted, "mean")
    images = [torch.randn(6, 3, size, size, dtype=torch.float64) for size in (32, 16)]
    whole, _ = pooled(images)
    assert [tuple(x.shape) for x in whole] == [(12, 32), (12, 64)]
    directions = [torch.randn_like(x) for x in whole]
    torch.autograd.backward(whole, directions)
    expected = [weight.grad.clone() for weight in encoder.parameters() if weight.grad is not None]
    encoder.zero_grad()
    for rows in (slice(0, 4), slice(4, 6)):
        parts, _ = pooled([sized[rows] for sized in images])
        of_part = [torch.cat([x[:6][rows], x[6:][rows]]) for x in directions]
        torch.autograd.backward(parts, of_part)
    found = [weight.grad for weight in encoder.parameters() if weight.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def plain_head(heads: Heads, head: int, first: torch.Tensor, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute head `head` with plain functions; first: its first weight."""
    layers = [*heads.projector, *heads.predictor]
    projected = x_ND
    outputs = []
    for number, layer in enumerate(layers):
        weight = first if number == 0 else layer.linear.weight[head]
        x_ND = F.linear(x_ND, weight)
        width = x_ND.shape[1]
        own = slice(head * width, (head + 1) * width)
        x_ND = F.batch_norm(x_ND, None, None, layer.norm.weight[own], layer.norm.bias[own], training=True)
        x_ND = x_ND if number in (2, 4) else F.gelu(x_ND)
        outputs.append(x_ND)
    projected, predicted = outputs[2], outputs[4]
    return F.normalize(projected, dim=1), F.normalize(predicted, dim=1)


def test_heads_of_several_widths_are_plain_heads() -> None:
    torch.manual_seed(0)
    widths = [12, 8, 12, 20]
    heads = Heads(HeadsConfig(projector_hidden=16, predictor_hidden=10, output=6), widths).double()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    features = [torch.randn(9, width, dtype=torch.float64) for width in widths]
    stacked = heads.stacked(features)
    assert [tuple(x.shape) for x in stacked] == [(1, 9, 8), (2, 9, 12), (1, 9, 20)]
    projection_HNO, prediction_HNO = heads(*stacked)
    linears: Any = heads.projector[0].linear.linears
    first = [linears[1].weight[0], linears[0].weight[0], linears[1].weight[1], linears[2].weight[0]]
    for head, x_ND in enumerate(features):
        projected, predicted = plain_head(heads, head, first[head], x_ND)
        torch.testing.assert_close(projection_HNO[head], projected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(prediction_HNO[head], predicted, rtol=1e-9, atol=1e-12)
    hidden_HNW = heads.hidden(*stacked)
    assert hidden_HNW.shape == (4, 9, 16)


def test_heads_of_one_width_are_as_before() -> None:
    config = HeadsConfig(projector_hidden=16, predictor_hidden=10, output=6)
    torch.manual_seed(0)
    heads = Heads(config, [12] * 3)
    assert next(iter(heads.state_dict())) == "projector.0.linear.weight"
    torch.manual_seed(0)
    bound = (6 / (12 + 16)) ** 0.5
    assert torch.equal(heads.projector[0].linear.weight, torch.empty(3, 16, 12).uniform_(-bound, bound))


# --- plans


def test_a_plan_of_stages(data: Path, tmp_path: Path) -> None:
    weights = write_backbone(tmp_path / "base.safetensors", FAMILIES["swin"])
    plan = make_plan(config_of("swin", weights, data, heads__blocks="1-3"))
    assert plan.widths == [16, 32, 64] and plan.blocks == [1, 2, 3]
    assert describe(plan)["encoder"].startswith("swin_tiny_patch4_window7_224, 3 blocks of width 16, 32, 64, ")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("swin", {"views__local_size": 20}, r"views\.local_size 20 .* multiple of 8, .* nearest is 24"),
        ("relpos", {"views__local_size": 16}, r"views\.local_size 16 .* one size .* nearest is 32"),
        ("swin", {"heads__blocks": "last8"}, r"heads\.blocks 'last8' .* blocks 1 to 3"),
        ("swin", {"encoder_stage__freeze_blocks": 3}, "freeze_blocks 3 leaves nothing"),
    ],
)
def test_plans_that_do_not_fit(name: str, changes: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    weights = write_backbone(tmp_path / "base.safetensors", FAMILIES[name])
    with pytest.raises(ConfigError, match=message):
        make_plan(config_of(name, weights, data, **changes))


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("swin_tiny_patch4_window7_224", 96),
        ("beit_base_patch16_224", 96),
        ("hiera_tiny_224", 96),
        ("test_vit_relpos", 160),
    ],
)
def test_recipes_choose_sizes_that_fit(name: str, local: int) -> None:
    architecture = find_architecture(name, None, None)
    assert fitted(source(900), architecture).views.local_size == local
    preset = load_config(RefineConfig, "mae_l16", {"device": "cpu"})
    assert fit(preset, architecture, source(900))[0].views.local_size == local
