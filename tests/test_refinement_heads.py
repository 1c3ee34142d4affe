"""The batched ensemble against one nn.Sequential per head, in float64."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimref.errors import ConfigError
from mimref.refinement.config import HeadsConfig
from mimref.refinement.heads import EnsembleLinear, Heads, head_blocks
from mimref.refinement.norms import EnsembleBatchNorm

CONFIG = HeadsConfig(projector_hidden=12, predictor_hidden=10, output=6)
HEADS, ROWS, DIM = 3, 9, 8


def make_heads() -> Heads:
    """Return heads in float64 whose norms differ from the identity that they start as."""
    torch.manual_seed(0)
    heads = Heads(CONFIG, [DIM] * HEADS).double()
    with torch.no_grad():
        for module in heads.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return heads


def separate(heads: Heads, head: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Return projector and predictor of one head, built from torch's own layers as Appendix B.2 lists them."""

    def block(layer: nn.Module, inputs: int, outputs: int, *, gelu: bool) -> list[nn.Module]:
        linear, norm = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)
        own = slice(head * outputs, (head + 1) * outputs)
        with torch.no_grad():
            linear.weight = nn.Parameter(layer.linear.weight[head].clone())  # type: ignore[union-attr, index]
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm.double(), name).copy_(getattr(layer.norm, name)[own])
        return [linear, norm, nn.GELU()] if gelu else [linear, norm]

    first, second, third = heads.projector
    fourth, fifth = heads.predictor
    projector = [*block(first, 8, 12, gelu=True), *block(second, 12, 12, gelu=True), *block(third, 12, 6, gelu=False)]
    predictor = [*block(fourth, 6, 10, gelu=True), *block(fifth, 10, 6, gelu=False)]
    return nn.Sequential(*projector), nn.Sequential(*predictor)


