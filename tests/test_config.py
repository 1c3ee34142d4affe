"""Settings: what is accepted, and the one-line error for what is not."""

import types
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from mimref.config.base import CommandConfig, dump_config
from mimref.config.load import load_config
from mimref.config.presets import choose_finetune_preset, choose_pretrain_preset, choose_refine_preset
from mimref.errors import ConfigError, UserErrors
from mimref.evaluation.config import CompareConfig
from mimref.evaluation.knn.config import KnnConfig
from mimref.pretraining.config import PretrainConfig
from mimref.refinement.config import RefineConfig
from mimref.transfer.finetune.config import FinetuneConfig


def load(*sets: str, **overrides: Any) -> RefineConfig:
    return load_config(RefineConfig, None, {key.replace("__", "."): value for key, value in overrides.items()}, sets)


def test_defaults_are_valid() -> None:
    for model in (RefineConfig, PretrainConfig, KnnConfig):
        assert load_config(model) == model()


def test_overrides_then_sets() -> None:
    config = load("batch_size=32", "views.flip=0", batch_size=16, encoder_stage__epochs=3, heads__blocks=None)
    assert (config.batch_size, config.views.flip, config.encoder_stage.epochs) == (32, 0.0, 3)
    assert config.heads.blocks == "last8"


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("heads.temperature=0.3", 0.3),
        ("heads.temperature=[0.1, 0.2]", [0.1, 0.2]),
        ("heads.temperature = 1", 1.0),
        ("heads.blocks=20", "20"),
        ("heads.blocks='last4'", "last4"),
        ("views.color=false", False),
        ("encoder_stage.lr=3e-4", 3e-4),
        ("encoder_stage.warmup_epochs=2", 2.0),
        ("encoder_stage.warmup_epochs=none", None),
        ("encoder.weights=~/my weights.pth", "~/my weights.pth"),
        ("data.root=2024-01-01", "2024-01-01"),
        ("data.root=none", None),
        ("views.jitter=[0, 0, 0, 0]", (0.0, 0.0, 0.0, 0.0)),
        ("monitor.trackers=tensorboard, wandb", ["tensorboard", "wandb"]),
        ("monitor.trackers=['wandb']", ["wandb"]),
    ],
)
def test_set_reads_toml_values_and_bare_words(assignment: str, expected: object) -> None:
    value: Any = load(assignment)
    for part in assignment.partition("=")[0].strip().split("."):
        value = getattr(value, part)
    assert value == expected


def test_lists_need_no_brackets() -> None:
    config = load_config(CompareConfig, None, {"base": "1", "refined": ["a,b"], "shots": "1,2", "metrics": "acc, 1"})
    assert (config.base, config.refined, config.shots, config.metrics) == ("1", ["a,b"], [1, 2], ["acc", "1"])
    assert load_config(KnnConfig, None, {"tau": "0.1,1"}, ["k=5"]).model_dump(include={"k", "tau"}) == {
        "k": [5],
        "tau": [0.1, 1.0],
    }
    assert load("views.global_scale=0.5,1").views.global_scale == (0.5, 1.0)
    assert load("heads.temperature=0.1, 0.2").heads.temperature == [0.1, 0.2]
    assert load("heads.temperature=0.1").heads.temperature == 0.1


def test_set_of_a_table_keeps_the_rest_of_it() -> None:
    config = load("heads={output = 3}", heads__queue_size=77)
    assert (config.heads.output, config.heads.queue_size) == (3, 77)


