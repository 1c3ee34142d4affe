"""The rules by which settings fit encoder and images: their values, and their effect on a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimref.config.load import load_config
from mimref.config.recipe import Derived
from mimref.data.pixels import Decoding
from mimref.data.sources import ArraySource
from mimref.devices import multiplies_bf16
from mimref.encoders.vit import Architecture
from mimref.errors import ConfigError, Interrupted, UserErrors
from mimref.progress import Listener
from mimref.refinement import recipe
from mimref.refinement.config import RefineConfig
from mimref.refinement.plan import make_plan
from mimref.refinement.recipe import fit
from mimref.refinement.run import refine
from tests.tiny import Killed, assert_same_run, header, kill_at, results, signal_at, write_weights

VIT_L = Architecture("vit_l16", 224, width=1024, depth=24, num_heads=16, patch_size=16)
TINY = Architecture("custom", 28, width=96, depth=8, num_heads=3, patch_size=4)


def source(images: int, *, side: int = 500, gray: bool = False, labels: bool = False) -> ArraySource:
    """Return images that take no memory."""
    pixel = np.array([9, 9, 9] if gray else [200, 9, 9], dtype=np.uint8)[None, :, None, None]
    pixels = np.broadcast_to(pixel, (images, 3, side, side))
    return ArraySource("images", pixels, np.arange(images) % 2 if labels else None, None, "train", np.arange(images))


def fitted(images: ArraySource, architecture: Architecture = TINY, **settings: Any) -> RefineConfig:
    overrides = {"device": "cpu", **{key.replace("__", "."): value for key, value in settings.items()}}
    return fit(load_config(RefineConfig, None, overrides), architecture, images)[0]


@pytest.mark.parametrize(
    ("images", "batch", "queue", "epochs", "ema", "top_k"),
    [
        (2, 2, 4, (40, 100), 0.95, 1),
        (17, 8, 8, (40, 100), 0.98, 1),
        (900, 128, 256, (33, 86), 0.99, 5),
        (7_000, 128, 2048, (5, 12), 0.99, 5),
        (10_000, 128, 4096, (3, 8), 0.99, 5),
        (100_000, 256, 32_768, (7, 15), 0.999, 14),
        (1_300_000, 1024, 65_536, (20, 30), 0.9999, 20),
    ],
)
def test_numbers_grow_with_the_images(
    images: int, batch: int, queue: int, epochs: tuple[int, int], ema: float, top_k: int
) -> None:
    config = fitted(source(images))
    assert (config.batch_size, config.heads.queue_size) == (batch, queue)
    assert (config.heads_stage.epochs, config.encoder_stage.epochs) == epochs
    assert (config.encoder_stage.ema, config.encoder_stage.top_k) == (ema, top_k)
    assert queue >= top_k + 3 and (queue <= images // 2 or queue == 4)
    # No rule may leave the ranges of the settings, or contradict another.
    load_config(RefineConfig, None, {"heads": config.heads.model_dump(), "batch_size": batch})


@pytest.mark.parametrize(
    ("has_instructions", "given", "expected"), [(True, "auto", "bf16"), (False, "auto", "auto"), (True, "fp32", "fp32")]
)
def test_bfloat16_where_the_cpu_has_instructions_for_it(
    has_instructions: bool, given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: has_instructions)
    settings = {} if given == "auto" else {"precision": given}
    assert fitted(source(900), **settings).precision == expected
    assert not multiplies_bf16(torch.device("cuda"))


def test_imagenet_and_vit_l_have_the_papers_settings() -> None:
    """Whatever differs from the preset is a default that the preset leaves out, or does not change the training."""
    ours = fitted(source(1_281_167), VIT_L)
    paper = load_config(RefineConfig, "mae_l16", {"device": "cpu"})
    for section in ("views", "optimizer", "loss"):
        assert getattr(ours, section) == getattr(paper, section).model_copy(
            update={"global_size": None} if section == "views" else {}
        )
    assert ours.heads == paper.heads.model_copy(update={"blocks": "17-24"})
    assert ours.heads_stage == paper.heads_stage.model_copy(update={"warmup_epochs": 4.0})
    assert ours.encoder_stage == paper.encoder_stage.model_copy(update={"warmup_epochs": 4.0})
    assert (ours.batch_size, ours.evaluate, ours.monitor) == (1024, paper.evaluate, paper.monitor)


def test_fashion_mnist_has_all_but_the_presets_settings() -> None:
    ours = fitted(source(10_000, side=28, gray=True), data__spec="fashion-mnist")
    preset = load_config(RefineConfig, "fashion_mnist", {"device": "cpu"})
    assert ours.views == preset.views.model_copy(update={"flip": 0.5})
    assert ours.heads == preset.heads.model_copy(update={"blocks": "5-8", "queue_size": 4096})
    assert ours.encoder_stage == preset.encoder_stage.model_copy(update={"warmup_epochs": 1.6})
    assert ours.heads_stage == preset.heads_stage.model_copy(update={"warmup_epochs": 0.6, "lr": 2.26e-3})
    assert ours.evaluate == preset.evaluate and ours.data.crop_fraction == 1.0


def test_rates_grow_with_the_square_root_of_the_batch_and_fall_with_the_width() -> None:
    assert [recipe.encoder_rate(width, 1024) * 4 for width in (2560, 1024, 512, 96)] == [1.6e-3, 1.6e-3, 3.2e-3, 4e-3]
    assert recipe.encoder_rate(1024, 256) == pytest.approx(8e-4)
    assert recipe.heads_rate(2048, 1024) == 2e-4 and recipe.heads_rate(4096, 1024) == 2e-4
    assert recipe.heads_rate(1024, 256) == pytest.approx(8e-4)


@pytest.mark.parametrize(
    ("updates", "window"), [(1, 1), (8, 2), (40, 10), (456, 100), (37_530, 10_000), (10**7, 10_000)]
)
def test_the_average_spans_a_share_of_the_run(updates: int, window: int) -> None:
    assert recipe.average_decay(updates) == pytest.approx(1 - 1 / window)


@pytest.mark.parametrize(
    ("width", "heads"), [(32, (256, 512, 128)), (192, (1024, 2048, 128)), (768, (2048, 4096, 256))]
)
def test_heads_are_as_wide_as_the_encoder_allows(width: int, heads: tuple[int, int, int]) -> None:
    assert recipe.head_widths(width) == heads


@pytest.mark.parametrize("patch", [4, 7, 8, 14, 16])
@pytest.mark.parametrize("patches", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("small", [True, False])
def test_local_views_are_whole_patches(patch: int, patches: int, small: bool) -> None:
    size = recipe.local_size(patch * patches, patch, small)
    assert size % patch == 0 and patch <= size <= patch * patches


def test_views_of_the_papers_sizes() -> None:
    assert [recipe.local_size(*sizes) for sizes in ((224, 16, False), (224, 14, False))] == [96, 98]
    assert [recipe.local_size(*sizes) for sizes in ((28, 4, True), (16, 4, True))] == [16, 12]


def test_small_images_in_a_large_encoder_have_small_images_views() -> None:
    views = fitted(source(900, side=32), VIT_L).views
    assert (views.global_scale, views.local_scale, views.local_views) == ((0.5, 1.0), (0.3, 0.7), 4)
    assert (views.local_size, views.blur, views.color) == (128, False, True)
    large = fitted(source(900), VIT_L).views
    assert (large.global_scale, large.local_size, large.blur) == ((0.25, 1.0), 96, True)
    between = fitted(source(900), Architecture("custom", 112, width=96, depth=8, num_heads=3, patch_size=16)).views
    assert (between.blur_sigma, between.local_size) == ((0.1, 1.0), 48)


def test_gray_images_have_no_colours_to_change() -> None:
    views = fitted(source(900, gray=True), VIT_L).views
    assert (views.color, views.jitter, views.gray_probability) == (True, (0.4, 0.4, 0.0, 0.0), 0.0)
    assert views.solarize_probability == (0.0, 0.0, 0.0)
    assert fitted(source(900), VIT_L).views.jitter == (0.4, 0.4, 0.2, 0.1)
    gray_encoder = Architecture("custom", 224, width=96, depth=8, num_heads=3, patch_size=16, channels=1)
    assert fitted(source(900), gray_encoder).views.gray_probability == 0.0


@pytest.mark.parametrize(
    ("spec", "flip"),
    [
        ("digits", 0.0),
        ("torchvision:MNIST", 0.0),
        ("vtab:svhn", 0.0),
        ("fashion-mnist", 0.5),
        ("torchvision:FashionMNIST", 0.5),
        ("/data/digits", 0.5),
    ],
)
def test_characters_are_not_mirrored(spec: str, flip: float) -> None:
    assert fitted(source(900), data__spec=spec).views.flip == flip


def test_rules_follow_what_the_user_sets() -> None:
    config = fitted(source(7_000), batch_size=512, encoder_stage__epochs=4, heads__queue_size=128)
    assert (config.batch_size, config.heads.queue_size, config.encoder_stage.epochs) == (512, 128, 4)
    # 13 updates per epoch: 225 need 18 epochs, 4 epochs are 52; 5 neighbours of 128 rows; 0.2 from batches of 512 on.
    assert (config.heads_stage.epochs, config.encoder_stage.ema, config.encoder_stage.top_k) == (18, 0.9, 5)
    assert (config.heads.temperature, config.encoder_stage.warmup_epochs) == (0.2, 0.8)


def test_a_single_image_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "images", 1)
    with pytest.raises(ConfigError, match="only 1 training image"):
        make_plan(bare(tmp_path, write_weights(tmp_path / "weights.safetensors")))


# --- plans and runs


def write(folder: Path, count: int, classes: int = 0, split: str = "") -> Path:
    """Write colour images of mixed sizes, in class folders if there are classes."""
    rng = np.random.default_rng(count)
    for number in range(count):
        place = folder / split / (f"class{number % classes}" if classes else "")
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.normal(50 + 60 * (number % max(1, classes)), 40, (*rng.integers(20, 60, 2), 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number}.png")
    return folder


def test_a_preset_for_colour_is_adapted_to_other_channels() -> None:
    images = source(2000)
    images.decoding = Decoding(channels=4)
    images.images = np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (2000, 4, 500, 500))
    preset = load_config(RefineConfig, "mae_l16", {"device": "cpu"})
    config, derived = fit(preset, replace(VIT_L, channels=4), images)
    assert config.views.jitter == (*preset.views.jitter[:2], 0, 0) and config.views.gray_probability == 0
    assert config.views.solarize_probability == (0, 0, 0)
    changed = {each.setting: str(each) for each in derived if each.setting.startswith("views.")}
    assert changed.keys() == {"views.jitter", "views.gray_probability", "views.solarize_probability"}
    assert all("4 channels" in line for line in changed.values())
    free = fitted(images, replace(TINY, channels=4))
    assert free.views.jitter == (0.4, 0.4, 0, 0) and free.views.gray_probability == 0


def bare(folder: Path, weights: Path, preset: str | None = None, **settings: Any) -> RefineConfig:
    named = {"encoder.weights": str(weights), "data.spec": str(folder / "images"), "device": "cpu", "workers": 0}
    return load_config(RefineConfig, preset, named | {key.replace("__", "."): value for key, value in settings.items()})


class Heard(Listener):
    """Remembers all notes and warnings."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)

    warn = note


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("recipe") / "weights.safetensors")


