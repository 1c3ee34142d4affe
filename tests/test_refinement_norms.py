"""The norms of the heads against plain loops in float64."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mimref.devices import autocast
from mimref.errors import Interrupted
from mimref.refinement.config import HeadsConfig
from mimref.refinement.heads import Heads
from mimref.refinement.norms import (
    NORMS,
    EnsembleBatchNorm,
    EnsembleLayerNorm,
    EnsembleRunningNorm,
    Norm,
    make_norm,
    update_statistics,
)
from mimref.refinement.run import refine
from tests.steps import make_batch, make_step
from tests.steps import weights as weights_of_heads
from tests.tiny import assert_same_run, refine_config, signal_at, write_labelled, write_weights

HEADS, WIDTH, ROWS = 2, 5, 7
CONFIG = HeadsConfig(projector_hidden=6, predictor_hidden=7, output=4)


def rows(seed: int, width: int = WIDTH, count: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Means and scales of features differ, as they do in a masked autoencoder's class tokens.
    scale = torch.linspace(0.1, 3, width, dtype=torch.float64)[:, None]
    return torch.randn(HEADS, width, count, generator=generator, dtype=torch.float64) * scale + 2 * scale + 0.1 * seed


def make_heads(norm: Norm) -> Heads:
    torch.manual_seed(0)
    return Heads(CONFIG.model_copy(update={"norm": norm}), [WIDTH] * HEADS)


def weights(layer: nn.Module) -> tuple[list[list[float]], list[list[float]]]:
    """Return scale and shift of every head and feature."""
    shape = (HEADS, WIDTH)
    assert isinstance(layer.weight, Tensor) and isinstance(layer.bias, Tensor)
    return layer.weight.view(shape).tolist(), layer.bias.view(shape).tolist()


def random_norm(norm: Norm) -> nn.Module:
    torch.manual_seed(0)
    layer = make_norm(norm, HEADS, WIDTH).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def mean_of(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def variance_of(values: list[float]) -> float:
    """Return the biased variance."""
    return mean_of([(value - mean_of(values)) ** 2 for value in values])


@pytest.mark.parametrize("training", [True, False])
def test_layer_norm_equals_loops(training: bool) -> None:
    layer, x = random_norm("layer").train(training), rows(1)
    scale, shift = weights(layer)
    found = layer(x).tolist()
    for head in range(HEADS):
        for row in range(ROWS):
            values = x[head, :, row].tolist()
            mean, deviation = mean_of(values), math.sqrt(variance_of(values) + 1e-5)
            for feature in range(WIDTH):
                expected = (values[feature] - mean) / deviation * scale[head][feature] + shift[head][feature]
                assert found[head][feature][row] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("norm", ["layer", "running"])
def test_gradients_equal_those_by_differences(norm: Norm) -> None:
    """Gradients of rows, scales and shifts; torch evaluates the function on both sides of every number."""
    layer = random_norm(norm).eval()
    if isinstance(layer, EnsembleRunningNorm):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)

    def apply(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        normed: Tensor = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
        return normed

    inputs = (rows(1), *(parameter.detach().clone() for parameter in layer.parameters()))
    assert torch.autograd.gradcheck(apply, tuple(tensor.requires_grad_() for tensor in inputs))


def loop_running(updates: list[Tensor], x: Tensor, scale: list[list[float]], shift: list[list[float]]) -> Tensor:
    """Return rows normalised by the statistics of these whole batches, feature by feature."""
    found = torch.empty_like(x)
    for head in range(HEADS):
        for feature in range(WIDTH):
            mean, variance = 0.0, 1.0
            for number, batch in enumerate(updates):
                values = batch[head, feature].tolist()
                # The first five batches each replace both; then comes the mean since the fifth, then a moving average.
                momentum = 1.0 if number < 5 else max(0.02, 1 / (number - 3))
                mean += momentum * (mean_of(values) - mean)
                variance += momentum * (variance_of(values) - variance)
            for row, value in enumerate(x[head, feature].tolist()):
                normed = (value - mean) / math.sqrt(variance + 1e-5)
                found[head, feature, row] = normed * scale[head][feature] + shift[head][feature]
    return found


def test_running_norm_equals_loops_before_and_after_every_update() -> None:
    layer = random_norm("running")
    scale, shift = weights(layer)
    updates: list[Tensor] = []
    # Enough updates for the momentum to stop falling.
    for number in range(60):
        x = rows(number, count=ROWS + number % 3)
        expected = loop_running(updates, x, scale, shift)
        torch.testing.assert_close(layer.train()(x), expected, rtol=1e-12, atol=1e-12)
        update_statistics(layer)
        updates.append(x)
        # Evaluation mode applies the same statistics, and leaves no rows to learn from.
        seen = layer.get_buffer("seen_S").clone()
        y = rows(99)
        torch.testing.assert_close(layer.eval()(y), loop_running(updates, y, scale, shift), rtol=1e-12, atol=1e-12)
        assert torch.equal(layer.get_buffer("seen_S"), seen)


def test_no_gradient_flows_through_running_statistics() -> None:
    """A row's output and gradient are the same whatever the other rows are."""
    layer = random_norm("running").train()
    found = []
    for other in (2, 3):
        x = torch.cat([rows(1, count=1), rows(other)], dim=2).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        assert x.grad is not None
        found.append((y[:, :, 0], x.grad[:, :, 0]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_layers_settle_one_after_the_other() -> None:
    """After as many updates as there are layers, every layer's output has mean 0 and variance 1, whatever the input."""
    heads = make_heads("running").double()
    outputs: list[Tensor] = []
    for module in heads.modules():
        if isinstance(module, EnsembleRunningNorm):
            module.register_forward_hook(lambda _, __, output: outputs.append(output.detach()))
    # A mean far from zero and a variance far from one.
    x = (100 + 10 * rows(1, count=64)).transpose(1, 2)
    for _ in range(5):
        heads(x)
        update_statistics(heads)
    outputs.clear()
    heads(x)
    assert len(outputs) == 5
    for output in outputs:
        torch.testing.assert_close(output.mean(dim=2), torch.zeros_like(output[:, :, 0]), rtol=0, atol=1e-9)
        # Epsilon is not negligible beside the small variance of the first layer.
        variance_HW = output.var(dim=2, correction=0)
        assert 0 < float(variance_HW.min()) <= float(variance_HW.max()) <= 1


def test_training_begins_with_the_statistics_of_its_first_batch() -> None:
    """So the first loss equals that of batch norms, and only the gradients differ."""
    losses = []
    for norm in NORMS:
        step = make_step(norm=norm)
        values = step.forward_backward(make_batch(), weights_of_heads(3), top_k=3, train_encoder=True)
        losses.append(float(values.loss.detach()))
        counts = [int(value) for name, value in step.heads.state_dict().items() if name.endswith(".updates")]
        # Five updates for the layers to settle one after the other, and that of the step itself.
        assert counts == ([6] * 5 if norm == "running" else [])
    assert losses[2] == pytest.approx(losses[0], rel=1e-9) and abs(losses[1] - losses[0]) > 0.01


@pytest.mark.parametrize("norm", NORMS)
def test_heads_hold_the_norm_asked_for(norm: Norm) -> None:
    heads = make_heads(norm)
    kinds = {"batch": EnsembleBatchNorm, "layer": EnsembleLayerNorm, "running": EnsembleRunningNorm}
    held = [module for module in heads.modules() if isinstance(module, tuple(kinds.values()))]
    assert len(held) == 5 and {type(module) for module in held} == {kinds[norm]}
    torch.manual_seed(0)
    paper = Heads(CONFIG, [WIDTH] * HEADS)
    # Parameters and their initial values are the same for all three norms.
    named = dict(heads.named_parameters())
    assert named.keys() == dict(paper.named_parameters()).keys()
    assert all(torch.equal(named[name], weight) for name, weight in paper.named_parameters())
    # Only the persistent buffers are in states, and a reloaded state is the same function.
    heads(torch.randn(HEADS, ROWS, WIDTH))
    update_statistics(heads)
    again = make_heads(norm)
    again.load_state_dict(heads.state_dict())
    assert not any("seen" in name for name in heads.state_dict())
    x = torch.randn(HEADS, ROWS, WIDTH)
    for ours, theirs in zip(heads.eval()(x), again.eval()(x), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_is_near_single(norm: Norm) -> None:
    """In bfloat16 statistics are computed in single precision, and gradients come back in bfloat16."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = random_norm(norm).float()
        x = rows(1).to(dtype).requires_grad_()
        with autocast(torch.device("cpu"), torch.bfloat16 if dtype is torch.bfloat16 else torch.float32):
            y = layer(x)
        assert y.dtype is dtype
        (y.float() * rows(5).float()).sum().backward()
        assert x.grad is not None and x.grad.dtype is dtype
        found.append([y.detach().float(), x.grad.float()])
    for exact, half in zip(*found, strict=True):
        assert float((exact - half).norm() / exact.norm()) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_compiled_heads_are_the_same(norm: Norm) -> None:
    """In one graph, by a backend that needs no C++ compiler; gradients and statistics too."""
    found = []
    for compiled in (False, True):
        heads = make_heads(norm).double()
        run = torch.compile(heads, backend="aot_eager", dynamic=True, fullgraph=True) if compiled else heads
        for seed in (1, 2):
            prediction = run(rows(seed).transpose(1, 2))[1]
            (prediction * torch.linspace(-1, 1, prediction.numel()).view_as(prediction)).sum().backward()
            update_statistics(heads)
        gradients = [parameter.grad for parameter in heads.parameters()]
        found.append([*gradients, *heads.state_dict().values()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


# --- whole runs


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("norms")
    return write_weights(folder / "base.safetensors"), write_labelled(folder / "data")


@pytest.mark.parametrize("norm", ["layer", "running"])
def test_interrupted_and_resumed_equals_uninterrupted(norm: Norm, given: tuple[Path, Path], tmp_path: Path) -> None:
    """Within both stages and between them; batch is resumed in `test_refinement_run.py`."""
    config = refine_config(*given, heads__norm=norm)
    refine(config, tmp_path / "whole")
    for attempt, step in enumerate((1, 6, 8, 15)):
        with pytest.raises(Interrupted):
            refine(config, tmp_path / "parts", resume=attempt > 0, listener=signal_at(step))
    refine(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    # The heads of stage 1 have learnt with this norm: their statistics are those of 8 updates, after five to settle.
    heads = torch.load(tmp_path / "whole" / "heads.pt", weights_only=True)
    assert heads["norm"] == norm
    counts = [int(value) for name, value in heads["heads"].items() if name.endswith(".updates")]
    assert counts == ([13] * 5 if norm == "running" else [])
