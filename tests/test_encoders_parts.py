"""An encoder beside other networks in a file, and the choice among several encoders."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from mimref.config.base import ReadingConfig
from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.formats import recognise
from mimref.encoders.parts import NoChoice, choose_part
from mimref.encoders.vit import Encoder
from mimref.errors import CheckpointError
from tests.checkpoints import IMAGE, State, data2vec, mae_vit, prefixed, timm_vit, tokens

BESIDE: dict[str, Any] = {
    "projector": {"projector.0.weight": torch.zeros(8, 2), "projector.1.running_mean": torch.zeros(8)},
    "head": {"head.mlp.0.weight": torch.zeros(8, 2), "dino_loss.center": torch.zeros(1, 8)},
    "classifier": {"classification_head.weight": torch.zeros(9, 2), "criterion.center": torch.zeros(1, 9)},
    "metric": {
        "train_acc.tp": torch.zeros(1, dtype=torch.int64),
        "queue": torch.zeros(4, 2),
        "queue_ptr": torch.ones(1),
    },
    "other network": {
        "text_model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2),
        "unet.conv.weight": torch.ones(2),
    },
}


def shifted(state: State) -> State:
    """The weights of another encoder under the same names."""
    return {name: tensor + 1 for name, tensor in state.items()}


def origins(content: Any, part: str | None = None) -> str:
    """The prefix under which the patch embedding is found in the file."""
    found = recognise(content, ReadingConfig(part=part))
    return found.origins["patch_embed.proj.weight"][0].removesuffix("patch_embed.proj.weight")


@pytest.mark.parametrize("prefix", ["backbone.", "model.", "net.vit.", "module.student.backbone.", "a.b.c.d."])
@pytest.mark.parametrize("others", BESIDE)
@torch.no_grad()
def test_an_encoder_beside_other_networks(prefix: str, others: str, tmp_path: Path) -> None:
    vit = timm_vit()
    state = prefixed(prefix, dict(vit.state_dict())) | BESIDE[others]
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, tmp_path / "last.ckpt")
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    encoder = encoder_from(checkpoint, choose_architecture(checkpoint))
    images = torch.randn(2, 3, IMAGE, IMAGE)
    for ours, theirs in zip(encoder.eval().blocks(images, [1, 2, 3]), tokens(vit, images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    found = checkpoint.recognised
    assert found is not None and found.prefix == f"state_dict.{prefix}" and found.others == []
    left_out = {f"state_dict.{name}" for name in BESIDE[others]}
    assert {name for names in found.dropped.values() for name in names} == left_out
    (notice,) = (notice for notice in found.notices if notice.startswith("left out"))
    # Losses and the like, as optimizers, are training state: `inspect` lists them, notices do not.
    assert all(name.partition(".")[0] in notice for name in BESIDE[others] if not name.endswith(".center"))


def test_tensors_inside_the_encoder_are_never_left_out() -> None:
    state = dict(timm_vit().state_dict())
    with pytest.raises(Exception, match=r"backbone\.adapter\.weight is unexpected"):
        recognise(prefixed("backbone.", state | {"adapter.weight": torch.zeros(2)}) | BESIDE["metric"])


def test_left_out_networks_are_counted() -> None:
    state = prefixed("backbone.", dict(timm_vit().state_dict()))
    found = recognise(state | BESIDE["projector"] | BESIDE["metric"])
    assert "projector (2 tensors), train_acc (1 tensor), queue (1 tensor), queue_ptr (1 tensor)" in found.notices[0]


# --- several encoders

FAMILIES = [
    # The encoder that the project itself evaluates, then the other one.
    ("backbone.", "momentum_backbone."),  # solo-learn
    ("backbone.", "backbone_momentum."),  # lightly's examples
    ("backbone.vit.", "student_backbone.vit."),  # lightly's benchmark of DINO
    ("backbone.vit.", "teacher_backbone.vit."),  # lightly's benchmark of BYOL
    ("teacher_backbone.vit.", "student_backbone.vit."),
    ("teacher.backbone.", "student.module.backbone."),  # DINO, iBOT
    ("target_encoder.module.", "encoder.module."),  # I-JEPA, MSN
    ("module.base_encoder.", "module.momentum_encoder."),  # MoCo v3
    ("module.encoder_q.", "module.encoder_k."),
    ("online_encoder.net.", "target_encoder.net."),  # BYOL
    ("state_dict_ema.", "state_dict."),  # timm
    ("model_ema.", "model."),
    ("state_dict.backbone.", "ema_state_dict.module.backbone."),  # mmengine
    ("ema_state_dict.", "state_dict."),
    ("model.", "model._ema."),
    ("", "copy."),
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("evaluated", "other"), FAMILIES)
def test_the_default_is_what_the_authors_evaluate(evaluated: str, other: str, turned: bool) -> None:
    state = dict(timm_vit().state_dict())
    pair = [prefixed(evaluated, state), prefixed(other, shifted(state))]
    content = pair[1] | pair[0] if turned else pair[0] | pair[1]
    found = recognise(content)
    assert (found.prefix, found.others) == (evaluated, [other])
    assert torch.equal(found.tensors["norm.bias"], state["norm.bias"])
    notice = found.notices[0]
    assert (evaluated[:-1] or " . ") in notice and other[:-1] in notice and "--encoder" in notice
    assert sum(map(len, found.dropped.values())) == len(state)


def test_encoders_are_chosen_by_name() -> None:
    state = dict(timm_vit().state_dict())
    content = {
        "student": prefixed("module.backbone.", state),
        "teacher": prefixed("backbone.", shifted(state)),
        "predictor_net": {"weight": torch.zeros(2)},
    }
    assert origins(content) == "teacher.backbone."
    for name in ("student", "student.module.backbone", "student.module.backbone.", "stud", "module"):
        assert origins(content, name) == "student.module.backbone."
    assert origins(content, "teacher") == "teacher.backbone."
    assert recognise(content, ReadingConfig(part="student")).notices[0].startswith("left out")
    for name in ("teachr", "backbone", ""):
        with pytest.raises(NoChoice, match=r"student\.module\.backbone, teacher\.backbone"):
            recognise(content, ReadingConfig(part=name))
    # A complete component of a prefix takes precedence over a substring.
    pair = prefixed("backbone.", state) | prefixed("momentum_backbone.", shifted(state))
    assert origins(pair, "backbone") == "backbone."
    assert origins(pair, "momentum") == "momentum_backbone."
    assert origins(state | prefixed("copy.", shifted(state)), ".") == ""


def test_names_that_say_nothing_need_a_choice(tmp_path: Path) -> None:
    state = dict(timm_vit().state_dict())
    content = {"a": state, "b": shifted(state)}
    torch.save(content, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match="--encoder a") as caught:
        choose_architecture(read_checkpoint(tmp_path / "two.pth"))
    assert "--arch" not in str(caught.value)
    assert origins(content, "b") == "b."
    with pytest.raises(CheckpointError, match=r"--encoder c .*a, b"):
        choose_architecture(read_checkpoint(tmp_path / "two.pth", ReadingConfig(part="c")))


def test_one_encoder_under_two_names_is_one() -> None:
    state = dict(timm_vit().state_dict())
    content = prefixed("backbone.", state) | prefixed("model.backbone.", state)
    assert recognise(content).prefix == "backbone."


def test_a_choice_between_three() -> None:
    names = ["backbone.", "momentum_backbone.", "teacher_backbone."]
    named: dict[str, Tensor] = {
        f"{name}patch_embed.proj.weight": torch.zeros(number) for number, name in enumerate(names)
    }
    assert choose_part(named, names, None) == "backbone."
    with pytest.raises(NoChoice):
        choose_part({f"{name}.w": torch.zeros(2) for name in "xyz"}, ["x.", "y.", "z."], None)


def test_features_of_two_encoders_have_two_keys(tmp_path: Path) -> None:
    state = dict(timm_vit().state_dict())
    torch.save({"teacher": state, "student": shifted(state)}, tmp_path / "two.pth")
    torch.save({"model": state}, tmp_path / "one.pth")
    teacher, student = (
        read_checkpoint(tmp_path / "two.pth", ReadingConfig(part=part)) for part in ("teacher", "student")
    )
    assert teacher.fingerprint == read_checkpoint(tmp_path / "two.pth").fingerprint != student.fingerprint
    # For a file with one encoder, the key still depends on its tensors alone.
    one = read_checkpoint(tmp_path / "one.pth")
    assert one.fingerprint == read_checkpoint(tmp_path / "one.pth", ReadingConfig(part="model")).fingerprint
    assert one.fingerprint not in (teacher.fingerprint, student.fingerprint)


def test_features_of_averages_have_the_averages_key(tmp_path: Path) -> None:
    state = dict(timm_vit().state_dict())
    found = []
    for name, average in (("a", shifted(state)), ("b", shifted(shifted(state))), ("c", shifted(state))):
        torch.save({"model": state, "model_ema": average}, tmp_path / f"{name}.pth")
        checkpoint = read_checkpoint(tmp_path / f"{name}.pth")
        assert checkpoint.recognised is not None and checkpoint.recognised.prefix == "model_ema."
        found.append(checkpoint.fingerprint)
    assert found[0] != found[1] and found[0] == found[2]


def test_data2vecs_own_average_is_no_second_encoder() -> None:
    state = data2vec()
    teacher = {name: tensor + 1 for name, tensor in state.items() if "decoder" not in name}
    found = recognise({"model": {**state, "_ema": teacher}})
    assert found.prefix == "model." and torch.equal(
        found.tensors["cls_token"], state["modality_encoders.IMAGE.extra_tokens"]
    )


# --- models of timm by name


@pytest.mark.parametrize("beside", ["projector", "metric"])
@torch.no_grad()
def test_arch_finds_the_same_prefix(beside: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain: Any = timm.create_model("test_vit", num_classes=0).eval()
    other: Any = timm.create_model("test_vit2", num_classes=0).eval()
    torch.save({"state_dict": prefixed("net.vit.", plain.state_dict()) | BESIDE[beside]}, tmp_path / "a.ckpt")
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    architecture = choose_architecture(checkpoint, "test_vit")
    encoder = encoder_from(checkpoint, architecture)
    assert isinstance(encoder, Encoder)
    size = architecture.image_size
    images = torch.randn(1, 3, size, size)
    torch.testing.assert_close(
        encoder.eval().blocks(images, [6], final_norm=True)[0], plain.forward_features(images), rtol=0, atol=1e-5
    )
    (notice,) = checkpoint.notices(architecture)
    assert "left out" in notice and next(iter(BESIDE[beside])).partition(".")[0] in notice
    torch.save({"state_dict": prefixed("net.vit.", other.state_dict())}, tmp_path / "b.ckpt")
    wrong = read_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="does not fit test_vit"):
        encoder_from(wrong, choose_architecture(wrong, "test_vit"))


@torch.no_grad()
def test_backbones_of_timm_beside_others_and_twice(tmp_path: Path) -> None:
    name = "test_convnext"
    torch.manual_seed(0)
    online: Any = timm.create_model(name, num_classes=0).eval()
    momentum = shifted(online.state_dict())
    state = prefixed("backbone.", online.state_dict()) | prefixed("momentum_backbone.", momentum) | BESIDE["projector"]
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    architecture = BackboneArchitecture(name, 160)
    images = torch.randn(1, 3, 160, 160)
    expected = online.forward_intermediates(images, intermediates_only=True)[-1].flatten(2).transpose(1, 2)
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    backbone = encoder_from(checkpoint, architecture)
    assert isinstance(backbone, TimmBackbone)
    torch.testing.assert_close(backbone.eval().blocks(images, [backbone.depth])[0], expected, rtol=0, atol=1e-5)
    first, second = checkpoint.notices(architecture)
    assert "momentum_backbone" in first and "projector (2 tensors)" in second
    chosen = encoder_from(read_checkpoint(tmp_path / "a.ckpt", ReadingConfig(part="momentum")), architecture)
    assert isinstance(chosen, TimmBackbone)
    assert torch.equal(chosen.model.state_dict()["stem.0.weight"], momentum["stem.0.weight"])


@torch.no_grad()
def test_what_is_chosen_from_a_file_that_is_not_recognised_is_said(tmp_path: Path) -> None:
    vit: Any = timm.create_model("test_vit3", num_classes=0)
    student, teacher = vit.state_dict(), shifted(vit.state_dict())
    state = prefixed("student.", student) | prefixed("teacher.", teacher) | BESIDE["projector"]
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    assert checkpoint.recognised is None
    architecture = choose_architecture(checkpoint, "test_vit3")
    encoder = encoder_from(checkpoint, architecture)
    assert isinstance(encoder, Encoder) and torch.equal(encoder.vit.state_dict()["norm.bias"], teacher["norm.bias"])
    first, second = checkpoint.notices(architecture)
    assert "student" in first and "projector (2 tensors)" in second


def test_our_own_files_have_one_encoder(tmp_path: Path) -> None:
    from mimref.encoders.checkpoints import save_encoder
    from tests.checkpoints import load_encoder

    torch.save({"model": dict(mae_vit().state_dict())}, tmp_path / "a.pth")
    encoder, _ = load_encoder(tmp_path / "a.pth")
    assert isinstance(encoder, Encoder)
    save_encoder(tmp_path / "own.safetensors", encoder, {})
    checkpoint = read_checkpoint(tmp_path / "own.safetensors", ReadingConfig(part="teacher"))
    assert "--encoder teacher has no effect" in checkpoint.notices(choose_architecture(checkpoint))[0]
    assert checkpoint.fingerprint == read_checkpoint(tmp_path / "own.safetensors").fingerprint