SHORT = {"heads_stage__epochs": 2, "encoder_stage__epochs": 3, "evaluate__cluster_runs": 2}


@pytest.mark.parametrize("split", ["labelled", "one class", "no validation images", "no labels"])
def test_17_images_are_refined(split: str, weights: Path, tmp_path: Path) -> None:
    classes = {"labelled": 3, "one class": 1, "no validation images": 3, "no labels": 0}[split]
    if split in ("labelled", "one class"):
        write(tmp_path / "images", 17, classes, "train")
        write(tmp_path / "images", 3, classes, "val")
    else:
        write(tmp_path / "images", 17, classes)
    heard = Heard()
    result = refine(bare(tmp_path, weights, **SHORT), tmp_path / "out", listener=heard)
    assert (tmp_path / "out" / "encoder.safetensors").is_file()
    metrics = {row["metric"] for row in result.rows}
    if split == "labelled":
        # There cannot be as many clusters as images.
        assert metrics == {"knn_top1", "lowshot_top1"}
        assert sum("no k-means in the before/after table" in line for line in heard.lines) == 1
        assert any(line.startswith("heads.blocks") and "k-NN accuracy" in line for line in heard.lines)
    else:
        assert "neighbour_consistency" in metrics and not metrics & {"knn_top1", "lowshot_top1", "cluster_acc"}
        assert sum(line.startswith("measures without labels in place of k-NN") for line in heard.lines) == 1
    assert any(line.startswith("batch_size 8: ") for line in heard.lines)


