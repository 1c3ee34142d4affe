"""Whole pre-training runs: interrupted ones equal uninterrupted ones, and their encoder can be refined."""

import json
import signal
from pathlib import Path

import pytest
import torch

from mimref.config.load import load_config
from mimref.encoders.positions import sincos_positions
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import Checks, ConfigError, DivergenceError, Interrupted
from mimref.evaluation.assess.measures import MEASURES
from mimref.pretraining.config import PretrainConfig
from mimref.pretraining.mae import MaskedAutoencoder
from mimref.pretraining.plan import make_plan
from mimref.pretraining.run import pretrain
from mimref.pretraining.simmim import SimMIM
from mimref.progress import Silent
from mimref.refinement.run import refine
from tests.tiny import (
    Killed,
    Watcher,
    assert_same_run,
    header,
    kill_at,
    pretrain_config,
    refine_config,
    results,
    signal_at,
    simmim_config,
    tensors,
    write_labelled,
    write_unlabelled,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module", params=["mae", "simmim"])
def config(request: pytest.FixtureRequest, data: Path) -> PretrainConfig:
    return pretrain_config(data) if request.param == "mae" else simmim_config(data)


@pytest.fixture(scope="module")
def whole(config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps, 4 per epoch."""
    out = tmp_path_factory.mktemp("whole")
    pretrain(config, out)
    return out


def test_a_run_leaves_what_it_promises(config: PretrainConfig, whole: Path) -> None:
    files = {"config.toml", "encoder.safetensors", "metrics.jsonl", "exhibits.json", "results.csv", "results.json"}
    assert {path.name for path in whole.iterdir()} == files
    found = results(whole)
    assert found["command"] == "pretrain" and found["elapsed_s"] > 0 and found["bad_images"] == []
    assert {row["metric"] for row in found["metrics"]} == {"feature_variance", *MEASURES, "knn_top1"}
    assert header(whole)["metrics"] == found["metrics"] and header(whole)["source"] == config.objective
    # Decoder and mask token are not part of the encoder; SimMIM's encoder has learned its positions.
    architecture = Architecture.from_dict(header(whole)["architecture"])
    assert tensors(whole).keys() == build_encoder(architecture).vit.state_dict().keys()
    fixed = torch.equal(tensors(whole)["pos_embed"], sincos_positions(32, 4))
    assert fixed == architecture.fixed_positions == (config.objective == "mae")
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "knn_top1" in line] == [4, 8, 12]


def test_interrupted_and_resumed_equals_uninterrupted(config: PretrainConfig, whole: Path, tmp_path: Path) -> None:
    stops = [signal_at(1), signal_at(4, signal.SIGINT), signal_at(6), kill_at("step", 11), signal_at(12)]
    for attempt, watcher in enumerate(stops):
        with pytest.raises((Interrupted, Killed)):
            pretrain(config, tmp_path, resume=attempt > 0, listener=watcher)
        assert not (tmp_path / "results.json").exists()
    pretrain(config, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)
    assert not (tmp_path / "state").exists()


def test_resuming_a_finished_run_returns_its_results(config: PretrainConfig, whole: Path) -> None:
    watcher = Watcher()
    assert pretrain(config, whole, resume=True, listener=watcher).rows == results(whole)["metrics"]
    assert watcher.step == 0


def test_config_toml_and_workers_give_the_same_run(whole: Path, tmp_path: Path) -> None:
    config = load_config(PretrainConfig, str(whole / "config.toml"), {"workers": 2})
    pretrain(config, tmp_path)
    assert_same_run(tmp_path, whole)


def test_another_seed_gives_other_weights(config: PretrainConfig, whole: Path, tmp_path: Path) -> None:
    pretrain(config.model_copy(update={"seed": 1}), tmp_path)
    assert not torch.equal(tensors(tmp_path)["blocks.0.attn.qkv.weight"], tensors(whole)["blocks.0.attn.qkv.weight"])


def test_the_result_can_be_refined(whole: Path, data: Path, tmp_path: Path) -> None:
    config = refine_config(whole, data, heads__blocks="2", heads_stage__epochs=1, encoder_stage__epochs=1)
    refine(config, tmp_path)
    assert header(tmp_path)["architecture"] == header(whole)["architecture"]


def test_unlabelled_images_and_bad_ones(tmp_path: Path) -> None:
    data = write_unlabelled(tmp_path / "data")
    (data / "bad.png").write_bytes(b"no image")
    watcher = Watcher()
    result = pretrain(pretrain_config(data, mae__epochs=2), tmp_path / "out", listener=watcher)
    assert {row["metric"] for row in result.rows} == {"feature_variance", *MEASURES}
    assert results(tmp_path / "out")["bad_images"] == [{"path": str(data / "bad.png"), "reason": "not an image"}]
    (warning,) = [warning for warning in watcher.warnings if "unreadable" in warning]
    assert f"{data / 'bad.png'} (not an image)" in warning


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    config: PretrainConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MaskedAutoencoder if config.objective == "mae" else SimMIM
    forward, calls = model.forward, 0

    def broken(self: torch.nn.Module, images: torch.Tensor, noise_BN: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss: torch.Tensor = forward(self, images, noise_BN)  # type: ignore[arg-type]
        return loss * float("nan") if calls == 7 else loss

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", broken)
        with pytest.raises(DivergenceError, match="not finite at step 7"):
            pretrain(config, tmp_path)
    pretrain(config, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_what_cannot_be_pretrained_is_named(data: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"encoder__weights": "quickstart"}, "encoder.weights 'quickstart'"),
        ({"encoder__image_size": 18}, "encoder.image_size 18 is not divisible by the patch size 4"),
        ({"encoder__image_size": 4}, "encoder.image_size 4 is one patch"),
        ({"batch_size": 64}, "--batch-size 48"),
        ({"encoder__source": "d2v2"}, "encoder.arch 'custom' is not one"),
        ({"mae__decoder__width": 18}, "mae.decoder.width 18 is not divisible by 4"),
    ):
        with pytest.raises(ConfigError) as caught:
            pretrain(pretrain_config(data, **changes), tmp_path / "out")
        assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_settings_of_the_other_objective_are_refused(data: Path) -> None:
    for load, changes, names in (
        (pretrain_config, {"objective": "simmim"}, "mae.epochs, mae.warmup_epochs, mae.decoder: "),
        (pretrain_config, {"simmim__lr": 1e-3}, "simmim.lr: "),
        (simmim_config, {"objective": "mae"}, "simmim.epochs, simmim.warmup_epochs, simmim.lr: "),
        (simmim_config, {"mae__mask_ratio": 0.5}, "mae.mask_ratio: "),
        (pretrain_config, {"preset": "quickstart", "objective": "simmim"}, "preset quickstart does not fit objective"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(data, **changes)
        assert str(caught.value).startswith(names)
    with pytest.raises(ConfigError, match=r"simmim\.warmup_epochs 4 exceeds simmim.epochs 3"):
        make_plan(simmim_config(data, preset="any", strict=True, simmim__warmup_epochs=4), Silent(), Checks())


def test_views_that_pretraining_does_not_make_are_refused(data: Path) -> None:
    made = pretrain_config(data, views__flip=0.0, views__aspect_ratio=[1.0, 1.0], views__color=True).views
    assert (made.flip, made.aspect_ratio) == (0.0, (1.0, 1.0))
    with pytest.raises(ConfigError, match=r"^views\.global_size, views\.blur: .* flip and aspect_ratio "):
        pretrain_config(data, views__global_size=30, views__blur=False)


def test_half_precision_weights_are_the_rounded_ones(whole: Path, config: PretrainConfig, tmp_path: Path) -> None:
    section = config.masking.model_copy(update={"save_dtype": "fp16"})
    half = config.model_copy(update={config.objective: section})
    pretrain(half, tmp_path / "half")
    expected = {name: tensor.half() for name, tensor in tensors(whole).items()}
    found = tensors(tmp_path / "half")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
