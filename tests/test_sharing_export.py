"""Folders for Hugging Face's libraries: each loads them in its public way, and gives the encoder's features."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from mimref.api import load
from mimref.data.transforms import EvalTransform
from mimref.encoders.checkpoints import read_checkpoint, save_encoder
from mimref.encoders.classifier import read_classifier, save_classifier
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import ConfigError, OutputError
from mimref.sharing import export, layout, transformers_layout
from mimref.sharing.export import FolderExport, export_folder, folder_layout, read_subject
from mimref.sharing.layout import Library, Subject
from mimref.sharing.timm_layout import crop_pct
from tests.checkpoints import tokens
from tests.subjects import (
    CLASSES,
    DINOV2,
    EPS,
    FOURFOLD_SWIGLU,
    GRAY,
    NO_CLS,
    NO_CLS_REGISTERS,
    NO_NORM,
    PLAIN_SWIGLU,
    POST_NORM,
    REGISTERS,
    SCALED,
    SWIGLU,
    TINY,
    TRANSFORM,
    WIDE,
    make,
    subject_of,
    with_classifier,
)

transformers = pytest.importorskip("transformers")
# In older versions, poolers apply a tanh, and timm's models have no sizes of their own.
has_poolers = "pooler_act" in inspect.signature(transformers.ViTConfig).parameters
has_sizes = "model_args" in inspect.signature(transformers.TimmWrapperConfig).parameters
has_local_dir = pytest.mark.skipif(not hasattr(timm.models._hub, "load_model_config_from_path"), reason="timm 1.0.16")

CLASS_OF = {
    "ViT": (TINY, GRAY, WIDE, EPS),
    "IJepa": (NO_CLS,),
    "Dinov2": (SCALED, SWIGLU, PLAIN_SWIGLU),
    "Dinov2WithRegisters": (REGISTERS, DINOV2, replace(TINY, registers=1)),
}
EXACT = [pytest.param(name, each, id=f"{name}{n}") for name, found in CLASS_OF.items() for n, each in enumerate(found)]
OF_TIMM = [
    *(TINY, GRAY, WIDE, NO_CLS, SCALED, SWIGLU, PLAIN_SWIGLU, FOURFOLD_SWIGLU),
    *(REGISTERS, DINOV2, NO_NORM, NO_CLS_REGISTERS),
]


def write(subject: Subject, out: Path, library: Library, **options: Any) -> FolderExport:
    return export_folder(subject, folder_layout(subject, library), "card", out, **options)


def images(count: int = 2, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=1e-5)


def assert_same_blocks(found: Any, encoder: Encoder) -> None:
    """Check `found`, the tokens of every block."""
    every = range(1, encoder.depth + 1)
    for theirs, ours in zip(found, encoder.blocks(images(), every), strict=True):
        close(theirs, ours)


# --- transformers


@pytest.mark.parametrize(("name", "architecture"), EXACT)
@torch.no_grad()
def test_transformers_loads_the_encoder(name: str, architecture: Architecture, tmp_path: Path) -> None:
    encoder = make(architecture)
    done = write(subject_of(encoder), tmp_path / "m", "transformers")
    assert done.model == f"{name}Model" and done.read_by == ["mimref", "transformers"] and done.difference < 1e-5
    model, loading = transformers.AutoModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert type(model).__name__ == done.model
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    output = model.eval()(images(), output_hidden_states=True)
    assert_same_blocks(output.hidden_states[1:], encoder)
    normed = encoder.blocks(images(), [encoder.depth], final_norm=True)[0]
    close(output.last_hidden_state, normed)
    if name != "IJepa":
        passes = name != "ViT" or has_poolers
        close(output.pooler_output, normed[:, 0] if passes else normed[:, 0].tanh())


@pytest.mark.parametrize("architecture", [TINY, NO_CLS, SWIGLU, DINOV2, GRAY])
@torch.no_grad()
def test_transformers_loads_the_classifier(architecture: Architecture, tmp_path: Path) -> None:
    classifier = with_classifier(architecture)
    write(subject_of(classifier), tmp_path / "m", "transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m").eval()
    close(model(images()).logits, classifier(images()))
    assert model.config.id2label == dict(enumerate(CLASSES))
    # The encoder alone can be loaded, too.
    base = transformers.AutoModel.from_pretrained(tmp_path / "m").eval()
    assert_same_blocks(base(images(), output_hidden_states=True).hidden_states[1:], classifier.encoder)


REFUSED = {
    "norm after the last": NO_NORM,
    "without a CLS token": NO_CLS_REGISTERS,
    "an MLP of 100": replace(SCALED, mlp_width=100),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_transformers_cannot_express(reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        folder_layout(subject_of(make(REFUSED[reason])), "transformers")
    assert "--layout timm" in str(refused.value)
    write(subject_of(make(REFUSED[reason])), tmp_path / "m", "timm")


def test_mean_pooled_classifiers_need_timm() -> None:
    with pytest.raises(ConfigError, match=r"finetune\.pool.*--layout timm"):
        folder_layout(subject_of(with_classifier(TINY, "mean")), "transformers")


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_post_norm_fits_neither(library: Library) -> None:
    with pytest.raises(ConfigError, match="--to release or --to onnx"):
        folder_layout(subject_of(make(POST_NORM)), library)


def test_timm_cannot_record_the_epsilon() -> None:
    with pytest.raises(ConfigError, match=r"1e-12.*--layout transformers"):
        folder_layout(subject_of(make(EPS)), "timm")


@pytest.mark.parametrize(
    ("name", "kind"), [("vit_tiny_patch16_224", "ViTModel"), ("vit_small_patch14_reg4_dinov2", "Dinov2WithRegisters")]
)
def test_timms_own_models(name: str, kind: str, tmp_path: Path) -> None:
    architecture = Architecture(
        name, 112, *((192, 12, 3, 16) if "tiny" in name else (384, 12, 6, 14)), fixed_positions=False, from_timm=True,
        interpolation="timm",
    )  # fmt: skip
    done = write(subject_of(make(architecture), EvalTransform(112)), tmp_path / "m", "transformers")
    assert done.model.startswith(kind)


def test_timms_relatives_are_refused() -> None:
    architecture = Architecture(
        "vit_base_patch16_clip_224", 32, 768, 12, 12, 16, fixed_positions=False, from_timm=True, interpolation="timm"
    )
    with torch.device("meta"):
        encoder = build_encoder(architecture)
    with pytest.raises(ConfigError, match="--layout timm"):
        folder_layout(subject_of(encoder, EvalTransform(32)), "transformers")


# --- timm


@has_local_dir
@pytest.mark.parametrize("architecture", OF_TIMM)
@torch.no_grad()
def test_timm_loads_the_encoder(architecture: Architecture, tmp_path: Path) -> None:
    encoder = make(architecture)
    done = write(subject_of(encoder), tmp_path / "m", "timm")
    assert done.read_by == ["mimref", "timm"] and done.difference < 1e-5
    vit = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    assert vit.num_classes == 0
    assert_same_blocks(tokens(vit, images()), encoder)
    normed = encoder.blocks(images(), [encoder.depth], final_norm=True)[0]
    close(vit.forward_features(images()), normed)
    pooled = normed[:, 0] if architecture.class_token else normed[:, architecture.registers :].mean(dim=1)
    close(vit(images()), pooled)


@pytest.mark.skipif(not has_sizes, reason="transformers reads no model_args")
@pytest.mark.parametrize("architecture", [TINY, NO_CLS, DINOV2])
@torch.no_grad()
def test_transformers_loads_timms_layout(architecture: Architecture, tmp_path: Path) -> None:
    encoder = make(architecture)
    write(subject_of(encoder), tmp_path / "m", "timm")
    output = transformers.AutoModel.from_pretrained(tmp_path / "m").eval()(images())
    close(output.last_hidden_state, encoder.blocks(images(), [encoder.depth], final_norm=True)[0])


CLASSIFIERS = [(TINY, "cls"), (TINY, "mean"), (NO_CLS, "cls"), (SWIGLU, "mean"), (REGISTERS, "cls"), (NO_NORM, "cls")]


@has_local_dir
@pytest.mark.parametrize(("architecture", "pool"), CLASSIFIERS)
@torch.no_grad()
def test_timm_loads_the_classifier(architecture: Architecture, pool: str, tmp_path: Path) -> None:
    classifier = with_classifier(architecture, pool)
    write(subject_of(classifier), tmp_path / "m", "timm")
    vit = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    close(vit(images()), classifier(images()))
    assert vit.pretrained_cfg["label_names"] == CLASSES
    found, classes = read_classifier(read_checkpoint(tmp_path / "m"))
    assert classes == CLASSES
    close(found(images()), classifier(images()))


# --- images


SIZES = [(50, 40), (40, 61), (20, 20), (33, 90), (16, 16), (19, 18), (23, 47)]


def photograph(width: int, height: int) -> Image.Image:
    """Return smooth colours and edges, so that a crop that is off by a pixel shows."""
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 256, (1 + height // 5, 1 + width // 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def ours(transform: EvalTransform, image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return transform.normalize(transform.crop(pixels)[None])[0]


def levels_apart(found: Tensor, expected: Tensor, transform: EvalTransform) -> float:
    """Return the largest difference, in steps of 8-bit pixels."""
    return float(((found - expected) * torch.tensor(transform.std).view(3, 1, 1)).abs().max() * 255)


TRANSFORMS = [TRANSFORM, *(EvalTransform(16, share) for share in (0.875, 0.9, 1.0)), EvalTransform(16, resize="direct")]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_the_image_processor_gives_our_pixels(library: Library, transform: EvalTransform, tmp_path: Path) -> None:
    """transformers rounds the corner of a crop down, torchvision to the nearest even pixel."""
    write(subject_of(make(TINY), transform), tmp_path / "m", library)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "m")
    side, shifted = round(16 / transform.crop_fraction), 0
    for size in SIZES:
        image = photograph(*size)
        found = processor(image, return_tensors="pt").pixel_values[0]
        assert found.shape == (3, 16, 16)
        longer = int(side * max(size) / min(size))
        if library == "transformers" and transform.resize == "shorter" and 3 in ((side - 16) % 4, (longer - 16) % 4):
            shifted += 1
            assert levels_apart(found, ours(transform, image), transform) > 2
        else:
            assert levels_apart(found, ours(transform, image), transform) < 2.01, size
    assert shifted < len(SIZES) / 2


def test_sides_are_rounded_down_by_timm() -> None:
    for share in np.linspace(0.3, 1, 71):
        transform = EvalTransform(224, float(share))
        assert int(224 / crop_pct(transform)) == round(224 / float(share))
    assert crop_pct(EvalTransform(224, 0.875)) == 0.875


# --- reading the folder, and writing it


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_mimref_reads_the_folder(library: Library, tmp_path: Path) -> None:
    header = {"source": "mae", "licence": "CC-BY-NC-4.0", "preset": "/home/me/p", "transform": TRANSFORM.to_dict()}
    data = {"spec": str(tmp_path / "secret"), "root": "/home/me", "alpha": "white", "train_limit": 5}
    save_encoder(tmp_path / "e.safetensors", make(TINY), header | {"data": data})
    subject, _ = read_subject(tmp_path / "e.safetensors")
    write(subject, tmp_path / "m", library)
    encoder = load(tmp_path / "m")
    assert encoder.transform == TRANSFORM
    wanted = {"source": "mae", "licence": "CC-BY-NC-4.0", "preset": "p", "data": {"alpha": "white"}}
    assert {key: encoder.header[key] for key in wanted} == wanted
    for file in (tmp_path / "m").iterdir():
        assert b"secret" not in file.read_bytes() and b"/home/me" not in file.read_bytes()


def test_named_data_stay_in_the_header(tmp_path: Path) -> None:
    data = {"spec": "fashion-mnist", "root": "/home/me", "train_limit": 10}
    save_encoder(tmp_path / "e.safetensors", make(TINY), {"source": "mae", "data": data})
    subject, _ = read_subject(tmp_path / "e.safetensors")
    assert subject.header["data"] == {"spec": "fashion-mnist", "train_limit": 10}


def test_a_resolution(tmp_path: Path) -> None:
    save_encoder(tmp_path / "e.safetensors", make(TINY), {"source": "mae", "transform": TRANSFORM.to_dict()})
    subject, _ = read_subject(tmp_path / "e.safetensors", resolution=24)
    write(subject, tmp_path / "m", "transformers")
    model = transformers.AutoModel.from_pretrained(tmp_path / "m")
    assert model.config.image_size == 24
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "m")
    assert processor(photograph(50, 40), return_tensors="pt").pixel_values.shape[-2:] == (24, 24)


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert write(subject_of(make(TINY)), tmp_path / "m", "transformers").read_by == ["mimref"]


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_feature_that_differs_refuses_the_folder(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of(make(TINY))
    files = folder_layout(subject, library)
    name = {"timm": "blocks.2.mlp.fc2.bias", "transformers": "encoder.layer.2.output.dense.bias"}[library]
    changed = dict(files.tensors) | {name: files.tensors[name] + 1}
    with pytest.raises(OutputError, match="block_3 differs"):
        export_folder(subject, replace(files, tensors=changed), "", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_the_class_lacks_is_noticed(tmp_path: Path) -> None:
    """mimref would read the folder, but transformers would fill in random weights."""
    subject = subject_of(make(TINY))
    files = folder_layout(subject, "transformers")
    fewer = {name: tensor for name, tensor in files.tensors.items() if not name.startswith("pooler")}
    with pytest.raises(ConfigError, match="pooler"):
        export_folder(subject, replace(files, tensors=fewer), "", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_exist(tmp_path: Path) -> None:
    subject, out = subject_of(make(TINY)), tmp_path / "m"
    write(subject, out, "timm")
    with pytest.raises(OutputError, match="--force"):
        write(subject, out, "transformers")
    write(subject, out, "transformers", force=True)
    assert {file.name for file in out.iterdir()} == set(export.OWN_FILES)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    write(subject, out, "timm", force=True)
    assert not (out / "preprocessor_config.json").exists()
    (out / "mine.txt").write_text("")
    with pytest.raises(OutputError, match=r"mine\.txt"):
        write(subject, out, "timm", force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write(subject, tmp_path / "file", "timm")


def test_a_crash_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, out = subject_of(make(TINY)), tmp_path / "m"
    write(subject, out, "timm")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    monkeypatch.setattr(layout, "safetensors_parts", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(subject, out, "transformers", force=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_hostile_class_names_stay_what_they_are(tmp_path: Path) -> None:
    classes = ["\udcff", "a\nb: c", "<script>"]
    subject = replace(subject_of(with_classifier(TINY)), classes=classes)
    for library in ("transformers", "timm"):
        write(subject, tmp_path / library, library)
    config = json.loads((tmp_path / "transformers" / "config.json").read_text())
    assert list(config["id2label"].values()) == classes
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "transformers")
    assert model.config.id2label == dict(enumerate(classes))
    assert read_classifier(read_checkpoint(tmp_path / "timm"))[1] == classes


def test_finetuned_results(tmp_path: Path) -> None:
    header = {"source": "mae", "transform": TRANSFORM.to_dict()}
    save_classifier(tmp_path / "c.safetensors", with_classifier(TINY), CLASSES, header)
    subject, _ = read_subject(tmp_path / "c.safetensors")
    assert subject.classifier is not None and list(subject.classes) == CLASSES
    assert write(subject, tmp_path / "m", "transformers").model == "ViTForImageClassification"


def test_processors_of_other_transforms() -> None:
    """The folder's processor has the sizes and channels of the transform."""
    wanted: Mapping[str, Any] = {"shortest_edge": 20}
    assert transformers_layout.processor_config(TRANSFORM)["size"] == wanted
    assert transformers_layout.processor_config(TRANSFORM)["do_convert_rgb"]
    bands = transformers_layout.processor_config(EvalTransform(16, mean=(0.5,) * 5, std=(0.2,) * 5))
    assert not bands["do_convert_rgb"] and bands["image_mean"] == [0.5] * 5
    direct = transformers_layout.processor_config(EvalTransform(16, resize="direct"))
    assert direct["size"] == {"height": 16, "width": 16} and direct["do_center_crop"] is False
