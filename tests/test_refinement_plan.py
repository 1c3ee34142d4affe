"""Settings that cannot make a refinement are refused before anything is trained."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from mimref.benchmarks.stage import resolve_encoder
from mimref.config.load import load_config
from mimref.encoders.checkpoints import encoder_from, save_encoder
from mimref.encoders.positions import sincos_positions
from mimref.encoders.vit import Encoder
from mimref.errors import CheckpointError, ConfigError
from mimref.refinement.config import RefineConfig
from mimref.refinement.plan import _slow_average, make_plan
from mimref.refinement.sizes import describe, state_bytes
from tests.tiny import refine_config, write_unlabelled, write_weights


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Weights of four blocks, and 48 images."""
    folder = tmp_path_factory.mktemp("plan")
    return write_weights(folder / "weights.safetensors"), write_unlabelled(folder / "images")


def test_a_plan_counts_heads_and_steps(paths: tuple[Path, Path]) -> None:
    plan = make_plan(refine_config(*paths, heads__blocks="4,2,4", heads__temperature=[0.1, 0.2, 0.3]))
    assert (plan.blocks, plan.temperature) == ([4, 2, 4], [0.1, 0.2, 0.3])
    assert (plan.steps_per_epoch, plan.heads_steps, plan.encoder_steps) == (4, 8, 12)
    assert make_plan(refine_config(*paths, batch_size=13)).steps_per_epoch == 3
    alone = make_plan(refine_config(*paths, stage="heads", heads__temperature=0.3))
    assert (alone.temperature, alone.heads_steps, alone.encoder_steps) == ([0.3, 0.3], 8, 0)


@pytest.mark.parametrize("blocks", ["4,3", "3,3,4", "1-3,2"])
def test_a_schedule_needs_heads_in_rising_order(blocks: str, paths: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=rf"'one_hot' .* heads\.blocks '{blocks}' must name"):
        make_plan(refine_config(*paths, heads__blocks=blocks, loss__schedule="one_hot"))
    assert make_plan(refine_config(*paths, heads__blocks=blocks)).blocks  # without a schedule, any order will do


def test_a_schedule_needs_two_heads(paths: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="'uniform_decay' needs at least two heads"):
        make_plan(refine_config(*paths, heads__blocks="4", loss__schedule="uniform_decay"))
    rising = make_plan(refine_config(*paths, heads__blocks="1,3-4", loss__schedule="uniform_decay"))
    assert rising.blocks == [1, 3, 4]


def test_foreign_weights_are_what_they_say(paths: tuple[Path, Path], tmp_path: Path) -> None:
    state = load_file(paths[0])
    torch.save({"model": state | {"decoder_pred.bias": torch.zeros(2)}}, tmp_path / "mae.pth")
    config = refine_config(tmp_path / "mae.pth", paths[1])
    with pytest.raises(
        CheckpointError, match=r"heads is unknown for a width of 32; --set encoder\.num_heads=N .*; pass --arch"
    ):
        make_plan(config)
    plan = make_plan(refine_config(tmp_path / "mae.pth", paths[1], encoder__num_heads=2, encoder__source="dbot"))
    assert (plan.architecture.depth, plan.architecture.num_heads) == (4, 2)
    assert plan.config.encoder.source == "mae"
    assert plan.warnings == [f"encoder.source dbot is ignored: {tmp_path / 'mae.pth'} is of mae"]


