"""One training: parameter groups, learning rates, whole updates and micro-batches against plain loops in float64."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor

from mimref.config.run import EncoderConfig, ViewsConfig
from mimref.data.loader import ViewBatch
from mimref.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from mimref.draws import Operation, seeded, uniform
from mimref.encoders.vit import Architecture
from mimref.errors import Checks, DataError
from mimref.progress import Silent
from mimref.training.ema import WeightAverage
from mimref.training.run import TrainingRun
from mimref.transfer.finetune.plan import make_plan
from mimref.transfer.finetune.training import FineTuning
from tests.steps import DoublePhotometric
from tests.tiny import ARCHITECTURE, finetune_config, write_images, write_labelled, write_weights

CPU = torch.device("cpu")
TIMM = Architecture.from_config(EncoderConfig(arch="test_vit2", image_size=32))
REGISTERS = replace(ARCHITECTURE, registers=2, layer_scale=True, fixed_positions=False)
VECTORS = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("images"))


def make_job(
    folder: Path, data: Path, architecture: Architecture = ARCHITECTURE, *, double: bool = False, **changes: Any
) -> FineTuning:
    """A fine-tuning of a random encoder, with all weights perturbed so that the head is not close to zero."""
    weights = write_weights(folder / "encoder.safetensors", architecture=architecture)
    config = finetune_config(weights, data, **changes)
    plan = make_plan(config, Silent(), Checks())
    job = FineTuning(TrainingRun(config, folder / "out", None), plan, 0, [[] for _ in plan.splits])
    torch.manual_seed(4)
    for parameter in job.classifier.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    if double:
        job.classifier.double()
        flip = ViewsConfig(flip=config.augment.flip, color=False, blur=False)
        job.photometric = DoublePhotometric(flip, config.seed, CPU, mean=plan.transform.mean, std=plan.transform.std)
    if job.average is not None:
        job.average = WeightAverage(job.classifier, job.average.decay)
    return job


def run_updates(job: FineTuning, most: int | None = None) -> list[dict[str, tuple[float, float]]]:
    """Train and return the learning rate and weight decay of every parameter at every update."""
    found: list[dict[str, tuple[float, float]]] = []
    names = {id(parameter): name for name, parameter in job.classifier.named_parameters()}

    def look(*_: object) -> None:
        groups = job.optimizer.param_groups
        found.append({names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]})
        assert sum(len(group["params"]) for group in groups) == len(found[-1])

    job.optimizer.register_step_pre_hook(look)
    for batch in job.batches():
        job.update(batch)
        job.step += 1
        if job.step == most:
            break
    return found


def expected_scales(depth: int, *, extra: tuple[str, ...] = (), vectors: tuple[str, ...] = ()) -> dict[str, Any]:
    """(layer, decays) by parameter name; embeddings are layer 0. Tests add the head and its norm, layer depth + 1."""
    scales: dict[str, Any] = {"patch_embed.proj.weight": (0, True), "patch_embed.proj.bias": (0, False)}
    scales |= {name: (0, False) for name in extra}
    for block in range(depth):
        scales |= {f"blocks.{block}.{name}": (block + 1, False) for name in (*VECTORS, *vectors)}
        scales |= {f"blocks.{block}.{name}.weight": (block + 1, True) for name in LAYERS}
        scales |= {f"blocks.{block}.{name}.bias": (block + 1, False) for name in LAYERS}
    return {f"encoder.vit.{name}": value for name, value in scales.items()}


GROUPS: dict[str, tuple[Architecture, str, tuple[str, ...], tuple[str, ...], str]] = {
    "cls": (ARCHITECTURE, "cls", ("cls_token", "pos_embed"), (), "encoder.vit.norm"),
    "mean": (ARCHITECTURE, "mean", ("cls_token", "pos_embed"), (), "fc_norm"),
    "no norm": (replace(ARCHITECTURE, final_norm=False), "cls", ("cls_token", "pos_embed"), (), "fc_norm"),
    "no CLS": (replace(ARCHITECTURE, class_token=False), "cls", ("pos_embed",), (), "encoder.vit.norm"),
    "post-norm": (
        replace(ARCHITECTURE, post_norm=True),
        "cls",
        ("cls_token", "pos_embed", "norm_pre.weight", "norm_pre.bias"),
        (),
        "fc_norm",
    ),
    "registers": (
        REGISTERS,
        "cls",
        ("cls_token", "pos_embed", "reg_token"),
        ("ls1.gamma", "ls2.gamma"),
        "encoder.vit.norm",
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_and_rates_at_every_update(name: str, data: Path, tmp_path: Path) -> None:
    architecture, pool, extra, vectors, norm = GROUPS[name]
    job = make_job(tmp_path, data, architecture, finetune__pool=pool, finetune__layer_decay=0.6, finetune__epochs=2)
    before = {key: parameter.clone() for key, parameter in job.classifier.named_parameters()}
    found = run_updates(job)
    assert len(found) == 8
    scales = expected_scales(4, extra=extra, vectors=vectors)
    scales |= {f"{norm}.{part}": (5, False) for part in ("weight", "bias")}
    scales |= {"head.weight": (5, True), "head.bias": (5, False)}
    for update, rates in enumerate(found):
        peak = 1e-2 * 12 / 256
        # Four updates of warm-up, the first with a rate above 0, then four of a cosine to 0.
        rate = peak * (update + 1) / 5 if update < 4 else peak * (1 + math.cos(math.pi * (update - 4) / 4)) / 2
        assert rates.keys() == scales.keys()
        for key, (layer, decays) in scales.items():
            wanted = (rate * 0.6 ** (5 - layer), 0.05 if decays else 0.0)
            assert rates[key] == pytest.approx(wanted, rel=1e-9), (key, update)
    for key, parameter in job.classifier.named_parameters():
        # The encoder's own norm does not change if it is not used; all other parameters train.
        assert torch.equal(parameter, before[key]) == (key not in scales), key


def test_groups_are_timms(data: Path, tmp_path: Path) -> None:
    """The final norm is an exception: timm assigns it to the last block, while MAE and BEiT give it the head's rate."""
    job = make_job(tmp_path, data, finetune__layer_decay=0.6)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=2)
    groups: Any = param_groups_layer_decay(
        vit, weight_decay=0.05, no_weight_decay_list=vit.no_weight_decay(), layer_decay=0.6
    )
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    timms = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    ours = {id(p): (g["lr_scale"], g["weight_decay"]) for g in job.optimizer.param_groups for p in g["params"]}
    found = {
        name.removeprefix("encoder.vit."): ours[id(parameter)] for name, parameter in job.classifier.named_parameters()
    }
    assert found.keys() == timms.keys()
    for name in timms.keys() - {"norm.weight", "norm.bias"}:
        assert found[name] == (pytest.approx(timms[name][0], rel=1e-9), timms[name][1]), name


