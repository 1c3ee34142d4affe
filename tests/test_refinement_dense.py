"""The dense term against plain loops in float64, in a step, and in whole runs."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimref.benchmarks.flops import model_flops
from mimref.benchmarks.stage import ready_stage, resolve_encoder, synthetic_batch
from mimref.cli import run
from mimref.data.views import CropGroup
from mimref.encoders.backbones import patch_shapes
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import ConfigError, Interrupted
from mimref.refinement.dense import DenseTerm, cka_distance, gram_difference
from mimref.refinement.memory import largest_micro_batch
from mimref.refinement.method import Method, monitored_values
from mimref.refinement.plan import Plan, make_plan
from mimref.refinement.run import refine
from mimref.refinement.sizes import describe, state_bytes
from mimref.refinement.stages import EncoderStage
from tests.families import FAMILIES, backbone, write_backbone
from tests.steps import DENSE_WEIGHT, IMAGES, make_batch, make_step, other_weights, weights
from tests.test_benchmarks_step import DEPTH, IMAGE, PATCH, WIDTH, embedding, encoder_forward, tiny
from tests.tiny import REFINE, arguments, assert_same_run, refine_config, signal_at, write_labelled, write_weights

Distance = Callable[[Tensor, Tensor], Tensor]
DISTANCES: dict[str, Distance] = {"gram": gram_difference, "cka": cka_distance}


def random_tokens(images: int = 3, patches: int = 5, width: int = 7, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # A mean away from zero, which centring has to remove.
    return 0.7 + torch.randn(images, patches, width, generator=generator, dtype=torch.float64)


# ---- Plain loops: one pair of patches at a time.


def dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([x * y for x, y in zip(a, b, strict=True)]).sum()


def plain_gram(student: Tensor, base: Tensor) -> Tensor:
    """Return the distance `gram` of one image with tokens (P, D) and (P, E)."""

    def cosine(tokens: Tensor, i: int, j: int) -> Tensor:
        return dot(tokens[i], tokens[j]) / (dot(tokens[i], tokens[i]).sqrt() * dot(tokens[j], tokens[j]).sqrt())

    patches = range(len(student))
    squares = [(cosine(student, i, j) - cosine(base, i, j)) ** 2 for i in patches for j in patches]
    return torch.stack(squares).sum() / len(student) ** 2


def plain_cka(student: Tensor, base: Tensor) -> Tensor:
    """Return the distance `cka`, by HSIC and the centring matrix H (Kornblith et al. 2019, Eq. 3 and 4)."""
    count = len(student)
    centring = torch.eye(count, dtype=torch.float64) - 1 / count

    def hsic(x: Tensor, y: Tensor) -> Tensor:
        kernels = (torch.stack([torch.stack([dot(a, b) for b in z]) for a in z]) for z in (x, y))
        k, other = kernels
        return torch.trace(k @ centring @ other @ centring) / (count - 1) ** 2

    return 1 - hsic(student, base) / (hsic(student, student) * hsic(base, base)).sqrt()


PLAIN: dict[str, Distance] = {"gram": plain_gram, "cka": plain_cka}


@pytest.mark.parametrize("kind", ["gram", "cka"])
@pytest.mark.parametrize(("patches", "width", "other"), [(5, 7, 7), (6, 3, 4), (3, 4, 4)])
def test_distances_and_gradients_equal_plain_loops(kind: str, patches: int, width: int, other: int) -> None:
    base = random_tokens(3, patches, other, seed=1)
    student, again = (random_tokens(3, patches, width).requires_grad_() for _ in range(2))
    weight_N = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = DISTANCES[kind](student, base)
    expected = torch.stack([PLAIN[kind](one, two) for one, two in zip(again, base, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    (found * weight_N).sum().backward()
    (expected * weight_N).sum().backward()
    torch.testing.assert_close(student.grad, again.grad, rtol=1e-9, atol=1e-12)
    assert bool((found > 0).all()) and float(student.grad.norm()) > 1e-3  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["gram", "cka"])
def test_gradients_equal_finite_differences(kind: str) -> None:
    student, base = random_tokens(2, 4, 3).requires_grad_(), random_tokens(2, 4, 3, seed=1)
    assert torch.autograd.gradcheck(lambda tokens: DISTANCES[kind](tokens, base), (student,))


def test_cka_ignores_rotations_scale_and_what_all_patches_share() -> None:
    student, base = random_tokens(), random_tokens(seed=1)
    rotation = torch.linalg.qr(random_tokens(1, 7, 7, seed=2)[0])[0]
    expected = cka_distance(student, base)
    for changed in (student @ rotation, 3.7 * student, student + random_tokens(1, 1, 7, seed=3)):
        torch.testing.assert_close(cka_distance(changed, base), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(cka_distance(changed, student), torch.zeros(3).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(cka_distance(base, changed), expected, rtol=1e-10, atol=1e-12)
    assert bool(((expected > 0.1) & (expected < 1)).all())


def test_gram_ignores_rotations_and_the_length_of_every_token() -> None:
    student, base = random_tokens(), random_tokens(seed=1)
    rotation = torch.linalg.qr(random_tokens(1, 7, 7, seed=2)[0])[0]
    lengths = random_tokens(3, 5, 1, seed=3).abs() + 0.1
    for changed in (student @ rotation, student * lengths):
        torch.testing.assert_close(gram_difference(changed, base), gram_difference(student, base))
    # Opposite patches are as far apart as possible: the kernels differ by 2 outside two squares.
    base = torch.ones(1, 4, 2, dtype=torch.float64)
    opposite = base * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)[:, None]
    assert float(gram_difference(opposite, base)) == pytest.approx(4 * 8 / 16)


@pytest.mark.parametrize("kind", ["gram", "cka"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_tokens_have_neither_distance_nor_gradient(kind: str, dtype: torch.dtype) -> None:
    tokens = random_tokens().to(dtype).requires_grad_()
    found = DISTANCES[kind](tokens, tokens.detach())
    found.sum().backward()
    assert found.tolist() == [0.0] * 3 and tokens.grad is not None and not tokens.grad.any()


@pytest.mark.parametrize("kind", ["gram", "cka"])
def test_patches_without_differences_give_finite_gradients(kind: str) -> None:
    for student, base in ((torch.zeros(2, 4, 3), random_tokens(2, 4, 3).float()),
                          (random_tokens(2, 4, 3).float(), torch.ones(2, 4, 3)),
                          (torch.ones(2, 4, 3), torch.ones(2, 4, 3))):  # fmt: skip
        student.requires_grad_()
        found = DISTANCES[kind](student, base)
        found.sum().backward()
        assert bool(found.isfinite().all()) and student.grad is not None and bool(student.grad.isfinite().all())


def test_half_precision_is_compared_in_single() -> None:
    encoder = make_step().encoder
    for kind in ("gram", "cka"):
        term = DenseTerm(encoder, 4, kind)  # type: ignore[arg-type]
        student, base = random_tokens().bfloat16(), random_tokens(seed=1).bfloat16()
        found = term.distance(student, base)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, DISTANCES[kind](student.float(), base.float()))
        assert term.distance(student.double(), base.double()).dtype is torch.float64


# ---- In a step.


def plain_dense(step: Method, kind: str, *, local_views: int) -> tuple[Tensor, Tensor]:
    """Return the mean over images and global views, and its gradients, computed view by view and image by image."""
    assert step.dense is not None
    batch, terms = make_batch(local_views=local_views), []
    for view in (0, 1):
        images = step.photometric(batch.crops[0][:, view : view + 1], 0, batch.sample_B, [view])[0]
        found = []
        for encoder in (step.encoder, step.dense.base):
            tokens = encoder.embed(images)
            last = step.wanted[-1]
            for block in encoder.vit.blocks[:last]:
                tokens = block(tokens)
            found.append((encoder.vit.norm(tokens) if last == 4 else tokens)[:, encoder.num_prefix_tokens :])
        terms += [PLAIN[kind](one, two) for one, two in zip(*found, strict=True)]
    assert len(terms) == 2 * IMAGES
    loss = torch.stack(terms).mean()
    step.encoder.zero_grad()
    loss.backward()
    return loss.detach(), gradients(step)


def gradients(step: Method) -> Tensor:
    return torch.cat([p.grad.flatten() for p in step.encoder.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["gram", "cka"])
@pytest.mark.parametrize(("blocks", "post_norm"), [([4, 2, 3], False), ([1, 2, 1], False), ([3, 4, 2], True)])
def test_a_step_adds_the_weighted_mean_over_images_and_global_views(
    kind: str, blocks: list[int], post_norm: bool
) -> None:
    without, step = (make_step(blocks, post_norm=post_norm, dense=dense) for dense in ("none", kind))
    batch = make_batch()
    plain = without.forward_backward(batch, weights(3), top_k=3, train_encoder=True)
    values = step.forward_backward(batch, weights(3), top_k=3, train_encoder=True)
    found, nna = gradients(step), gradients(without)
    dense, gradient = plain_dense(step, kind, local_views=2)
    assert values.dense is not None and plain.dense is None
    torch.testing.assert_close(values.dense.detach(), dense, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values.loss, plain.loss + DENSE_WEIGHT * dense, rtol=1e-9, atol=1e-12)
    difference = (found - nna - DENSE_WEIGHT * gradient).norm()
    assert difference < 1e-8 * DENSE_WEIGHT * gradient.norm()
    # What the heads see does not change.
    assert torch.equal(step.queue.rows_HQO, without.queue.rows_HQO)
    heads = zip(step.heads.parameters(), without.heads.parameters(), strict=True)
    assert all(torch.equal(one.grad, two.grad) for one, two in heads)  # type: ignore[arg-type]


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("registers", [0, 3])
def test_only_patches_are_compared(class_token: bool, registers: int) -> None:
    architecture = Architecture(
        "custom", image_size=8, width=32, depth=4, num_heads=2, patch_size=4, class_token=class_token,
        registers=registers,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = build_encoder(architecture)
    term = DenseTerm(other_weights(encoder.double()), 4, "gram")
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    patches = term.base_patches(images)
    assert patches.shape == (3, 4, 32) and not patches.requires_grad
    tokens = term.base.blocks(images, [4], final_norm=True)[0]
    assert torch.equal(patches, tokens[:, class_token + registers :])
    assert patch_shapes(architecture, [4], 8) == {4: (4, 32)} and patch_shapes(architecture, [2], 4) == {2: (1, 32)}


@pytest.mark.parametrize("name", ["swin", "hiera", "convnextv2", "eva", "gray"])
def test_positions_of_a_feature_map_are_patches(name: str) -> None:
    encoder = backbone(FAMILIES[name])
    images = torch.randn(2, encoder.architecture.channels, 32, 32)
    for block in (1, encoder.depth):
        term = DenseTerm(encoder, block, "cka")
        patches = term.base_patches(images)
        tokens = encoder.blocks(images, [block], final_norm=encoder.architecture.has_final_norm)[0].detach()
        assert torch.equal(patches, tokens[:, encoder.num_prefix_tokens :])
        assert patch_shapes(encoder.architecture, [block], 32) == {block: tuple(patches.shape[1:])}
        assert patches.shape[2] == encoder.widths[block - 1] and math.isqrt(patches.shape[1]) ** 2 == patches.shape[1]
        assert term.distance(2 * patches + 1, patches).tolist() == pytest.approx([0, 0], abs=1e-5)


def test_stage_1_has_no_dense_term() -> None:
    without, step = make_step(), make_step(dense="gram")
    batch = make_batch()
    for each in (without, step):
        values = each.forward_backward(batch, weights(3), top_k=3, train_encoder=False)
        assert values.dense is None and "dense_loss" not in monitored_values(values, None)
    assert torch.equal(step.queue.rows_HQO, without.queue.rows_HQO)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_logged_term_has_no_weight(micro_batch: int | None) -> None:
    step, without = make_step(dense="cka"), make_step()
    step.micro_batch = without.micro_batch = micro_batch
    batch = make_batch()
    found, plain = (
        monitored_values(each.forward_backward(batch, weights(3), top_k=3, train_encoder=True), None)
        for each in (step, without)
    )
    dense, loss, nna = found["dense_loss"], found["loss"], plain["loss"]
    assert isinstance(dense, float) and isinstance(loss, float) and isinstance(nna, float)
    assert loss == pytest.approx(nna + DENSE_WEIGHT * dense) and 1e-3 < dense < 1
    assert list(found) == ["loss", "dense_loss", *list(plain)[1:]]


def test_the_base_runs_without_gradient_and_once_per_part(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(dense="gram")
    step.micro_batch = 2
    assert step.dense is not None
    seen: list[tuple[int, bool]] = []
    base = step.dense.base
    base.vit.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    step.forward_backward(make_batch(), weights(3), top_k=3, train_encoder=True)
    # 5 images in parts of 2, 2 and 1, each with two global views.
    assert seen == [(4, False), (4, False), (2, False)]
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())


# ---- Whole runs.


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("dense")
    return write_weights(folder / "base.safetensors"), write_labelled(folder / "data")


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "micro_batch"), [("gram", None), ("cka", 5)])
def test_a_resumed_run_is_the_same_to_the_bit(
    kind: str, micro_batch: int | None, paths: tuple[Path, Path], tmp_path: Path
) -> None:
    changes = {"loss__dense": kind, "loss__dense_weight": 5.0, "micro_batch": micro_batch, "monitor__log_every": 1}
    config = refine_config(*paths, **changes)
    refine(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        refine(config, tmp_path / "parts", listener=signal_at(13))
    refine(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    steps = [line for line in log(tmp_path / "whole") if "loss" in line]
    assert [("dense_loss" in line) for line in steps] == [line["stage"] == "encoder" for line in steps]
    first, *later = [line["dense_loss"] for line in steps if line["stage"] == "encoder"]
    # The first update starts from the base itself.
    assert first == 0 and all(value > 0 for value in later)


def test_a_hierarchical_backbone_keeps_its_maps_in_parts_as_well(paths: tuple[Path, Path], tmp_path: Path) -> None:
    weights = write_backbone(tmp_path / "base.safetensors", FAMILIES["convnextv2"])
    changes = {"heads__blocks": "3-4", "loss__dense": "cka", "heads_stage__epochs": 1, "encoder_stage__epochs": 1}
    changes |= {"monitor__log_every": 1, "views__local_size": 16}
    for name, micro_batch in (("whole", None), ("parts", 5)):
        refine(refine_config(weights, paths[1], **changes, micro_batch=micro_batch), tmp_path / name)
    whole, parts = (log(tmp_path / name) for name in ("whole", "parts"))
    found = [(line["dense_loss"], other["dense_loss"]) for line, other in zip(whole, parts, strict=True)
             if "dense_loss" in line]  # fmt: skip
    assert len(found) == 4 and found[0] == (0, 0) and found[-1][0] > 0
    for one, other in found:
        assert other == pytest.approx(one, rel=1e-2, abs=1e-7)
    # The last map has a single position at 8 pixels.
    with pytest.raises(ConfigError, match=r"loss\.dense 'cka' .* block 4 has 1 at 8 pixels"):
        make_plan(refine_config(weights, paths[1], **changes | {"views__global_size": 8, "views__local_size": 8}))


# ---- Settings, sizes and cost.


def test_settings_that_cannot_be(paths: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = REFINE | {"encoder.weights": paths[0], "data.spec": paths[1]}
    for changes, named in (
        ({"loss.dense_weight": 0}, "loss.dense_weight"),
        ({"loss.dense_weight": -1}, "loss.dense_weight"),
        ({"loss.dense": "cosine"}, "loss.dense"),
    ):
        assert run(arguments("refine", tmp_path / "out", given | changes)) == 2
        error = capsys.readouterr().err
        assert named in error and len(error.splitlines()) == 1
    # A single patch of 8 pixels cannot be compared with any other.
    single = refine_config(*paths, loss__dense="cka", views__global_size=8)
    with pytest.raises(ConfigError, match=r"loss\.dense 'cka' .* block 4 has 1 at 8 pixels.*global_size"):
        make_plan(single)
    assert make_plan(refine_config(*paths, views__global_size=8)).warnings == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loss__dense": "gram", "stage": "heads"}, "loss.dense 'gram'"),
        ({"loss__dense": "gram", "encoder_stage__epochs": 0}, "loss.dense 'gram'"),
        ({"loss__dense_weight": 3.0}, "loss.dense_weight 3"),
    ],
)
def test_settings_without_effect_are_reported(changes: dict[str, Any], named: str, paths: tuple[Path, Path]) -> None:
    plan = make_plan(refine_config(*paths, **changes))
    assert [warning.startswith(f"{named} has no effect") for warning in plan.warnings] == [True]
    assert "dense term" not in describe(plan)


def test_a_dry_run_names_the_term_and_counts_the_base(paths: tuple[Path, Path]) -> None:
    plans = [make_plan(refine_config(*paths, loss__dense=dense)) for dense in ("none", "gram")]
    sizes = [state_bytes(plan.config, plan.architecture, plan.blocks, "encoder") for plan in plans]
    facts = [describe(plan) for plan in plans]
    assert "dense term" not in facts[0] and facts[1]["dense term"].startswith("gram, weight 1, on the 4 patches of ")
    assert facts[1]["memory"].startswith(f"{sizes[1].total / 2**20:.1f} MiB") and "base" in facts[1]["memory"]
    # 12 images, two views, four patches of width 32.
    assert (sizes[0].base, sizes[0].tokens) == (0, 0) and sizes[1].tokens == 4 * 12 * 2 * 4 * 32
    assert sizes[1].base == sizes[1].average and sizes[1].total == sizes[0].total + sizes[1].base + sizes[1].tokens
    config = plans[1].config.model_copy(update={"micro_batch": 5})
    assert state_bytes(config, plans[1].architecture, [3, 4], "encoder").tokens == 4 * 5 * 2 * 4 * 32
    assert state_bytes(config, plans[1].architecture, [3, 4], "heads").base == 0


def test_the_bases_pass_counts_as_work() -> None:
    config = tiny(loss__dense="gram")
    architecture, blocks = resolve_encoder(config)
    views = tiny(views__local_views=0)
    once = encoder_forward(views, DEPTH) + embedding(views)
    expected = model_flops(tiny(), architecture, blocks, "encoder") + once
    assert model_flops(config, architecture, blocks, "encoder") == expected
    assert model_flops(config, architecture, blocks, "heads") == model_flops(tiny(), architecture, blocks, "heads")
    assert patch_shapes(architecture, [4], IMAGE) == {4: ((IMAGE // PATCH) ** 2, WIDTH)}


def test_stage_2_has_a_base_of_its_own() -> None:
    with ready_stage(tiny(loss__dense="cka"), "encoder") as (job, _):
        assert isinstance(job, EncoderStage) and job.method.dense is not None
        base, encoder = job.method.dense.base, job.method.encoder
        before = {name: value.clone() for name, value in base.state_dict().items()}
        trained = {id(parameter) for group in job.optimizer.param_groups for parameter in group["params"]}
        assert not trained & {id(parameter) for parameter in base.parameters()} and not base.training
        assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
        batch = synthetic_batch(job)
        for _ in range(2):
            job.update(batch)
            job.step += 1
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
        moved = [not torch.equal(value, before[name]) for name, value in encoder.state_dict().items()]
        assert any(moved) and math.isfinite(float(job.values()["dense_loss"]))  # type: ignore[arg-type]
    for config, stage in ((tiny(), "encoder"), (tiny(loss__dense="cka"), "heads")):
        with ready_stage(config, stage) as (job, _):  # type: ignore[arg-type]
            assert job.method.dense is None


def test_a_trial_of_memory_has_the_dense_term(monkeypatch: pytest.MonkeyPatch, paths: tuple[Path, Path]) -> None:
    plan = make_plan(refine_config(*paths, loss__dense="gram"))
    seen: list[DenseTerm | None] = []

    def note(method: Method, groups: list[CropGroup], *_: Any, **__: Any) -> None:
        seen.append(method.dense)

    monkeypatch.setattr("mimref.refinement.memory.try_step", note)
    step = make_step()
    assert largest_micro_batch(step, plan, 12, reserve=0) == 12
    assert step.dense is None and seen[0] is not None and seen[0].base is step.encoder and seen[0].block == 4
    assert all(p.requires_grad for n, p in step.encoder.named_parameters() if n != "vit.pos_embed")
    for changes in ({"loss__dense": "none"}, {"loss__dense": "gram", "stage": "heads"}):
        other: Plan = make_plan(refine_config(*paths, **changes))
        largest_micro_batch(step, other, 12, reserve=0)
        assert seen.pop() is None
