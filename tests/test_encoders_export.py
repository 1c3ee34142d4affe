"""Exports: each file is read with the code that its users have, and gives the encoder's features."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mimref.encoders import export, export_onnx
from mimref.encoders.checkpoints import save_encoder
from mimref.encoders.export import Export, plain, read_encoder
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import CheckpointError, ConfigError, OutputError
from tests.checkpoints import data2vec_tokens, load_encoder, timm_vit, tokens
from tests.families import FAMILIES, write_backbone

# Files without a header need a published width, which implies the attention heads.
TINY = Architecture("custom", 16, width=192, depth=3, num_heads=3, patch_size=4)
POST_NORM = replace(TINY, post_norm=True)
REGISTERS = replace(TINY, registers=2)
DINOV2 = replace(TINY, registers=4, layer_scale=True, swiglu=True, mlp_width=96, fixed_positions=False)
NO_CLS = replace(TINY, class_token=False)
NO_NORM = replace(TINY, final_norm=False)
VIT_TINY = Architecture("custom", 224, width=192, depth=12, num_heads=3, patch_size=16)
FACTS = {"source": "mae refined", "licence": "CC-BY-NC 4.0", "preset": "refine/mae", "data": {"spec": "digits"}}


def make(architecture: Architecture) -> Encoder:
    """An encoder with random weights, even where a new one has zeros and ones."""
    torch.manual_seed(0)
    encoder = build_encoder(architecture).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder


def images(count: int, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def assert_same_features(vit: VisionTransformer, encoder: Encoder, size: int) -> None:
    batch = images(2, size)
    every = range(1, encoder.depth + 1)
    for theirs, ours in zip(tokens(vit.eval(), batch), encoder.blocks(batch, every), strict=True):
        close(theirs, ours)
    close(vit.forward_features(batch), encoder.blocks(batch, [encoder.depth], final_norm=True)[0])


# --- timm


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_timm_creates_a_model_with_the_file(tmp_path: Path, ending: str) -> None:
    encoder = make(VIT_TINY)
    done = export.export_timm(encoder, tmp_path / f"a.{ending}", FACTS)
    assert done.timm_name == "vit_tiny_patch16_224"
    vit = timm.create_model(done.timm_name, checkpoint_path=str(done.path), num_classes=0)
    assert isinstance(vit, VisionTransformer)
    assert_same_features(vit, encoder, 224)
    assert 0 <= done.difference < 1e-4
    assert_same_features(eval(done.read_with), encoder, 224)
    assert list(tmp_path.iterdir()) == [done.path]


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        (replace(VIT_TINY, image_size=384), "vit_tiny_patch16_384"),
        (replace(VIT_TINY, image_size=64), "vit_tiny_patch16_224"),
        (replace(VIT_TINY, num_heads=6), None),
        (Architecture("vit_h14", 224, 1280, 32, 16, 14, class_token=False), "vit_huge_patch14_gap_224"),
        (Architecture("custom", 224, 384, 12, 6, 14, layer_scale=True, registers=4), "vit_small_patch14_reg4_dinov2"),
        (Architecture("vit_small_patch16_224.dino", 64, 384, 12, 6, 16, from_timm=True), "vit_small_patch16_224"),
    ],
)
def test_names_of_timm(architecture: Architecture, name: str | None) -> None:
    with torch.device("meta"):
        encoder = build_encoder(architecture)
    assert export.timm_name(encoder) == name


@pytest.mark.parametrize(
    "architecture", [DINOV2, NO_CLS, replace(TINY, mlp_width=100)], ids=["dinov2", "no_cls", "mlp"]
)
def test_timms_class_reads_what_timm_has_no_name_for(tmp_path: Path, architecture: Architecture) -> None:
    encoder = make(architecture)
    done = export.export_timm(encoder, tmp_path / "a.safetensors", FACTS)
    assert done.timm_name is None
    found: dict[str, Any] = {"timm": timm, "torch": torch}
    exec(done.read_with, found)
    assert_same_features(found["model"], encoder, 16)


def test_timms_own_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    architecture = Architecture("test_vit", 32, 64, 6, 2, 16, from_timm=True)
    encoder = build_encoder(architecture).eval()
    done = export.export_timm(encoder, tmp_path / "a.safetensors", {})
    assert done.timm_name == "test_vit" and "img_size=32" in done.read_with
    assert_same_features(eval(done.read_with), encoder, 32)


def test_the_header_travels_with_safetensors(tmp_path: Path) -> None:
    export.export_timm(make(TINY), tmp_path / "a.safetensors", FACTS)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        assert json.loads(opened.metadata()["mimref"]) == {"architecture": TINY.to_dict(), **FACTS}
    export.export_timm(make(TINY), tmp_path / "a.pth", FACTS)
    plain = torch.load(tmp_path / "a.pth", weights_only=True)
    assert plain.keys() == make(TINY).vit.state_dict().keys()


@pytest.mark.parametrize(
    ("architecture", "other"), [(POST_NORM, "--to release"), (NO_NORM, "--to onnx")], ids=["post_norm", "no_norm"]
)
def test_encoders_that_timm_has_no_model_for(tmp_path: Path, architecture: Architecture, other: str) -> None:
    with pytest.raises(ConfigError, match=f"^--to timm: .*{other}"):
        export.export_timm(make(architecture), tmp_path / "a.pth", {})
    assert list(tmp_path.iterdir()) == []


# --- the releases' layout


@pytest.mark.parametrize("architecture", [TINY, POST_NORM, replace(TINY, mlp_width=100)], ids=["pre", "post", "mlp"])
@torch.no_grad()
def test_a_release_is_recognised(tmp_path: Path, architecture: Architecture) -> None:
    encoder = make(architecture)
    done = export.export_release(encoder, tmp_path / "a.th", FACTS)
    found, _ = load_encoder(done.path)
    for theirs, ours in zip(found.blocks(images(2), [1, 2, 3]), encoder.blocks(images(2), [1, 2, 3]), strict=True):
        close(theirs, ours)
    (theirs,), (ours,) = (one.blocks(images(2), [3], final_norm=True) for one in (found, encoder))
    close(theirs, ours)
    assert done.timm_name is None and list(tmp_path.iterdir()) == [done.path]


@torch.no_grad()
def test_a_post_norm_release_by_plain_names(tmp_path: Path) -> None:
    encoder = make(POST_NORM)
    content = torch.load(export.export_release(encoder, tmp_path / "a.pth", FACTS).path, weights_only=True)
    state = content["state_dict"]
    # Each name is used once and mapped to the plain code's name.
    image = "modality_encoders.IMAGE."
    places = {
        "pos_embed.embed": f"{image}fixed_positional_encoder.positions",
        "cls_tokens.tokens": f"{image}extra_tokens",
        **{f"patch_embed.proj.{part}": f"{image}local_encoder.proj.{part}" for part in ("weight", "bias")},
        **{f"embed_norm.{part}": f"{image}context_encoder.norm.{part}" for part in ("weight", "bias")},
    }
    assert state["pos_embed.embed"].shape == (1, 4, 4, 192)
    plain = {places.get(name, name): tensor for name, tensor in state.items()}
    plain[places["pos_embed.embed"]] = state["pos_embed.embed"].flatten(1, 2)
    expected = encoder.blocks(images(2), [1, 2, 3])
    for theirs, ours in zip(data2vec_tokens(plain, images(2), heads=3), expected, strict=True):
        close(theirs, ours)
    assert len(state) == 6 + 12 * 3
    assert content["mimref"] == FACTS
    assert content["ctor_kwargs"] == {
        "patch_size": 4, "dim": 192, "depth": 3, "num_heads": 3, "input_shape": (3, 16, 16), "mlp_hidden_dim": 768,
    }  # fmt: skip


def test_a_pre_norm_release_has_the_cls_position_in_its_token(tmp_path: Path) -> None:
    encoder = make(TINY)
    export.export_release(encoder, tmp_path / "a.pt", {})
    state = torch.load(tmp_path / "a.pt", weights_only=True)["state_dict"]
    own = encoder.vit.state_dict()
    changed = {"pos_embed", "cls_token"}
    assert state.keys() == own.keys() - changed | {"pos_embed.embed", "cls_tokens.tokens"}
    assert torch.equal(state["cls_tokens.tokens"], own["cls_token"] + own["pos_embed"][:, :1])
    assert torch.equal(state["pos_embed.embed"][0, 1, 2], own["pos_embed"][0, 1 + 4 + 2])
    assert all(torch.equal(state[name], own[name]) for name in own.keys() - changed)


@pytest.mark.parametrize(
    ("architecture", "feature"),
    [
        (REGISTERS, "register tokens; use --to timm"),
        (NO_CLS, "without CLS token; use --to timm"),
        (replace(TINY, layer_scale=True), "LayerScale; use --to timm"),
        (replace(TINY, swiglu=True), "SwiGLU; use --to timm"),
        (NO_NORM, "without final norm; use --to onnx"),
        (Architecture("vit_xsmall_patch16_clip_224", 32, 256, 10, 4, 16, from_timm=True), "norm before its blocks"),
    ],
)
def test_encoders_that_a_release_has_no_place_for(tmp_path: Path, architecture: Architecture, feature: str) -> None:
    with pytest.raises(ConfigError, match=f"^--to release: .*{feature}"):
        export.export_release(build_encoder(architecture), tmp_path / "a.th", {})
    assert list(tmp_path.iterdir()) == []


# --- ONNX


@pytest.mark.parametrize("architecture", [DINOV2, POST_NORM], ids=["dinov2", "post_norm"])
@torch.no_grad()
def test_onnx(tmp_path: Path, architecture: Architecture) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    architecture = replace(architecture, depth=2)
    encoder = make(architecture)
    done = export_onnx.export_onnx(encoder, tmp_path / "a.onnx", FACTS, [2, 1])
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    has_norm = architecture.final_norm and not architecture.post_norm
    assert names == ["block_2", "block_1"] + ["normed"] * has_norm
    for count in (1, 3):
        batch = images(count)
        expected = encoder.blocks(batch, [2, 1]) + encoder.blocks(batch, [2], final_norm=True)
        for found, tokens_BLD in zip(session.run(names, {"images": batch.numpy()}), expected, strict=False):
            close(found, tokens_BLD)
    metadata = session.get_modelmeta().custom_metadata_map
    assert (metadata["source"], metadata["licence"], metadata["blocks"]) == ("mae refined", "CC-BY-NC 4.0", "[2, 1]")
    assert json.loads(metadata["architecture"]) == architecture.to_dict()
    assert list(tmp_path.iterdir()) == [done.path]
    assert str(Path(export.__file__).parent).encode() not in done.path.read_bytes()  # no folder names


@torch.no_grad()
def test_onnx_of_large_encoders_is_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export_onnx, "_LARGEST_BYTES", 1000)
    encoder, out, data = make(replace(NO_CLS, depth=2)), tmp_path / "a.onnx", tmp_path / "a.onnx.data"
    export_onnx.export_onnx(encoder, out, {}, [1])
    assert sorted(tmp_path.iterdir()) == [out, data]
    session = onnxruntime.InferenceSession(str(out))
    assert [output.name for output in session.get_outputs()] == ["block_1"]
    close(session.run(["block_1"], {"images": images(1).numpy()})[0], encoder.blocks(images(1), [1])[0])
    # Later blocks are not part of the graph.
    assert data.stat().st_size < 0.6 * 4 * sum(parameter.numel() for parameter in encoder.parameters())
    out.unlink()
    with pytest.raises(OutputError, match=r"a\.onnx\.data: exists"):
        export_onnx.export_onnx(encoder, out, {}, [1])


def test_onnx_of_missing_blocks_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(export_onnx, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"pip install 'mimref\[onnx\]'$"):
            export_onnx.export_onnx(make(TINY), tmp_path / "a.onnx", {}, [3])
    pytest.importorskip("onnxruntime")
    with pytest.raises(ConfigError, match="block 4"):
        export_onnx.export_onnx(make(TINY), tmp_path / "a.onnx", {}, [4])


# --- any format

EXPORTS: list[tuple[str, Callable[[Encoder, Path], Export]]] = [
    ("a.pth", lambda encoder, out: export.export_timm(encoder, out, {})),
    ("a.th", lambda encoder, out: export.export_release(encoder, out, {})),
    ("a.onnx", lambda encoder, out: export_onnx.export_onnx(encoder, out, {}, [1])),
]


@pytest.mark.parametrize("part", ["block_2", "normed"])
@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_one_feature_that_differs_refuses_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, wrong: float
) -> None:
    read = export._read_by_timm

    def read_badly(*given: Any) -> dict[str, Tensor]:
        found = read(*given)
        changed = found[part].clone()
        changed[0, 0, 0] += wrong * changed.abs().max()
        return found | {part: changed}

    monkeypatch.setattr(export, "_read_by_timm", read_badly)
    with pytest.raises(OutputError, match=f"a.pth: not written: .*{part} differs"):
        export.export_timm(make(TINY), tmp_path / "a.pth", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "run"), EXPORTS, ids=["timm", "release", "onnx"])
def test_every_format_is_compared_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, run: Callable[[Encoder, Path], Export]
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "_TOLERANCE", -1.0)
    with pytest.raises(OutputError, match=f"{name}: not written"):
        run(make(replace(TINY, depth=1)), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "run"), EXPORTS, ids=["timm", "release", "onnx"])
def test_other_endings_and_files_that_exist(tmp_path: Path, name: str, run: Callable[[Encoder, Path], Export]) -> None:
    with pytest.raises(OutputError, match=r"a\.bin: .* must end in \."):
        run(make(TINY), tmp_path / "a.bin")
    with pytest.raises(OutputError, match="must end in "):  # timm and torch would take it for another format
        run(make(TINY), tmp_path / Path(name).with_suffix(Path(name).suffix.upper()))
    (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        run(make(TINY), tmp_path / name)
    (tmp_path / name).rmdir()
    (tmp_path / name).write_text("old")
    with pytest.raises(OutputError, match="--force"):
        run(make(TINY), tmp_path / name)
    assert (tmp_path / name).read_text() == "old"


def test_replacing_a_file_keeps_it_until_the_new_one_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.pth"
    out.write_text("old")
    monkeypatch.setattr(export, "_TOLERANCE", -1.0)
    with pytest.raises(OutputError, match="not written"):
        export.export_timm(make(TINY), out, {}, force=True)
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]
    monkeypatch.undo()
    export.export_timm(make(TINY), out, {}, force=True)
    assert torch.load(out, weights_only=True)["norm.weight"].shape == (192,)


def test_an_encoder_is_read_with_the_facts_of_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    transform = {"image_size": 16, "mean": [0.5, 0.5, 0.5]}
    save_encoder(path, make(TINY), {**FACTS, "transform": transform, "metrics": [1]})
    encoder, facts, _ = read_encoder(path)
    assert facts == {**FACTS, "transform": transform} and encoder.architecture == TINY
    larger, facts, _ = read_encoder(path, resolution=24)
    assert facts["transform"] == {"image_size": 24, "mean": [0.5, 0.5, 0.5]}
    assert larger.vit.pos_embed is not None and larger.vit.pos_embed.shape == (1, 1 + 36, 192)
    batch = images(2, 24)
    close(larger.blocks(batch, [3])[0].detach(), encoder.blocks(batch, [3])[0].detach())
    with pytest.raises(ConfigError, match="--resolution 17"):
        read_encoder(path, resolution=17)
    with pytest.raises(ConfigError, match="--arch vit_l16"):
        read_encoder(path, arch="vit_l16")


def test_foreign_files(tmp_path: Path) -> None:
    torch.save({"model": timm_vit().state_dict()}, tmp_path / "a.pth")
    _, facts, _ = read_encoder(tmp_path / "a.pth", source="mae")
    assert facts == {"source": "mae"}
    torch.save(timm.create_model("test_vit3", num_classes=0).state_dict(), tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"pass --arch \(and --source\)$"):
        read_encoder(tmp_path / "b.pth")
    encoder, *_ = read_encoder(tmp_path / "b.pth", arch="test_vit3")
    assert encoder.architecture.from_timm
    with pytest.raises(ConfigError, match=r"swin.* --to timm"):
        plain(read_encoder(write_backbone(tmp_path / "c.safetensors", FAMILIES["swin"]))[0], "--to onnx")
