"""Classifiers: their outputs, stochastic depth against a plain loop, and files, both our own and public ones."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.drop import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mimref.config.run import EncoderConfig
from mimref.draws import Operation, uniform
from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.classifier import (
    Classifier,
    StochasticDepth,
    read_classifier,
    save_classifier,
    set_stochastic_depth,
)
from mimref.encoders.export import timm_name
from mimref.encoders.export_classifier import export_classifier
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import CheckpointError, ConfigError

TINY = Architecture("custom", 16, width=32, depth=4, num_heads=2, patch_size=8)
# Like CrossMAE (no final norm), data2vec 2.0 (post-norm), I-JEPA (no CLS token), timm with registers and LayerScale.
ARCHITECTURES = {
    "plain": TINY,
    "no final norm": replace(TINY, final_norm=False),
    "post-norm": replace(TINY, post_norm=True),
    "no CLS token": replace(TINY, class_token=False),
    "gray": replace(TINY, channels=1),
    **{name: Architecture.from_config(EncoderConfig(arch=name, image_size=32)) for name in ("test_vit2", "test_vit3")},
    "registers": Architecture.from_config(EncoderConfig(arch="vit_wee_patch16_reg1_gap_256", image_size=32)),
}


def random_encoder(architecture: Architecture, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    encoder = build_encoder(architecture)
    for parameter in encoder.parameters():
        parameter.data.normal_(std=0.2)
    return encoder


def random_classifier(architecture: Architecture, classes: int = 7, pool: Any = "cls") -> Classifier:
    classifier = Classifier(random_encoder(architecture), classes, pool)
    for parameter in [*classifier.head.parameters(), *classifier.fc_norm.parameters()]:
        parameter.data.normal_()
    return classifier


def images_of(architecture: Architecture, count: int = 3) -> Tensor:
    size = architecture.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_of_the_normed_pooled_tokens(name: str, pool: str) -> None:
    architecture = ARCHITECTURES[name]
    classifier = random_classifier(architecture, pool=pool).eval()
    encoder, vit = classifier.encoder, classifier.encoder.vit
    tokens = encoder.blocks(images_of(architecture), [encoder.depth])[0]
    has_norm = isinstance(vit.norm, nn.LayerNorm)
    assert classifier.final_norm == (pool == "cls" and has_norm)
    if pool == "cls" and has_norm:
        tokens = F.layer_norm(tokens, tokens.shape[2:], vit.norm.weight, vit.norm.bias, vit.norm.eps)
    if pool == "cls" and encoder.has_cls_token:
        pooled = tokens[:, 0]
    else:
        pooled = sum(tokens[:, place] for place in range(encoder.num_prefix_tokens, tokens.shape[1]))
        pooled = pooled / (tokens.shape[1] - encoder.num_prefix_tokens)
    if not classifier.final_norm:
        assert isinstance(classifier.fc_norm, nn.LayerNorm)
        pooled = F.layer_norm(pooled, pooled.shape[1:], classifier.fc_norm.weight, classifier.fc_norm.bias, 1e-6)
    expected = pooled @ classifier.head.weight.T + classifier.head.bias
    torch.testing.assert_close(classifier(images_of(architecture)), expected)


def test_the_head_starts_small() -> None:
    torch.manual_seed(0)
    classifier = Classifier(build_encoder(replace(TINY, width=512)), 1000)
    assert float(classifier.head.weight.detach().std()) == pytest.approx(2e-5, rel=0.01)
    assert not classifier.head.bias.any()
    norm = Classifier(build_encoder(TINY), 3, "mean").fc_norm
    assert isinstance(norm, nn.LayerNorm) and bool((norm.weight == 1).all()) and not norm.bias.any()


# --- stochastic depth


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_rates_rise_as_timms(depth: int) -> None:
    encoder = build_encoder(replace(TINY, depth=depth))
    found = set_stochastic_depth(encoder, 0.3)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": depth, "num_heads": 2}
    modules = VisionTransformer(**sizes, drop_path_rate=0.3).modules()
    timms = [part.drop_prob for part in modules if isinstance(part, DropPath)]
    assert [part.rate for part in found] == pytest.approx(timms)
    assert [part for part in encoder.modules() if isinstance(part, StochasticDepth)] == found


@pytest.mark.parametrize("name", ["test_vit3", "post-norm", "registers"])
def test_both_branches_of_every_kind_of_block_drop(name: str) -> None:
    encoder = build_encoder(ARCHITECTURES[name])
    assert len(set_stochastic_depth(encoder, 0.5)) == 2 * (encoder.depth - 1)
    assert set_stochastic_depth(build_encoder(TINY), 0.0) == []


def test_parallel_blocks_drop() -> None:
    architecture = Architecture.from_config(EncoderConfig(arch="vit_small_patch16_18x2_224", image_size=32))
    with torch.device("meta"):
        encoder = build_encoder(architecture)
    # Two attentions and two MLPs, each in a branch of its own.
    assert len(set_stochastic_depth(encoder, 0.1)) == 4 * (encoder.depth - 1)


@pytest.mark.parametrize("post_norm", [False, True])
def test_blocks_against_a_plain_loop(post_norm: bool) -> None:
    """In float64, sample by sample and branch by branch, with the random numbers that decide what is dropped."""
    encoder = random_encoder(replace(TINY, post_norm=post_norm)).double().train()
    depths = set_stochastic_depth(encoder, 0.6)
    images, samples = images_of(TINY, 6).double(), torch.tensor([5, 9, 2, 77, 3, 4])
    numbers_BP = uniform(1, 3, Operation.DROP_PATH, samples, count=len(depths))
    for depth, numbers in zip(depths, numbers_BP.T, strict=True):
        depth.uniform_B = numbers
    found = encoder.blocks(images, [4])[0]
    kept = 0
    for row in range(6):
        x = encoder.embed(images[row : row + 1])
        for number, block in enumerate(encoder.vit.blocks):
            rate = 0.6 * number / 3
            for branch, (norm, body) in enumerate([(block.norm1, block.attn), (block.norm2, block.mlp)]):
                keep = number == 0 or float(numbers_BP[row, 2 * (number - 1) + branch]) >= rate
                kept += keep
                change = body(x if post_norm else norm(x)) / (1 - rate) if keep else torch.zeros_like(x)
                x = norm(x + change) if post_norm else x + change
        torch.testing.assert_close(found[row : row + 1], x, rtol=1e-12, atol=1e-12)
    assert 12 < kept < 48
    encoder.eval()
    plain = random_encoder(replace(TINY, post_norm=post_norm)).double().eval()
    assert torch.equal(encoder.blocks(images, [4])[0], plain.blocks(images, [4])[0])


def test_the_mean_over_draws_is_the_branch() -> None:
    depth = StochasticDepth(0.3)
    depth.uniform_B = uniform(0, 0, Operation.DROP_PATH, torch.arange(20_000))[:, 0]
    branch = torch.ones(20_000, 1, 1)
    # Five standard deviations of the mean.
    assert float(depth(branch).mean()) == pytest.approx(1, abs=5 * (0.3 / 0.7 / 20_000) ** 0.5)
    assert depth(branch).unique().tolist() == pytest.approx([0, 1 / 0.7])


def test_recomputed_blocks_drop_the_same() -> None:
    gradients = []
    for checkpointing in (False, True):
        encoder = random_encoder(TINY).train()
        encoder.checkpointing = checkpointing
        for number, depth in enumerate(set_stochastic_depth(encoder, 0.5)):
            depth.uniform_B = uniform(0, number, Operation.DROP_PATH, torch.arange(4))[:, 0]
        encoder.blocks(images_of(TINY, 4), [4])[0].square().sum().backward()
        gradients.append([x.grad for x in encoder.vit.parameters() if x.grad is not None])
    assert len(gradients[0]) > 40
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# --- files


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_gives_the_same_classifier(name: str, pool: str, tmp_path: Path) -> None:
    classifier = random_classifier(ARCHITECTURES[name], pool=pool).eval()
    names = ["a,b", 'c"d', "e f", "ü", "", "x\\y", "7"]
    save_classifier(tmp_path / "c.safetensors", classifier, names, {"source": "mae"})
    found, classes = read_classifier(read_checkpoint(tmp_path / "c.safetensors"))
    assert classes == names and found.pool == pool
    images = images_of(ARCHITECTURES[name])
    assert torch.equal(found(images), classifier(images))


def test_another_resolution_interpolates_positions(tmp_path: Path) -> None:
    save_classifier(tmp_path / "c.safetensors", random_classifier(TINY, 2), ["a", "b"], {})
    checkpoint = read_checkpoint(tmp_path / "c.safetensors")
    found, _ = read_classifier(checkpoint, 32)
    assert found.encoder.architecture.image_size == 32 and found(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    with pytest.raises(ConfigError, match="--resolution 20"):
        read_classifier(checkpoint, 20)


RECORDS: dict[str, Any] = {
    "no table": "cls",
    "no pool": {"classes": ["a", "b"]},
    "no classes": {"pool": "cls"},
    "an unknown pool": {"pool": "max", "classes": ["a", "b"]},
    "text for classes": {"pool": "cls", "classes": "ab"},
    "one class": {"pool": "cls", "classes": ["a"]},
    "more classes than logits": {"pool": "cls", "classes": ["a", "b", "c"]},
    "a norm that is missing": {"pool": "mean", "classes": ["a", "b"]},
}


@pytest.mark.parametrize("record", RECORDS)
def test_damaged_records_are_one_line(record: str, tmp_path: Path) -> None:
    classifier, path = random_classifier(TINY, 2), tmp_path / "c.safetensors"
    header = {"architecture": TINY.to_dict(), "classifier": RECORDS[record]}
    tensors = {**classifier.encoder.vit.state_dict(), **classifier.head_state()}
    save_file({key: x.contiguous() for key, x in tensors.items()}, path, {"mimref": json.dumps(header)})
    with pytest.raises(CheckpointError) as caught:
        read_classifier(read_checkpoint(path))
    assert str(caught.value).startswith(f"{path}: ") and "classifier" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_encoder_alone_is_no_classifier(tmp_path: Path) -> None:
    torch.save(public_vit().state_dict(), tmp_path / "foreign.pth")
    for path in ("quickstart", tmp_path / "foreign.pth"):
        with pytest.raises(CheckpointError, match="mimref finetune"):
            read_classifier(read_checkpoint(path))
    torch.save({"transformer.wte.weight": torch.zeros(3, 2)}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError) as caught:
        read_classifier(read_checkpoint(tmp_path / "none.pth"))
    assert "--arch" not in str(caught.value)  # commands that read classifiers lack this option


# --- public fine-tuned models


def public_vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}
    vit = VisionTransformer(**{"num_classes": 0} | sizes | options)
    for parameter in vit.parameters():
        parameter.data.normal_(std=0.1)
    return vit.eval()


PUBLIC: dict[str, dict[str, Any]] = {
    "MAE's, mean": {"global_pool": "avg"},
    "CLS": {},
    "no CLS token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
}


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x, "epoch": 3}], ids=["bare", "wrapped"])
@pytest.mark.parametrize("name", PUBLIC)
def test_public_classifiers(name: str, wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    vit = public_vit(num_classes=7, **PUBLIC[name])
    torch.save(wrap(vit.state_dict()), tmp_path / "public.pth")
    classifier, classes = read_classifier(read_checkpoint(tmp_path / "public.pth"))
    assert classes == ["0", "1", "2", "3", "4", "5", "6"]
    images = images_of(TINY)
    torch.testing.assert_close(classifier(images), vit(images))


def test_torchvisions_classifier(tmp_path: Path) -> None:
    from torchvision.models import VisionTransformer as Torchvisions

    torch.manual_seed(0)
    vit = Torchvisions(16, 8, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=5).eval()
    for parameter in vit.parameters():
        parameter.data.normal_(std=0.1)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    classifier, _ = read_classifier(read_checkpoint(tmp_path / "vit.pth"))
    torch.testing.assert_close(classifier(images_of(TINY)), vit(images_of(TINY)))


def test_heads_that_are_no_classifier_of_tokens_are_refused(tmp_path: Path) -> None:
    state = public_vit().state_dict()
    heads = {"two poolings": torch.zeros(5, 384), "a bias alone": None, "a vector": torch.zeros(192)}
    for weight in heads.values():
        head = {"head.bias": torch.zeros(5)} | ({} if weight is None else {"head.weight": weight})
        torch.save(state | head, tmp_path / "public.pth")
        with pytest.raises(CheckpointError, match="without a classifier"):
            read_classifier(read_checkpoint(tmp_path / "public.pth"))


# --- export


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "post-norm"])
def test_timm_reads_the_export(name: str, pool: str, ending: str, tmp_path: Path) -> None:
    classifier = random_classifier(ARCHITECTURES[name], pool=pool).eval()
    out = tmp_path / f"c.{ending}"
    done = export_classifier(classifier, list("abcdefg"), out, {"source": "mae"})
    if "model = " in done.read_with:
        found: dict[str, Any] = {}
        exec(f"import timm, torch\n{done.read_with}", found)
        model = found["model"]
    else:
        model = eval(done.read_with, {"timm": timm})
    images = images_of(ARCHITECTURES[name])
    if ARCHITECTURES[name].channels == 1:
        images = images[:, :1]
    torch.testing.assert_close(model.eval()(images), classifier(images), rtol=1e-4, atol=1e-4)
    assert done.difference < 1e-3


@pytest.mark.parametrize(("arch", "name"), [("vit_b16", "vit_base_patch16_224"), ("vit_l16", "vit_large_patch16_224")])
def test_timms_names_of_the_papers_sizes(arch: str, name: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(Architecture.from_config(EncoderConfig(arch=arch)))
    assert timm_name(encoder) == name


def test_post_norm_classifiers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--to timm"):
        export_classifier(random_classifier(ARCHITECTURES["post-norm"]), list("abcdefg"), tmp_path / "c.pth", {})
    assert not list(tmp_path.iterdir())