@pytest.mark.parametrize("frozen", [1, 4])
def test_frozen_blocks_and_what_feeds_them_stay(frozen: int, data: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, data, finetune__freeze_blocks=frozen, finetune__epochs=1)
    trained = run_updates(job)[0].keys()
    scales = expected_scales(4)
    gone = ("encoder.vit.patch_embed", *(f"encoder.vit.blocks.{block}." for block in range(frozen)))
    expected = {name for name in scales if not name.startswith(gone)}
    assert trained == expected | {"encoder.vit.norm.weight", "encoder.vit.norm.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_positions_train_if_they_should(learned: bool, train: bool, data: Path, tmp_path: Path) -> None:
    architecture = replace(ARCHITECTURE, fixed_positions=not learned)
    job = make_job(tmp_path, data, architecture, finetune__train_positions=train, finetune__epochs=1)
    assert ("encoder.vit.pos_embed" in run_updates(job, 1)[0]) == train
    assert job.plan.architecture.fixed_positions == (not learned and not train)


# --- a whole update


def plain_logits(job: FineTuning, weights: dict[str, Tensor], images: Tensor, samples: Tensor, epoch: int) -> Tensor:
    """Logits of a pre-norm encoder with a CLS token and stochastic depth, image by image and head by head."""

    def layer(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    vit = "encoder.vit."
    rate = job.config.finetune.drop_path
    draws = uniform(job.config.seed, epoch, Operation.DROP_PATH, samples, count=6).double()
    logits = []
    for row, image in enumerate(images):
        kernel = weights[f"{vit}patch_embed.proj.weight"].flatten(1)
        patches = torch.stack([image[:, y : y + 8, x : x + 8].flatten() for y in (0, 8) for x in (0, 8)])
        patches = patches @ kernel.T + weights[f"{vit}patch_embed.proj.bias"]
        x = torch.cat([weights[f"{vit}cls_token"][0], patches]) + weights[f"{vit}pos_embed"][0]
        for block in range(4):
            own, place = rate * block / 3, f"{vit}blocks.{block}."
            keep = [1.0, 1.0]
            if block:
                keep = [float(draws[row, 2 * block - 2 + branch] >= own) / (1 - own) for branch in range(2)]
            query, key, value = layer(norm(x, f"{place}norm1"), f"{place}attn.qkv").reshape(5, 3, 2, 16).unbind(1)
            heads = [
                (query[:, head] @ key[:, head].T / 4).softmax(-1) @ value[:, head]  # 4 is the root of 16
                for head in range(2)
            ]
            x = x + keep[0] * layer(torch.cat(heads, dim=1), f"{place}attn.proj")
            hidden = layer(norm(x, f"{place}norm2"), f"{place}mlp.fc1")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + keep[1] * layer(hidden, f"{place}mlp.fc2")
        logits.append(layer(norm(x[0], f"{vit}norm"), "head"))
    return torch.stack(logits)


def _cuts_odd_sides() -> bool:
    """Whether timm's CutMix cuts a one-pixel box from an image of two by two pixels (share 3/4)."""
    (top, bottom, _, _), _ = cutmix_bbox_and_lam((1, 3, 2, 2), 0.75)  # type: ignore[no-untyped-call]
    return bool(bottom > top)


def plain_loss(job: FineTuning, weights: dict[str, Tensor], batch: ViewBatch) -> Tensor:
    """Cross-entropy with soft targets after flipping, normalising, erasing, mixing and classifying."""
    seed, epoch, augment = job.config.seed, batch.epoch, job.config.augment
    # The images are normalised in single precision.
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    flips = uniform(seed, epoch, Operation.FLIP, batch.sample_B, torch.zeros_like(batch.sample_B))[:, 0]
    erase: Any = RandomErasing(augment.erase, mode="pixel", device="cpu")
    images = []
    for crop, sample, flip in zip(batch.crops[0][:, 0], batch.sample_B.tolist(), flips, strict=True):
        image = (crop.flip(-1) if flip < augment.flip else crop).float() / 255
        image = ((image - mean) / std).double()
        with seeded(seed, epoch, Operation.ERASE, sample) as number:
            torch.manual_seed(number)
            erase(image)
        images.append(image)
    with seeded(seed, epoch, Operation.MIX, job.step):
        cut = np.random.rand() < 0.5
        share = float(np.random.beta(*([augment.cutmix if cut else augment.mixup] * 2)))
        side = int(16 * np.sqrt(1 - share))
        at = [int(np.random.randint(0, 16)) for _ in range(2)] if cut else [0, 0]
    # Older versions of timm make boxes with odd sides a pixel too short.
    after = side - side // 2 if _cuts_odd_sides() else side // 2
    (top, left), (bottom, right) = ([max(0, c - side // 2) for c in at], [min(16, c + after) for c in at])
    if cut:
        share = 1 - (bottom - top) * (right - left) / 256
    mixed, targets, labels = [], [], job.label_N[batch.sample_B].tolist()
    for row, image in enumerate(images):
        other = row + 1 if row % 2 == 0 else row - 1
        other = other if other < len(images) else row
        mixture = image.clone() if cut else share * image + (1 - share) * images[other]
        if cut:
            mixture[:, top:bottom, left:right] = images[other][:, top:bottom, left:right]
        mixed.append(mixture)
        target = torch.full((2,), augment.smoothing / 2, dtype=torch.float64)
        target[labels[row]] += (1 - augment.smoothing) * share
        target[labels[other]] += (1 - augment.smoothing) * (1 - share)
        targets.append(target)
    logits = plain_logits(job, weights, torch.stack(mixed), batch.sample_B, epoch)
    return -(torch.stack(targets) * logits.log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("images", [12, 7])
def test_updates_in_a_plain_loop(images: int, data: Path, tmp_path: Path) -> None:
    """Loss, weights and averaged weights after three AdamW updates; rates and decays are tested above."""
    job = make_job(tmp_path, data, double=True, batch_size=images, finetune__epochs=1, finetune__layer_decay=0.6)
    weights = {key: x.detach().clone() for key, x in job.classifier.named_parameters()}
    average = {key: x.clone() for key, x in weights.items()}
    moments = {key: (torch.zeros_like(x), torch.zeros_like(x)) for key, x in weights.items()}
    rates: list[dict[str, tuple[float, float]]] = []
    names = {id(parameter): name for name, parameter in job.classifier.named_parameters()}

    def look(*_: object) -> None:
        groups = job.optimizer.param_groups
        rates.append({names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]})

    job.optimizer.register_step_pre_hook(look)
    for batch in list(job.batches())[:3]:
        leaves = {key: x.clone().requires_grad_() for key, x in weights.items()}
        loss = plain_loss(job, leaves, batch)
        loss.backward()
        job.update(batch)
        job.step += 1
        assert float(job.values()["loss"]) == pytest.approx(loss.item(), rel=1e-6)  # type: ignore[arg-type]
        for key, weight in weights.items():
            (lr, decay), gradient, (first, second) = rates[-1][key], leaves[key].grad, moments[key]
            assert gradient is not None
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient**2)
            corrected = (first / (1 - 0.9**job.step)) / ((second / (1 - 0.999**job.step)).sqrt() + 1e-8)
            weight.mul_(1 - lr * decay).sub_(lr * corrected)
            average[key].mul_(0.5).add_(0.5 * weight)
    for key, parameter in job.classifier.named_parameters():
        torch.testing.assert_close(parameter.data, weights[key], rtol=1e-8, atol=1e-10, msg=key)
    for key, parameter in job.result().named_parameters():
        torch.testing.assert_close(parameter.data, average[key], rtol=1e-8, atol=1e-10, msg=key)


def gradients_of(job: FineTuning, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = job.forward_backward(batch, len(batch.sample_B))
    found = {name: x.grad.clone() for name, x in job.classifier.named_parameters() if x.grad is not None}
    job.optimizer.zero_grad(set_to_none=True)
    return loss, found


@pytest.mark.parametrize(
    "changes",
    [{"micro_batch": 5}, {"micro_batch": 1}, {"micro_batch": 100}, {"activation_checkpointing": True}],
    ids=str,
)
def test_micro_batches_and_recomputing_give_the_same_gradients(
    changes: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path, data, double=True)
    batches = list(job.batches())[:4]
    other = make_job(tmp_path, data, double=True, **changes)
    for batch in batches:
        (loss, expected), (other_loss, found) = gradients_of(job, batch), gradients_of(other, batch)
        torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)  # summed in single precision
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_the_head_starts_almost_uniform(data: Path, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "encoder.safetensors")
    config = finetune_config(weights, data)
    plan = make_plan(config, Silent(), Checks())
    job = FineTuning(TrainingRun(config, tmp_path / "out", None), plan, 0, [[]])
    loss = job.forward_backward(next(job.batches()), 12)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-3)
    stored = load_file(weights)
    assert all(torch.equal(x, stored[name]) for name, x in job.classifier.encoder.vit.state_dict().items())


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("kind", [{"channels": 1}, {"post_norm": True}, {"registers": 2, "layer_scale": True}], ids=str)
def test_half_precision_is_close(kind: dict[str, Any], pool: str, data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"finetune__pool": pool, "activation_checkpointing": True}
    full, half = (
        make_job(tmp_path, data, replace(ARCHITECTURE, **kind), precision=precision, **changes)
        for precision in ("fp32", "bf16")
    )
    batch = next(full.batches())
    (loss, expected), (half_loss, found) = gradients_of(full, batch), gradients_of(half, batch)
    assert float(half_loss) == pytest.approx(float(loss), rel=0.05) and half_loss.dtype == torch.float32
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 0.1 * whole and found[name].dtype == torch.float32, name


# --- validation


def test_accuracy_is_sklearns(tmp_path: Path) -> None:
    classes = list("abcdefg")
    write_images(tmp_path / "data", per_class=4, classes=classes, split="train")
    write_images(tmp_path / "data", per_class=9, classes=classes, split="val")
    (tmp_path / "data" / "val" / "c" / "003.png").write_bytes(b"no image")
    job = make_job(tmp_path, tmp_path / "data", data__max_bad=1, finetune__ema="none")
    job.classifier.head.weight.data.normal_()
    scores = job.validate()
    plan = job.plan
    rows = [row for row in range(63) if row != 2 * 9 + 3]
    crops = torch.stack([plan.transform.crop(plan.val.read(row)) for row in rows])
    assert scores.images == 62 and [path for path, _ in scores.bad] == [str(tmp_path / "data/val/c/003.png")]
    with torch.inference_mode():
        logits = job.result().eval()(plan.transform.normalize(crops)).numpy()
    truth = plan.val_labels[rows]
    assert scores.top1 == pytest.approx(100 * accuracy_score(truth, logits.argmax(1)))
    assert scores.top5 == pytest.approx(100 * top_k_accuracy_score(truth, logits, k=5, labels=range(7)))
    shares = [top_k_accuracy_score(truth, logits, k=k, labels=range(7)) for k in (1, 4, 5, 6)]
    assert len(set(shares)) == 4


def test_no_readable_validation_image_is_an_error(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data")
    job = make_job(tmp_path, data)
    for image in (data / "val").rglob("*.png"):
        image.write_bytes(b"no image")
    with pytest.raises(DataError, match="val"):
        job.validate()


def test_training_goes_on_in_training_mode_after_validation(data: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, data, finetune__ema="none")
    job.validate()
    assert all(module.training for module in job.classifier.modules())
    assert job.result() is job.classifier


def test_timms_own_model_trains_but_for_its_pooling(data: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, data, TIMM, finetune__epochs=1)
    before = {key: parameter.clone() for key, parameter in job.classifier.named_parameters()}
    run_updates(job)
    still = [key for key, x in job.classifier.named_parameters() if torch.equal(x, before[key])]
    assert still == ["encoder.vit.fc_norm.weight", "encoder.vit.fc_norm.bias"]