WRONG = {
    "heads.temprature=0.1": ("'heads.temprature'", "'heads.temperature'"),
    "temperature=0.1": ("'temperature'", "'heads.temperature'"),
    "zzz=1": ("'zzz'",),
    "seed.x=1": ("'seed.x'", "'seed'"),
    "seed": ("'seed'", "KEY=VALUE"),
    "=3": ("'=3'", "KEY=VALUE"),
    "seed=1.5": ("seed = 1.5", "whole number"),
    "seed=-1": ("seed = -1", "at least 0"),
    "seed=01": ('seed = "01"', "whole number"),
    "seed=1\nbatch_size=3": ('seed = "1\\nbatch_size=3"', "whole number"),
    "batch_size=1": ("batch_size = 1", "greater than 1"),
    "views.color=yes": ('views.color = "yes"', "true or false"),
    "heads=3": ("heads = 3", "table"),
    "heads.temperature=hot": ('heads.temperature = "hot"', "number or a list"),
    "heads.temperature=[0.1, -1]": ("heads.temperature = [0.1, -1]", "greater than 0"),
    "heads.temperature=[]": ("heads.temperature = []", "at least 1"),
    "heads.blocks=0-3": ('heads.blocks = "0-3"', "17-24", "20,22,24", "last8", "auto"),
    "heads.pool=clss": ('heads.pool = "clss"', "'cls'", "'mean'"),
    "device=gpu": ('device = "gpu"', "'auto'", "'cpu'", "'cuda'", "'mps'"),
    "views.global_scale=3": ("views.global_scale = 3", "list"),
    "views.global_scale=[0.5]": ("views.global_scale = [0.5]", "list"),
    "views.global_scale=[0.1, 0.2, 0.3]": ("views.global_scale = [0.1, 0.2, 0.3]", "list of 2"),
    "views.global_scale=[0.0, 0.5]": ("views.global_scale = [0.0, 0.5]", "greater than 0"),
    "views.local_scale=[0.1, 7]": ("views.local_scale = [0.1, 7]", "at most 1"),
    "views.local_scale=[0.5, 0.1]": ("views.local_scale = [0.5, 0.1]", "range"),
    "views.jitter=[0.4, 0.4, 0.4, 0.7]": ("views.jitter = [0.4, 0.4, 0.4, 0.7]", "at most 0.5"),
    "optimizer.betas=[0.9, 1.0]": ("optimizer.betas = [0.9, 1.0]", "less than 1"),
    "encoder_stage.lr=nan": ("encoder_stage.lr = NaN", "finite"),
    "encoder_stage.lr=inf": ("encoder_stage.lr = Infinity", "finite"),
    "encoder_stage.warmup_epochs=31": ("encoder_stage.warmup_epochs 31", "encoder_stage.epochs 30"),
    "heads_stage.top_k=70000": ("heads_stage.top_k 70000", "heads.queue_size", "65536"),
    "encoder.arch=custom": (
        "encoder.arch = 'custom'",
        "encoder.width, encoder.depth, encoder.num_heads, encoder.patch_size",
    ),
    "encoder={arch = 'custom', width = 10, depth = 1, num_heads = 3, patch_size = 2}": (
        "encoder.width 10",
        "encoder.num_heads 3",
    ),
    "stage=encoder": ("stage = 'encoder'", "heads_from", "--heads-from"),
    "heads_from=runs/a": ("heads_from", "stage = 'both'", "stage = 'encoder'"),
}


@pytest.mark.parametrize("assignment", WRONG)
def test_mistakes_are_one_line_that_names_them(assignment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(assignment)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in WRONG[assignment] if part not in message] == []


def test_mae_decoder_width_must_fit_its_heads() -> None:
    with pytest.raises(ConfigError, match=r"mae\.decoder\.width 20 must be a multiple of num_heads 16"):
        load_config(PretrainConfig, None, {"mae.decoder.width": 20})


def test_dumped_config_reads_back_equal(tmp_path: Any) -> None:
    config = load(
        "heads.temperature=[0.1, 0.2]",
        "optimizer.clip_grad=3",
        'data.spec="a \\"b\\" \\\\ ü"',
        "encoder_stage.lr=1e-300",
    )
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(RefineConfig, str(path)) == config.model_copy(update={"preset": str(path)})


def test_mistakes_in_a_file_name_it(tmp_path: Any) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = true\nlr = 1\n[heads]\nqueue_size = 5\ntemperature = 0.2\n")
    with pytest.raises(UserErrors) as raised:
        load_config(RefineConfig, str(path), {"heads.temperature": -1.0}, ["heads.queue_size=x"])
    found = [str(error) for error in raised.value.errors]
    assert len(found) == 4 and all(line.startswith(f"{path}: ") == ("heads." not in line) for line in found), found