def test_config_toml_repeats_the_run_bit_for_bit(weights: Path, tmp_path: Path) -> None:
    write(tmp_path / "images", 17)
    first, again, resumed = tmp_path / "first", tmp_path / "again", Heard()
    refine(bare(tmp_path, weights, **SHORT), first)
    config = load_config(RefineConfig, str(first / "config.toml"))
    refine(config, again, listener=resumed)
    assert_same_run(first, again)
    batch = next(each for each in results(first)["derived"] if each["setting"] == "batch_size")
    assert batch["value"] == 8 and "17 images" in batch["rule"]
    assert "derived" not in results(again)
    assert results(first)["config"] | {"preset": None} == results(again)["config"] | {"preset": None}
    assert not any(line.startswith("batch_size") for line in resumed.lines)


@pytest.mark.parametrize("end", ["saved", "killed before the first state"])
@pytest.mark.parametrize("preset", [None, "quickstart"])
def test_a_resumed_run_has_the_preset_and_the_derived_settings_of_its_start(
    preset: str | None, end: str, weights: Path, tmp_path: Path
) -> None:
    write(tmp_path / "images", 17)
    config, out = bare(tmp_path, weights, preset, **SHORT, encoder_stage__warmup_epochs=1), tmp_path / "out"
    how, watcher = (Interrupted, signal_at(1)) if end == "saved" else (Killed, kill_at("step", 1))
    with pytest.raises(how):
        refine(config, out, listener=watcher)
    assert bool(list((out / "state").glob("step*.pt"))) == (end == "saved")
    refine(load_config(RefineConfig, str(out / "config.toml")), out, resume=True)
    refine(config, tmp_path / "whole")
    found, expected = results(out), results(tmp_path / "whole")
    assert found["derived"] == expected["derived"] and found["config"] == expected["config"]
    assert header(out)["preset"] == header(tmp_path / "whole")["preset"] == config.preset
    assert_same_run(out, tmp_path / "whole")


