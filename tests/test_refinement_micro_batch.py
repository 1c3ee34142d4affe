"""Micro-batches, activation checkpointing and compilation: the same step with less memory or time."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimref.cli import run
from mimref.config.load import load_config
from mimref.data.views import CropGroup
from mimref.encoders.vit import Encoder
from mimref.errors import Checks, ConfigError
from mimref.progress import Silent
from mimref.refinement.config import RefineConfig
from mimref.refinement.memory import check_exact, choose_micro_batch, half, largest_that_fits, try_step
from mimref.refinement.method import Method
from mimref.refinement.norms import NORMS, Norm
from mimref.refinement.plan import make_plan
from mimref.refinement.run import refine
from tests.steps import IMAGES, make_batch, make_step, weights
from tests.tiny import REFINE, arguments, header, refine_config, results, tensors, write_labelled, write_weights

AUTO_WITH_BATCHNORM = (
    "micro_batch auto: whole batches, since the encoder has BatchNorm layers, whose statistics span the batch"
)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def gradients(step: Method) -> Tensor:
    """Return all gradients in one vector."""
    modules: list[nn.Module] = [step.encoder, step.heads]
    parts = [p.grad.flatten() for module in modules for p in module.parameters() if p.grad is not None]
    return torch.cat(parts)


def learn(step: Method, *, train_encoder: bool = True, local_views: int = 2, top_k: int = 3) -> float:
    batch = make_batch(local_views=local_views)
    weight_H = weights(len(step.block_of_head)).to(next(step.heads.parameters()).dtype)
    values = step.forward_backward(batch, weight_H, top_k=top_k, train_encoder=train_encoder)
    return float(values.loss.detach())


VARIANTS: list[dict[str, Any]] = [
    {},
    {"blocks": [4, 2, 4]},
    {"direction": "prediction", "swap_negatives": True},
    {"pool": "mean", "post_norm": True},
    {"dense": "gram"},
    {"dense": "cka", "blocks": [2, 3, 1]},
    {"norm": "layer"},
    {"norm": "running"},
]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, IMAGES, 99])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("local_views", [0, 2])
def test_gradients_are_those_of_one_pass(micro_batch: int, variant: dict[str, Any], local_views: int) -> None:
    whole, parts = make_step(**variant), make_step(**variant)
    parts.micro_batch = micro_batch
    for _ in range(2):  # gradients add up, and the queue moves on
        expected, found = learn(whole, local_views=local_views), learn(parts, local_views=local_views)
        assert found == pytest.approx(expected, rel=1e-12)
    difference = (gradients(parts) - gradients(whole)).norm() / gradients(whole).norm()
    assert difference < 1e-9
    torch.testing.assert_close(parts.queue.rows_HQO, whole.queue.rows_HQO, rtol=1e-12, atol=1e-12)
    assert torch.equal(parts.queue.sample_Q, whole.queue.sample_Q)
    for found_buffer, buffer in zip(parts.heads.buffers(), whole.heads.buffers(), strict=True):
        torch.testing.assert_close(found_buffer, buffer, rtol=1e-12, atol=1e-12)


def test_gradients_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.steps.DoublePhotometric.__call__", _single)
    whole, parts = (_as_float(make_step()) for _ in range(2))
    parts.micro_batch = 2
    assert learn(whole) == pytest.approx(learn(parts), rel=5e-6)  # sums of other sizes round differently
    modules = zip([*whole.encoder.parameters(), *whole.heads.parameters()],
                  [*parts.encoder.parameters(), *parts.heads.parameters()], strict=True)  # fmt: skip
    total = gradients(whole).norm()
    for expected, found in modules:
        if expected.grad is not None and found.grad is not None:
            # 1.2e-5 has been seen with two threads: sums are split by the batch size.
            assert (found.grad - expected.grad).norm() / total < 1e-4


def _single(self: Any, *args: Any) -> Tensor:
    from mimref.data.views import Photometric

    return Photometric.__call__(self, *args)


def _as_float(step: Method) -> Method:
    step.encoder.float()
    step.heads.float()
    step.queue.rows_HQO = step.queue.rows_HQO.float()
    return step


def test_frozen_blocks_and_the_frozen_encoder() -> None:
    whole, parts = make_step(), make_step()
    parts.micro_batch = 2
    for step in (whole, parts):
        for block in step.encoder.vit.blocks[:2]:
            block.requires_grad_(False)
        learn(step)
    assert (gradients(parts) - gradients(whole)).norm() / gradients(whole).norm() < 1e-9
    assert all(p.grad is None for p in parts.encoder.vit.blocks[0].parameters())
    frozen, frozen_parts = make_step(), make_step()
    frozen_parts.micro_batch = 2
    expected, found = learn(frozen, train_encoder=False), learn(frozen_parts, train_encoder=False)
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(p.grad is None for p in frozen_parts.encoder.parameters())


def test_no_pass_holds_more_than_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    blocks = Encoder.blocks

    def counting(self: Encoder, images: Tensor, *args: Any, **options: Any) -> list[Tensor]:
        seen.append((len(images), torch.is_grad_enabled()))
        return blocks(self, images, *args, **options)

    monkeypatch.setattr(Encoder, "blocks", counting)
    step = make_step()
    step.micro_batch = 2
    learn(step)
    # 5 images in parts of 2, 2 and 1, each with 2 global and 2 local views, without and then with gradient.
    assert seen == [(size, grad) for grad in (False, True) for size in (4, 4, 4, 4, 2, 2)]
    seen.clear()
    learn(step, train_encoder=False)
    assert seen == [(size, False) for size in (4, 4, 4, 4, 2, 2)]


class Saved:
    """Counts the bytes that autograd keeps for the backward pass besides the weights: currently, and at most."""

    def __init__(self, step: Method) -> None:
        self.now = self.most = 0
        modules: list[nn.Module] = [step.encoder, step.heads]
        self.weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}

    def pack(self, tensor: Tensor) -> "_Held":
        is_weight = tensor.untyped_storage().data_ptr() in self.weights
        size = 0 if is_weight else tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        held = _Held(tensor)
        weakref.finalize(held, self._free, size)
        return held

    def _free(self, size: int) -> None:
        self.now -= size


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(step: Method, images: int) -> int:
    saved = Saved(step)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        batch = make_batch(range(images))
        step.forward_backward(batch, weights(len(step.block_of_head)), top_k=3, train_encoder=True)
    return saved.most


def test_memory_follows_the_micro_batch() -> None:
    step = make_step()
    small, large = saved_bytes(step, 4), saved_bytes(step, 32)
    step.micro_batch = 4
    parts = saved_bytes(step, 32)
    assert large > 6 * small
    assert parts < 1.15 * small


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_activation_checkpointing(micro_batch: int | None) -> None:
    plain, again = make_step(), make_step()
    again.micro_batch, again.encoder.checkpointing = micro_batch, True
    calls = []
    again.encoder.vit.blocks[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    assert learn(plain) == pytest.approx(learn(again), rel=1e-12)
    assert (gradients(again) - gradients(plain)).norm() / gradients(plain).norm() < 1e-12
    # Two view sizes, forward and again in the backward pass; without gradient nothing is computed twice.
    assert len(calls) == (4 if micro_batch is None else 3 * (2 + 4))
    assert saved_bytes(again, 8) < saved_bytes(make_step(), 8)


# --- what fits


def test_the_largest_that_fits() -> None:
    tried: list[int] = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > 13:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert largest_that_fits(attempt, 100) == 13 and tried == [100, 50, 25, 13]
    assert largest_that_fits(attempt, 5) == 5

    def never(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ConfigError, match="out of memory with a single image per encoder pass; lower batch_size"):
        largest_that_fits(never, 4)
    assert [half(size) for size in (2, 3, 12)] == [1, 2, 6]
    with pytest.raises(ConfigError, match="out of memory with a single image per encoder pass"):
        half(1)


@pytest.mark.parametrize("norm", NORMS)
def test_a_trial_leaves_nothing_behind(norm: Norm) -> None:
    step, untouched = make_step(norm=norm), make_step(norm=norm)
    try_step(step, [CropGroup(2, 8, (0.5, 1.0)), CropGroup(2, 4, (0.1, 0.5))], 6, 4)
    assert step.micro_batch is None and all(p.grad is None for p in step.encoder.parameters())
    assert learn(step) == learn(untouched)
    assert torch.equal(gradients(step), gradients(untouched))
    for found, expected in zip(step.heads.buffers(), untouched.heads.buffers(), strict=True):
        assert torch.equal(found, expected)


def test_encoders_whose_parts_are_not_the_whole() -> None:
    check_exact(make_step().encoder)
    with pytest.raises(ConfigError, match="micro_batch: the encoder has BatchNorm layers"):
        check_exact(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with pytest.raises(ConfigError, match="micro_batch: the encoder has dropout"):
        check_exact(nn.Sequential(nn.Dropout(0.1)))


# --- whole runs


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("micro")
    return write_weights(folder / "base.safetensors"), write_labelled(folder / "data")


def test_a_run_in_parts_follows_the_run_as_a_whole(given: tuple[Path, Path], tmp_path: Path) -> None:
    whole = refine(refine_config(*given, encoder_stage__lr=1e-4), tmp_path / "whole")
    parts = refine(refine_config(*given, encoder_stage__lr=1e-4, micro_batch=5), tmp_path / "parts")
    found, expected = tensors(parts.out), tensors(whole.out)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)
    assert results(parts.out)["config"]["micro_batch"] == 5 and header(parts.out)


def test_out_of_memory_says_what_fits_and_loses_nothing(
    given: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights_file, data = given
    settings = REFINE | {"encoder.weights": weights_file, "data.spec": data}
    forward_backward, steps = Method.forward_backward, 0

    def full(self: Method, batch: Any, *args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 10 and (self.micro_batch or 99) > 3 and options["train_encoder"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward_backward(self, batch, *args, **options)

    monkeypatch.setattr(Method, "forward_backward", full)
    assert run(arguments("refine", tmp_path, settings)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "12 images" in error and "--resume --micro-batch 3" in error
    assert run(["refine", "--resume", "--out", str(tmp_path), "--micro-batch", "3", "--quiet"]) == 0


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="micro_batch 1025"):
        load_config(RefineConfig, None, {"micro_batch": "1025"})
    for odd in ("0", "-3", "1.5", "some"):
        with pytest.raises(ConfigError, match=r"^micro_batch = "):
            load_config(RefineConfig, None, {"micro_batch": odd})
    assert load_config(RefineConfig, None, {"micro_batch": "auto"}).micro_batch == "auto"
    assert load_config(RefineConfig, None, {"micro_batch": "64"}).micro_batch == 64


def test_auto_takes_whole_batches_where_memory_is_the_machines(
    given: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = REFINE | {"encoder.weights": given[0], "data.spec": given[1], "micro_batch": "auto"}
    assert run(arguments("refine", tmp_path, settings | {"encoder_stage.epochs": 1})) == 0
    assert "micro_batch auto: whole batches on cpu" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [None, "auto", 2])
def test_what_fits_a_gpu_is_measured_unless_it_is_set(
    given: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, asked: int | str | None
) -> None:
    plan = make_plan(refine_config(*given, micro_batch=asked), Silent(), Checks())
    method, trials, listener = make_step(), [], Notes()
    method.device = torch.device("cuda")

    def fits(*_: Any, reserve: int) -> int:
        trials.append(reserve)
        return 3

    monkeypatch.setattr("mimref.refinement.memory.largest_micro_batch", fits)
    measured = asked != 2
    assert choose_micro_batch(method, plan, listener) == (3 if measured else 2)
    assert listener.notes == ["micro_batch auto: 3 of 0 images per encoder pass"] * measured
    method.encoder.add_module("norm_of_batches", nn.BatchNorm1d(2))
    if not measured:
        with pytest.raises(ConfigError, match="micro_batch: the encoder has BatchNorm"):
            choose_micro_batch(method, plan, listener)
        return
    assert choose_micro_batch(method, plan, listener) is None and len(trials) == 1
    assert listener.notes[1:] == [AUTO_WITH_BATCHNORM] * (asked == "auto")


def test_without_a_compiler_the_run_is_not_compiled(
    given: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1 for pages")

    settings = REFINE | {"encoder.weights": given[0], "data.spec": given[1], "encoder_stage.epochs": 1}
    assert run(arguments("refine", tmp_path / "plain", settings)) == 0
    capsys.readouterr()
    monkeypatch.setattr(torch, "compile", no_compiler)
    assert run(arguments("refine", tmp_path / "out", settings | {"compile": True})) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "compile=true" in line]
    assert line.startswith("warning: ") and line.endswith("No working C++ compiler found")
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_compiled_steps_give_the_same(given: tuple[Path, Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"encoder_stage__lr": 1e-4, "encoder_stage__epochs": 1}
    plain = refine(refine_config(*given, **settings), tmp_path / "plain")
    compiled = refine(refine_config(*given, **settings, compile=True), tmp_path / "compiled")
    found, expected = tensors(compiled.out), tensors(plain.out)
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_auto_on_a_gpu(given: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = REFINE | {"encoder.weights": given[0], "data.spec": given[1], "micro_batch": "auto", "device": "cuda"}
    assert run(arguments("refine", tmp_path, settings)) == 0
    assert "micro_batch auto: 12 of 12 images per encoder pass" in capsys.readouterr().err