def test_training_images_are_decoded_as_the_weights_record(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """Also if the settings name the images; validation images are decoded in the same way."""
    made = make_plan(refine_config(*paths))
    encoder = encoder_from(made.checkpoint, made.architecture)
    save_encoder(tmp_path / "turned.safetensors", encoder, {"source": "mae", "data": {"orientation": "exif"}})
    plan = make_plan(refine_config(tmp_path / "turned.safetensors", paths[1]))
    assert plan.config.data.orientation == plan.source.decoding.orientation == "exif"
    plan = make_plan(refine_config(tmp_path / "turned.safetensors", paths[1], data__orientation="file"))
    assert plan.config.data.orientation == plan.source.decoding.orientation == "file"


def test_the_queue_holds_top_k_rows_of_other_images(paths: tuple[Path, Path]) -> None:
    assert make_plan(refine_config(*paths, encoder_stage__top_k=21, heads__queue_size=24))
    with pytest.raises(ConfigError, match=r"top_k of 22 needs a heads\.queue_size of at least 25, not 24"):
        make_plan(refine_config(*paths, encoder_stage__top_k=22, heads__queue_size=24))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads__blocks": "3-5"}, r"heads\.blocks '3-5' does not fit: the encoder has blocks 1 to 4"),
        ({"heads__temperature": [0.1, 0.2, 0.3]}, r"heads\.temperature has 3 values for 2 heads"),
        ({"heads__queue_size": 49}, r"heads\.queue_size 49 exceeds the 48 training images"),
        ({"batch_size": 49}, r"batch_size 49 "),
        ({"encoder_stage__freeze_blocks": 4}, r"freeze_blocks 4 leaves nothing to refine: the last head reads block 4"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict[str, object], message: str, paths: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(refine_config(*paths, **changes))


def test_sin_cos_positions_of_a_timm_model_stay_fixed(paths: tuple[Path, Path], tmp_path: Path) -> None:
    model = timm.create_model("test_vit", img_size=16, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "learned.pth")
    model.pos_embed.data.copy_(sincos_positions(64, 1))
    torch.save(model.state_dict(), tmp_path / "fixed.pth")
    sizes = {"heads__blocks": "5,6", "encoder__image_size": 16, "encoder__arch": "test_vit", "views__local_views": 0}
    for name, fixed in (("learned", False), ("fixed", True)):
        plan = make_plan(refine_config(tmp_path / f"{name}.pth", paths[1], **sizes))
        encoder = encoder_from(plan.checkpoint, plan.architecture)
        assert isinstance(encoder, Encoder) and encoder.vit.pos_embed is not None
        assert plan.architecture.fixed_positions is fixed is not encoder.vit.pos_embed.requires_grad


def test_an_average_too_slow_for_its_updates_is_reported(paths: tuple[Path, Path]) -> None:
    """The share of the base in the result is the decay to the power of the updates."""
    updates = make_plan(refine_config(*paths)).encoder_steps
    kept = {ema: make_plan(refine_config(*paths, encoder_stage__ema=ema)).warnings for ema in (0.5, 0.999)}
    assert 0.5**updates < 0.1 < 0.999**updates and kept[0.5] == []
    (warning,) = kept[0.999]
    assert f"ema 0.999 is slow for {updates} updates" in warning and f"{100 * 0.999**updates:.0f}% of" in warning
    heads_only = refine_config(*paths, encoder_stage__ema=0.999, stage="heads")
    assert make_plan(heads_only).warnings == []


@pytest.mark.parametrize(
    "name", ["mae_b16", "mae_l16", "mae_h14", "mae_2b14", "d2v2_l16", "d2v2_h14", "d2v2_h14_nocolor"]
)
def test_no_average_of_the_papers_presets_is_too_slow(name: str) -> None:
    assert _slow_average(load_config(RefineConfig, name), 1_281_167) == []


def test_a_dry_run_tells_the_memory_of_what_is_trained(paths: tuple[Path, Path]) -> None:
    plan = make_plan(refine_config(*paths, encoder_stage__freeze_blocks=2))
    state = state_bytes(plan.config, plan.architecture, plan.blocks, "encoder")
    assert describe(plan)["memory"].startswith(f"{state.total / 2**20:.1f} MiB in float32")


def test_a_benchmark_has_the_encoder_of_the_run(paths: tuple[Path, Path], tmp_path: Path) -> None:
    config = refine_config(*paths, encoder__image_size=32)
    assert resolve_encoder(config) == (make_plan(config).architecture, [3, 4])
    assert resolve_encoder(config)[0].image_size == 32
    torch.save({"a": torch.zeros(3)}, tmp_path / "unknown.pth")
    for ask in (make_plan, resolve_encoder):
        with pytest.raises(CheckpointError, match=r"; pass --arch"):
            ask(refine_config(tmp_path / "unknown.pth", paths[1]))