def test_dumped_config_keeps_the_name_of_its_preset(tmp_path: Any) -> None:
    config = load_config(RefineConfig, "d2v2_l16")
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(RefineConfig, str(path)) == config


def test_a_dumped_config_unsets_what_is_set_by_default(tmp_path: Any) -> None:
    config = load_config(FinetuneConfig, None, {"augment.rand_augment": "none", "augment.flip": 0.25})
    assert config.augment.rand_augment is None
    path = tmp_path / "config.toml"
    for text in (dump_config(config), dump_config(config, defaults=False)):
        path.write_text(text, encoding="utf-8")
        assert load_config(FinetuneConfig, str(path)) == config.model_copy(update={"preset": str(path)})
    assert text == '[augment]\nflip = 0.25\nrand_augment = "none"\n'


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    kinds = [field.annotation for field in model.model_fields.values()]
    nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [model, *(inner for section in nested for inner in sections(section))]


@pytest.mark.parametrize("model", [RefineConfig, PretrainConfig, KnnConfig])
def test_settings_that_may_be_unset_are_unset_by_default(model: type[CommandConfig]) -> None:
    # A dumped file then need not name settings that are unset.
    for section in sections(model):
        for name, field in section.model_fields.items():
            if types.NoneType in get_args(field.annotation):
                assert field.default is None, name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None, None), "refine/quickstart"),
        ((None, None, None, "quickstart", "digits"), "refine/quickstart"),
        (("mine.toml", "vit_l16", None, "x.pth"), "mine.toml"),
        ((None, "vit_l16", None, "x.pth"), "refine/mae_l16"),
        ((None, "vit_h14", "d2v2", "x.pth"), "refine/d2v2_h14"),
        ((None, "vit_h14", "ijepa", "x.pth"), "refine/mae_h14"),
        ((None, "vit_b16", "ibot", None), "refine/mae_b16"),
        # The paper's presets are for its sizes only.
        ((None, "vit_small_patch16_224", "timm", None), None),
        ((None, "convnext_tiny", None, "x.pth", "images"), None),
        # The digits preset is for digits only.
        ((None, None, None, "quickstart", "images"), None),
        ((None, None, None, None, "images"), None),
        ((None, None, None, "x.pth"), None),
        ((None, None, "d2v2", "x.pth", "digits"), None),
        (("recipe", "vit_l16", None, None, "digits"), None),
    ],
)
def test_choose_refine_preset(given: tuple[str | None, ...], expected: str | None) -> None:
    assert choose_refine_preset(*given) == expected


def test_a_source_alone_does_not_name_an_encoder() -> None:
    with pytest.raises(ConfigError, match="--weights FILE or --preset NAME"):
        choose_refine_preset(None, None, "mae", None)


def test_choose_pretrain_preset() -> None:
    assert choose_pretrain_preset(None, None) == "pretrain/quickstart"
    assert choose_pretrain_preset("mine", "vit_b16") == "mine"
    assert choose_pretrain_preset(None, "vit_b16") == "pretrain/mae_b16"
    assert choose_pretrain_preset(None, "vit_h14") == "pretrain/mae_l16"
    assert choose_pretrain_preset(None, None, "digits") == "pretrain/quickstart"
    assert choose_pretrain_preset(None, None, "images") is None
    assert choose_pretrain_preset("recipe", "vit_b16", "digits") is None
    assert choose_pretrain_preset(None, "vit_b16", "digits", "mae") == "pretrain/mae_b16"
    assert choose_pretrain_preset(None, "vit_b16", "digits", "simmim") is None
    assert choose_pretrain_preset("mine", None, "digits", "simmim") == "mine"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None), "finetune/quickstart"),
        ((None, None, "quickstart", "digits"), "finetune/quickstart"),
        ((None, None, "quickstart", "images"), None),
        ((None, None, None, "images"), None),
        ((None, None, "x.pth"), None),
        ((None, "vit_l16", None), None),
        (("imagenet_l16", None, "x.pth", "images"), "imagenet_l16"),
        (("recipe", None, None, "digits"), None),
    ],
)
def test_choose_finetune_preset(given: tuple[str | None, ...], expected: str | None) -> None:
    assert choose_finetune_preset(*given) == expected