def features() -> Tensor:
    return torch.randn(HEADS, ROWS, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ensemble_parameters(heads: Heads, head: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the gradients of one head's linear weight, norm weight and norm bias, layer by layer."""
    found = []
    for layer in [*heads.projector, *heads.predictor]:
        linear, norm = layer.linear, layer.norm
        outputs = linear.weight.shape[1]
        own = slice(head * outputs, (head + 1) * outputs)
        found.append((linear.weight.grad[head], norm.weight.grad[own], norm.bias.grad[own]))
    return found


@pytest.mark.parametrize("training", [True, False])
def test_each_head_equals_its_own_sequential(training: bool) -> None:
    heads = make_heads().train(training)
    alone = [separate(heads, head) for head in range(HEADS)]
    together_x = features().requires_grad_()
    projected, predicted = heads(together_x)
    assert projected.shape == predicted.shape == (HEADS, ROWS, CONFIG.output)
    assert not projected.requires_grad
    weight = torch.randn(HEADS, ROWS, CONFIG.output, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (weight * predicted).sum().backward()
    assert together_x.grad is not None

    for head, (projector, predictor) in enumerate(alone):
        projector.train(training)
        predictor.train(training)
        x = features()[head].requires_grad_()
        z = projector(x)
        p = predictor(z)
        torch.testing.assert_close(projected[head], F.normalize(z, dim=1), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(predicted[head], F.normalize(p, dim=1), rtol=1e-10, atol=1e-12)
        (weight[head] * F.normalize(p, dim=1)).sum().backward()
        torch.testing.assert_close(together_x.grad[head], x.grad, rtol=1e-9, atol=1e-10)
        own = [module for module in [*projector, *predictor] if not isinstance(module, nn.GELU)]
        ours = ensemble_parameters(heads, head)
        assert len(own) == 2 * len(ours)
        for (linear_grad, norm_weight_grad, norm_bias_grad), linear, norm in zip(
            ours, own[::2], own[1::2], strict=True
        ):
            torch.testing.assert_close(linear_grad, linear.weight.grad, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(norm_weight_grad, norm.weight.grad, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(norm_bias_grad, norm.bias.grad, rtol=1e-9, atol=1e-10)
        # Training mode has changed the running statistics of both in the same way, evaluation mode those of neither.
        after = separate(heads, head)
        for moved, expected in zip([*after[0], *after[1]], [*projector, *predictor], strict=True):
            for name, buffer in expected.named_buffers():
                if name != "num_batches_tracked":
                    torch.testing.assert_close(moved.get_buffer(name), buffer, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_hidden_is_the_first_projector_layer(training: bool) -> None:
    heads = make_heads().train(training)
    expected = [separate(heads, head)[0][:3].train(training)(features()[head]) for head in range(HEADS)]
    hidden = heads.hidden(features())
    assert hidden.shape == (HEADS, ROWS, CONFIG.projector_hidden)
    torch.testing.assert_close(hidden, torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_norm_on_cpus_is_that_of_other_devices() -> None:
    x = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0))
    found = []
    for others in (False, True):
        norm, part = EnsembleBatchNorm(3, 4), x.clone().requires_grad_()
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, 12))
        rows = part.reshape(1, 12, 9)
        out = nn.BatchNorm1d.forward(norm, rows).view_as(part) if others else norm(part)
        (out * torch.arange(9)).sum().backward()
        assert part.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
        found.append([out.detach(), part.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_batch_statistics_span_all_rows() -> None:
    # Two halves normalised on their own differ from the halves of the whole.
    heads = make_heads()
    whole = heads(features())[1]
    halves = torch.cat([heads(features()[:, :5])[1], heads(features()[:, 5:])[1]], dim=1)
    assert not torch.allclose(whole, halves, atol=1e-2)
    shuffled = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(heads(features()[:, shuffled])[1], whole[:, shuffled], rtol=1e-9, atol=1e-11)


def test_results_have_unit_length_and_heads_are_independent() -> None:
    heads = make_heads()
    before = heads(features())
    changed = features()
    changed[1] *= torch.linspace(-1, 2, DIM, dtype=torch.float64)
    after = heads(changed)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new.norm(dim=2), torch.ones(HEADS, ROWS, dtype=torch.float64))
        assert torch.equal(old[[0, 2]], new[[0, 2]])
        assert not torch.allclose(old[1], new[1], atol=1e-2)


def test_parameters_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        heads = Heads(HeadsConfig(), [1024] * 8)
    shapes = {name: tuple(parameter.shape) for name, parameter in heads.named_parameters()}
    widths = [
        ("projector.0", 1024, 2048),
        ("projector.1", 2048, 2048),
        ("projector.2", 2048, 256),
        ("predictor.0", 256, 4096),
        ("predictor.1", 4096, 256),
    ]
    expected: dict[str, tuple[int, ...]] = {}
    for name, inputs, outputs in widths:
        # No bias: the norm would cancel it.
        expected[f"{name}.linear.weight"] = (8, outputs, inputs)
        expected[f"{name}.norm.weight"] = expected[f"{name}.norm.bias"] = (8 * outputs,)
    assert shapes == expected


@pytest.mark.parametrize(("inputs", "outputs"), [(30, 50), (200, 20)])
def test_weights_start_xavier_uniform(inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    weight = EnsembleLinear(4, inputs, outputs).weight.detach()
    bound = math.sqrt(6 / (inputs + outputs))
    assert weight.shape == (4, outputs, inputs)
    assert 0.99 * bound < float(weight.max()) <= bound and -bound <= float(weight.min()) < -0.99 * bound
    assert float(weight.var()) == pytest.approx(bound**2 / 3, rel=0.05)
    # Heads start with different weights.
    assert weight.flatten(1).unique(dim=0).shape[0] == 4


@pytest.mark.parametrize(
    ("blocks", "depth", "expected"),
    [
        ("17-24", 24, [17, 18, 19, 20, 21, 22, 23, 24]),
        ("20,22,24", 24, [20, 22, 24]),
        ("last8", 24, [17, 18, 19, 20, 21, 22, 23, 24]),
        ("last12", 32, list(range(21, 33))),
        ("last4", 4, [1, 2, 3, 4]),
        ("1", 4, [1]),
        ("1-2,4", 4, [1, 2, 4]),
        ("3-3", 4, [3]),
        ("24,24,24", 24, [24, 24, 24]),
        ("4,2,1-3", 4, [4, 2, 1, 2, 3]),
    ],
)
def test_head_blocks(blocks: str, depth: int, expected: list[int]) -> None:
    assert head_blocks(blocks, depth) == expected


@pytest.mark.parametrize("blocks", ["25", "20-25", "0", "last25", "last0", "3,99", "1-999999999999"])
def test_a_block_the_encoder_lacks_is_refused(blocks: str) -> None:
    with pytest.raises(ConfigError, match=rf"heads\.blocks '{blocks}' does not fit: .* blocks 1 to 24"):
        head_blocks(blocks, 24)


@pytest.mark.parametrize("blocks", ["24-17", "24-17,20"])
def test_a_range_that_runs_downwards_is_refused(blocks: str) -> None:
    with pytest.raises(ConfigError, match=rf"heads\.blocks '{blocks}': .*17-24"):
        head_blocks(blocks, 24)