def test_a_preset_that_cannot_fit_is_adapted(weights: Path, tmp_path: Path) -> None:
    write(tmp_path / "images", 17)
    plan = make_plan(bare(tmp_path, weights, "mae_2b14", views__local_size=16, encoder__arch="custom", **CUSTOM))
    assert [each.setting for each in plan.derived] == [
        "batch_size",
        "heads.queue_size",
        "encoder_stage.top_k",
        "heads.blocks",
        "encoder_stage.freeze_blocks",
    ]
    assert str(plan.derived[1]) == "heads.queue_size 65536 -> 8: there are 17 training images"
    assert plan.config.heads.queue_size == 8 and plan.blocks == [3, 4]


CUSTOM: dict[str, Any] = {
    "encoder__width": 32,
    "encoder__depth": 4,
    "encoder__num_heads": 2,
    "encoder__patch_size": 8,
    "encoder__image_size": 16,
    "views__global_size": 16,
}


def test_strict_refuses_what_would_be_adapted(weights: Path, tmp_path: Path) -> None:
    write(tmp_path / "images", 17)
    with pytest.raises(UserErrors) as caught:
        make_plan(bare(tmp_path, weights, "mae_l16", strict="true"))
    message = str(caught.value)
    for part in ("batch_size 1024", "heads.queue_size 65536", "'last8'", "heads.queue_size=17"):
        assert part in message


def test_what_the_user_gives_is_refused_and_never_changed(weights: Path, tmp_path: Path) -> None:
    write(tmp_path / "images", 17)
    for preset in ("mae_l16", None):
        with pytest.raises(ConfigError, match=r"heads\.queue_size 300 .* set heads\.queue_size=17 or less"):
            make_plan(bare(tmp_path, weights, preset, heads__queue_size=300))
    with pytest.raises(ConfigError, match=r"encoder_stage\.top_k 20 exceeds heads\.queue_size 8"):
        make_plan(bare(tmp_path, weights, encoder_stage__top_k=20))


def test_a_presets_limit_beyond_the_images_is_dropped(weights: Path, tmp_path: Path) -> None:
    write(tmp_path / "images", 17)
    plan = make_plan(bare(tmp_path, weights, "fashion_mnist"))
    assert plan.derived[0] == Derived("data.train_limit", None, "there are 17 training images", 10_000)
    assert str(plan.derived[0]) == "data.train_limit 10000 -> none: there are 17 training images"
    assert len(plan.source) == 17 and plan.config.data.train_limit is None
    with pytest.raises(ConfigError, match=r"data\.train_limit is 18, but there are 17"):
        make_plan(bare(tmp_path, weights, "fashion_mnist", data__train_limit=18))


def test_heads_of_another_run_bring_their_settings(weights: Path, tmp_path: Path) -> None:
    write(tmp_path / "images", 17)
    first = bare(tmp_path, weights, **SHORT, heads__blocks="2,4", heads__output=16, heads__queue_size=16, stage="heads")
    refine(first, tmp_path / "heads")
    shared = {"stage": "encoder", "heads_from": str(tmp_path / "heads"), "encoder_stage__epochs": 1}
    plan = make_plan(bare(tmp_path, weights, **shared))
    assert (plan.blocks, plan.config.heads.output, plan.config.heads.queue_size) == ([2, 4], 16, 16)
    refine(bare(tmp_path, weights, **shared), tmp_path / "out")
