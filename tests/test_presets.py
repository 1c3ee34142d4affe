"""Every shipped preset loads; the paper's presets agree with the paper; ablations change only what they state."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mimref.config.base import CommandConfig
from mimref.config.load import load_config
from mimref.config.presets import preset_names, preset_text
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import ConfigError
from mimref.evaluation.assess.config import AssessConfig
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.evaluation.probe.config import LEARNING_RATES, ProbeConfig, ProbeTrainingConfig
from mimref.pretraining.config import PretrainConfig
from mimref.pretraining.run import build_model
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import Heads, head_blocks
from mimref.transfer.finetune.config import FinetuneConfig
from mimref.transfer.segment.config import SegmentConfig
from mimref.transfer.suite.config import SuiteConfig

MODELS: dict[str, type[CommandConfig]] = {
    "refine": RefineConfig,
    "pretrain": PretrainConfig,
    "probe": ProbeConfig,
    "analyze-blocks": BlocksConfig,
    "assess": AssessConfig,
    "finetune": FinetuneConfig,
    "transfer": SuiteConfig,
    "segment": SegmentConfig,
}


def flatten(config: CommandConfig) -> dict[str, Any]:
    """Return dotted key -> value."""

    def walk(table: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in table.items():
            flat |= walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flat

    return walk(config.model_dump(), "")


def load(name: str) -> CommandConfig:
    return load_config(MODELS[name.partition("/")[0]], name)


# What must hold for each preset by itself.
@pytest.mark.parametrize("name", preset_names())
class TestEveryPreset:
    def test_loads_under_its_own_name(self, name: str) -> None:
        assert load(name).preset == name

    def test_opens_with_its_command(self, name: str) -> None:
        head = preset_text(name).split("\n\n")[0]
        command, _, short = name.partition("/")
        assert all(line.startswith("#") for line in head.splitlines()), "the preset must open with a comment"
        option = "--suite" if command == "transfer" else "--preset"
        named = re.search(rf"mimref {command} (CKPT\.\.\. )?{option} {re.escape(short)}\b", head) is not None
        assert named or (short == "quickstart" and f"mimref {command}" in head)


# Table 10, transcribed: Parameter -> {preset: value}.
MAE_L, MAE_H, MAE_2B = "refine/mae_l16", "refine/mae_h14", "refine/mae_2b14"
D2V2_L, D2V2_H = "refine/d2v2_l16", "refine/d2v2_h14"
PAPER = (MAE_L, MAE_H, MAE_2B, D2V2_L, D2V2_H)
TABLE_10_SAME: dict[str, Any] = {
    "optimizer.betas": (0.9, 0.95),
    "encoder_stage.lr": 4e-4,
    "encoder_stage.layer_decay": 0.65,
    "encoder_stage.weight_decay": 0.05,
    "encoder_stage.ema": 0.9999,
    "encoder_stage.heads_weight_decay": 1e-5,
    "encoder_stage.top_k": 20,
    "loss.swap_negatives": False,
    "views.global_size": 224,
    "views.global_scale": (0.25, 1.0),
    "views.local_views": 10,
    "views.local_scale": (0.05, 0.25),
    "views.color": True,
    "views.blur": True,
    # Appendix B.3: stage 1 has the same settings except for these.
    "heads_stage.epochs": 20,
    "heads_stage.lr": 2e-4,
    "heads_stage.top_k": 1,
    "heads_stage.weight_decay": 1e-5,
    # Appendix B.2 and the released implementation.
    "heads.projector_hidden": 2048,
    "heads.predictor_hidden": 4096,
    "heads.output": 256,
    "heads.queue_size": 65536,
    "encoder.image_size": 224,
    # Section 5.1: all head losses are summed, and Eq. (1) is not changed.
    "loss.schedule": "constant",
    "loss.direction": "projection",
}
TABLE_10: dict[str, dict[str, Any]] = {
    "encoder_stage.epochs": {MAE_L: 30, MAE_H: 30, MAE_2B: 20, D2V2_L: 20, D2V2_H: 20},
    "batch_size": {MAE_L: 1024, MAE_H: 512, MAE_2B: 512, D2V2_L: 1024, D2V2_H: 512},
    "encoder_stage.freeze_blocks": {MAE_L: 0, MAE_H: 0, MAE_2B: 6, D2V2_L: 0, D2V2_H: 0},
    "heads.temperature": {MAE_L: 0.2, MAE_H: 0.3, MAE_2B: 0.35, D2V2_L: 0.2, D2V2_H: 0.3},
    "views.local_size": {MAE_L: 96, MAE_H: 98, MAE_2B: 98, D2V2_L: 96, D2V2_H: 98},
    # Appendix A.1: the last 8 blocks, 12 for ViT-H.
    "heads.blocks": {MAE_L: "last8", MAE_H: "last12", MAE_2B: "last8", D2V2_L: "last8", D2V2_H: "last12"},
    "encoder.arch": {MAE_L: "vit_l16", MAE_H: "vit_h14", MAE_2B: "vit_2b14", D2V2_L: "vit_l16", D2V2_H: "vit_h14"},
    "encoder.source": {MAE_L: "mae", MAE_H: "mae", MAE_2B: "mae", D2V2_L: "d2v2", D2V2_H: "d2v2"},
}


# The release's fine-tunings, transcribed: epochs, batch, base learning rate, weight decay, layer decay, drop path,
# frozen blocks, augmentation, shots.
FINE_TUNINGS: dict[str, tuple[Any, ...]] = {
    "imagenet_b16": (100, 1024, 5e-4, 0.05, 0.65, 0.1, 0, "full", None),
    "imagenet_l16": (50, 1024, 1e-3, 0.05, 0.75, 0.2, 0, "full", None),
    "imagenet_h14": (50, 1024, 1e-3, 0.05, 0.75, 0.3, 0, "full", None),
    "inat18_l16": (50, 1024, 1e-3, 0.05, 0.75, 0.2, 0, "full", None),
    "inat18_h14": (50, 1024, 1e-3, 0.05, 0.75, 0.3, 0, "full", None),
    "inat18_5shot": (50, 256, 1e-3, 0.05, 0.75, 0.0, 0, "min256", 5),
    "inat18_10shot": (50, 256, 1e-3, 0.05, 0.75, 0.0, 0, "min256", 10),
    "imagenet_1shot": (50, 250, 1e-4, 0.05, 0.75, 0.0, 0, "min", 1),
    "imagenet_2shot": (50, 250, 1e-4, 0.05, 0.75, 0.0, 0, "min", 2),
    "imagenet_5shot": (50, 250, 1e-4, 0.05, 0.75, 0.0, 0, "min", 5),
    "imagenet_1shot_d2v2_h14": (50, 125, 1e-4, 0.05, 0.75, 0.0, 0, "min", 1),
    "imagenet_1shot_mae_2b14": (50, 125, 1e-4, 0.05, 0.75, 0.0, 6, "min", 1),
    "imagenet_1shot_ibot22k_l16": (50, 250, 1e-3, 0.05, 0.75, 0.0, 0, "min", 1),
    "imagenet_1pct": (50, 512, 3e-5, 0.05, 0.75, 0.0, 0, "min", None),
    "imagenet_1pct_h14": (50, 512, 3e-5, 0.4, 0.75, 0.0, 0, "min", None),
    "imagenet_1pct_2b14": (50, 512, 3e-5, 0.4, 0.75, 0.0, 0, "min", None),
    "imagenet_1pct_d2v2_l16": (50, 512, 1e-3, 0.05, 0.75, 0.0, 0, "min", None),
    "imagenet_1pct_d2v2_h14": (50, 128, 1e-3, 0.05, 0.75, 0.0, 0, "min", None),
    "imagenet_10pct": (50, 512, 3e-5, 0.05, 0.75, 0.0, 0, "rand", None),
    "imagenet_10pct_h14": (50, 256, 1e-3, 0.05, 0.75, 0.2, 0, "full", None),
    "imagenet_10pct_2b14": (50, 256, 1e-3, 0.05, 0.75, 0.2, 6, "full", None),
    "imagenet_10pct_d2v2_l16": (50, 512, 1e-3, 0.05, 0.75, 0.1, 0, "full", None),
    "imagenet_10pct_d2v2_h14": (50, 256, 1e-3, 0.05, 0.75, 0.2, 0, "full", None),
    "vtab1k": (50, 64, 2e-3, 0.05, 0.75, 0.0, 0, "none", None),
}
RAND = "rand-m9-mstd0.5-inc1"
# resize, crop, flip, RandAugment, erasing, mixup, CutMix, label smoothing.
AUGMENTATIONS: dict[str, tuple[Any, ...]] = {
    "none": (None, (1.0, 1.0), 0.0, None, 0.0, 0.0, 0.0, 0.0),
    "min": (None, (0.08, 1.0), 0.5, None, 0.0, 0.0, 0.0, 0.1),
    "min256": (256, (0.08, 1.0), 0.5, None, 0.0, 0.0, 0.0, 0.1),
    "rand": (None, (0.08, 1.0), 0.5, RAND, 0.0, 0.0, 0.0, 0.1),
    "full": (None, (0.08, 1.0), 0.5, RAND, 0.25, 0.8, 1.0, 0.1),
}


def test_every_fine_tuning_is_transcribed() -> None:
    assert {f"finetune/{name}" for name in (*FINE_TUNINGS, "quickstart", "fashion_mnist")} == set(
        preset_names("finetune")
    )


@pytest.mark.parametrize("name", FINE_TUNINGS)
def test_fine_tunings_equal_the_release(name: str) -> None:
    config = load(f"finetune/{name}")
    assert isinstance(config, FinetuneConfig)
    each, augment = config.finetune, config.augment
    decays = (each.weight_decay, each.layer_decay, each.drop_path)
    expected = FINE_TUNINGS[name]
    found = (each.epochs, config.batch_size, each.lr, *decays, each.freeze_blocks, expected[-2], config.shots)
    assert found == expected and each.warmup_epochs == 5 and each.pool == "cls" and each.train_positions
    drawn = (augment.resize, augment.crop_scale, augment.flip, augment.rand_augment, augment.erase)
    assert (*drawn, augment.mixup, augment.cutmix, augment.smoothing) == AUGMENTATIONS[expected[-2]]
    assert config.optimizer.betas == (0.9, 0.999) and config.optimizer.end_lr == 0 and config.splits == 3
    # Some classes of iNat18 have only two images; the release's splits then contain both.
    assert config.all_if_fewer == (name.startswith("inat18") and config.shots is not None)


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_equal_table_10(name: str) -> None:
    expected = TABLE_10_SAME | {key: values[name] for key, values in TABLE_10.items()}
    actual = flatten(load(name))
    assert {key: actual[key] for key in expected} == expected


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_warm_up_for_4_epochs(name: str) -> None:
    config = load_config(RefineConfig, name)
    for stage in (config.heads_stage, config.encoder_stage):
        # Unset means min(4, epochs / 5).
        assert stage.warmup_epochs is None
        assert stage.epochs / 5 >= 4


# A preset, its base, and all that it may change.
CHANGES: list[tuple[str, str, dict[str, Any]]] = [
    ("refine/mae_b16", MAE_L, {"encoder.arch": "vit_b16", "heads.blocks": "last4"}),
    (
        "refine/d2v2_h14_nocolor",
        D2V2_H,
        {
            "views.color": False,
            "views.blur": False,
            "encoder_stage.epochs": 10,
            "encoder_stage.warmup_epochs": 4,
        },
    ),
    *(("refine/ablation/" + name, D2V2_L, changes) for name, changes in {
        "a_heads1": {"heads.blocks": "last1"},
        "a_heads2": {"heads.blocks": "last2"},
        "a_heads4": {"heads.blocks": "last4"},
        "a_heads12": {"heads.blocks": "last12"},
        "b_blocks_20_24": {"heads.blocks": "20,24"},
        "b_blocks_16_20_24": {"heads.blocks": "16,20,24"},
        "b_blocks_15_18_21_24": {"heads.blocks": "15,18,21,24"},
        "b_blocks_18_20_22_24": {"heads.blocks": "18,20,22,24"},
        "c_uniform_decay": {"loss.schedule": "uniform_decay"},
        "c_staggered_decay": {"loss.schedule": "staggered_decay"},
        "c_staggered_step": {"loss.schedule": "staggered_step"},
        "c_one_hot": {"loss.schedule": "one_hot"},
        "d_freeze6": {"encoder_stage.freeze_blocks": 6},
        "d_freeze12": {"encoder_stage.freeze_blocks": 12},
        "e_swap_negatives": {"loss.swap_negatives": True},
        "f_no_multicrop": {"views.local_views": 0, "views.global_scale": (0.08, 1.0)},
        "f_no_color_blur": {
            "views.color": False,
            "views.blur": False,
            "encoder_stage.epochs": 10,
            "encoder_stage.warmup_epochs": 4,
        },
    }.items()),
    # Table 6b, whose default row is D2V2_H itself.
    ("refine/ablation/b_h14_blocks_22_32_every_2", D2V2_H, {"heads.blocks": "22,24,26,28,30,32"}),
    ("refine/ablation/b_h14_blocks_16_32_every_2", D2V2_H, {"heads.blocks": "16,18,20,22,24,26,28,30,32"}),
    ("pretrain/mae_b16", "pretrain/mae_l16", {"encoder.arch": "vit_b16"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "base", "changes"), CHANGES, ids=[name for name, _, _ in CHANGES])
def test_changes_to_the_base_are_the_named_ones(name: str, base: str, changes: dict[str, Any]) -> None:
    before, after = flatten(load(base)), flatten(load(name))
    changed = {key: value for key, value in after.items() if value != before[key]}
    assert changed == changes | {"preset": name}


def test_every_ablation_preset_is_checked() -> None:
    checked = {name for name, _, _ in CHANGES}
    assert {name for name in preset_names("refine") if "/ablation/" in name} <= checked


def test_mae_recipe() -> None:
    flat = flatten(load("pretrain/mae_l16"))
    expected = {
        "batch_size": 4096,
        "mae.epochs": 800,
        "mae.warmup_epochs": 40.0,
        "mae.lr": 1.5e-4,
        "mae.weight_decay": 0.05,
        "mae.mask_ratio": 0.75,
        "mae.decoder.width": 512,
        "mae.decoder.depth": 8,
        "mae.decoder.num_heads": 16,
        "optimizer.betas": (0.9, 0.95),
    }
    assert {key: flat[key] for key in expected} == expected


def test_names_short_and_long() -> None:
    assert load_config(RefineConfig, "mae_l16") == load_config(RefineConfig, "refine/mae_l16")
    assert load_config(PretrainConfig, "mae_l16").preset == "pretrain/mae_l16"
    assert load_config(RefineConfig, "ablation/a_heads1").preset == "refine/ablation/a_heads1"
    assert preset_text("d2v2_h14") == preset_text("refine/d2v2_h14")


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^Unknown preset 'mae_l61'; did you mean 'mae_l16'\?$"):
        load_config(RefineConfig, "mae_l61")
    with pytest.raises(ConfigError, match=r"^Unknown preset 'xyz'; `mimref presets list` shows all$"):
        load_config(RefineConfig, "xyz")
    with pytest.raises(ConfigError, match=r"belongs to `mimref pretrain`, not to `mimref refine`"):
        load_config(RefineConfig, "pretrain/mae_l16")
    with pytest.raises(ConfigError, match=r"'mae_l16' is ambiguous: pretrain/mae_l16 or refine/mae_l16"):
        preset_text("mae_l16")
    with pytest.raises(ConfigError, match="Unknown preset"):
        preset_text("../pyproject")


def test_files_build_on_shipped_presets_and_on_each_other(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "lower.toml").write_text('base = "mae_h14"\nseed = 3\n[heads]\ntemperature = 0.5\n')
    upper = tmp_path / "sub" / "upper.toml"
    upper.write_text('base = "../lower.toml"\nbatch_size = 64\n')
    config = load_config(RefineConfig, str(upper))
    assert (config.batch_size, config.seed, config.heads.temperature) == (64, 3, 0.5)
    assert (config.heads.blocks, config.encoder.arch, config.preset) == ("last12", "vit_h14", str(upper))


def write_and_load(path: Path, text: str) -> None:
    path.write_text(text)
    load_config(RefineConfig, str(path))


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with pytest.raises(ConfigError, match=r"^Preset file '.*mine\.toml' cannot be read: No such file"):
        load_config(RefineConfig, str(path))
    with pytest.raises(ConfigError, match=r"^Preset file '.*mine\.toml' is not valid TOML: .*line 2"):
        write_and_load(path, "seed = 1\nbatch_size = = 3\n")
    with pytest.raises(
        ConfigError, match=r"mine\.toml: Unknown setting 'heads\.blcoks'; did you mean 'heads\.blocks'\?$"
    ):
        write_and_load(path, '[heads]\nblcoks = "last8"\n')
    with pytest.raises(ConfigError, match=r"^Unknown preset 'nothing'"):
        write_and_load(path, 'base = "nothing"\n')
    with pytest.raises(ConfigError, match=r"base = 3: expected the name of a preset$"):
        write_and_load(path, "base = 3\n")
    with pytest.raises(ConfigError, match=r"has itself as a base: mine -> mine$"):
        write_and_load(path, 'base = "mine.toml"\n')
    path.write_bytes(b"seed = \xff\n")
    with pytest.raises(ConfigError, match=r"is not valid TOML"):
        load_config(RefineConfig, str(path))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        load_config(RefineConfig, str(tmp_path / "folder.toml"))


@cache
def encoder_without_memory(architecture: Architecture) -> Encoder:
    with torch.device("meta"):
        return build_encoder(architecture)


@pytest.mark.parametrize("name", preset_names("refine"))
def test_refine_presets_build(name: str) -> None:
    config = load(name)
    assert isinstance(config, RefineConfig)
    if config.encoder.weights:
        # The weights' header describes the encoder; the pretrain preset of the same name made the weights.
        made_by = load("pretrain/" + Path(config.encoder.weights).name.removeprefix("pretrain-"))
        assert isinstance(made_by, PretrainConfig)
        architecture = Architecture.from_config(made_by.encoder)
    else:
        architecture = Architecture.from_config(config.encoder)
    blocks = head_blocks(config.heads.blocks, architecture.depth)
    encoder = encoder_without_memory(architecture)
    with torch.device("meta"):
        heads = Heads(config.heads, [encoder.embed_dim] * len(blocks))
        features = torch.empty(len(blocks), 6, encoder.embed_dim)
        projected, predicted = heads(features)
    assert projected.shape == predicted.shape == (len(blocks), 6, config.heads.output)
    assert config.encoder_stage.freeze_blocks < max(blocks)
    architecture.check_size(config.views.global_size or architecture.image_size, "views.global_size")
    if config.views.local_views:
        architecture.check_size(config.views.local_size, "views.local_size")


@pytest.mark.parametrize("name", preset_names("pretrain"))
def test_pretrain_presets_build(name: str) -> None:
    config = load(name)
    assert isinstance(config, PretrainConfig)
    encoder = encoder_without_memory(Architecture.from_config(config.encoder))
    with torch.device("meta"):
        model = build_model(encoder, config)
        size = encoder.architecture.image_size
        images, noise = torch.empty(2, 3, size, size), torch.empty(2, model.num_patches)
        loss = model(images, noise)
    assert loss.shape == ()
    assert sum(parameter.numel() for parameter in model.decoder.parameters()) < sum(
        parameter.numel() for parameter in encoder.parameters()
    )


def test_the_probe_presets_are_the_published_protocols() -> None:
    dinov2, release = load("probe/dinov2"), load("probe/release")
    assert isinstance(dinov2, ProbeConfig) and isinstance(release, ProbeConfig)
    assert dinov2.probe == ProbeTrainingConfig(batch_size=1024) and tuple(dinov2.probe.lr) == LEARNING_RATES
    assert release.probe == ProbeTrainingConfig(batch_size=1024, norm="batch")
    # Appendix C.8; the values are the released code's.
    reduced = load("probe/release_reduced")
    assert isinstance(reduced, ProbeConfig)
    assert reduced.probe == ProbeTrainingConfig(
        lr=[0.001, 0.002, 0.005, 0.01], blocks="last4", batch_size=256, norm="batch"
    )


def test_the_segmentation_presets_are_the_published_protocols() -> None:
    """As transcribed from the release's grid dinov2-semseg-reduced and from DINOv2's configuration."""
    paper, dinov2 = load("segment/ade20k_paper"), load("segment/ade20k_dinov2")
    assert isinstance(paper, SegmentConfig) and isinstance(dinov2, SegmentConfig)
    assert paper == load_config(SegmentConfig, overrides={"preset": "segment/ade20k_paper"})
    assert dinov2 == load_config(SegmentConfig, overrides={"preset": "segment/ade20k_dinov2", "protocol": "dinov2"})
    rates = [1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    training, crops = paper.training, paper.crops
    assert (training.optimizer, training.lr, training.weight_decay, training.affine) == ("sgd", rates, 0, False)
    assert (training.batch_size, training.epochs, training.updates) == (16, 50, None)
    assert (training.schedule, training.warmup, training.block_lr) == ("cosine", 0.1, 0.1)
    assert (crops.scale, crops.longest, crops.most_of_one_class, crops.flip) == ((0.5, 2), 2, 0.75, 0.5)
    assert (paper.test, crops.distort_color, paper.final_norm) == ("crop", False, False)
    training, crops = dinov2.training, dinov2.crops
    assert (training.optimizer, training.lr, training.weight_decay, training.affine) == ("adamw", [1e-3], 1e-4, True)
    assert (training.batch_size, training.updates, training.schedule) == (16, 40_000, "linear")
    assert (crops.scale, crops.longest, crops.most_of_one_class, crops.flip) == ((0.5, 2), 4, 0.75, 0.5)
    assert (dinov2.test, crops.distort_color, dinov2.final_norm) == ("slide", True, True)
