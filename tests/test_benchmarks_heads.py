"""The heads that the ensemble is compared with; no test checks speed."""

import pytest
import torch

from mimref.benchmarks.heads import HeadSizes, benchmark_heads, heads_facts, separate_heads
from mimref.refinement.config import HeadsConfig
from mimref.refinement.heads import Heads
from mimref.refinement.norms import NORMS, Norm


@pytest.mark.parametrize("norm", NORMS)
def test_separate_heads_compute_what_the_ensemble_does(norm: Norm) -> None:
    """Outputs, gradients of inputs and weights, and running statistics, in float64."""
    torch.manual_seed(0)
    config = HeadsConfig(projector_hidden=7, predictor_hidden=9, output=5, norm=norm)
    heads = Heads(config, [6] * 3).double()
    with torch.no_grad():
        for weight in heads.parameters():
            weight.normal_()
    separate = separate_heads(heads, config, 6)
    features = [torch.randn(11, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    same = [tensor.detach().clone().requires_grad_() for tensor in features]
    wanted = torch.randn(3, 11, 5, dtype=torch.float64)

    projection, prediction = heads(torch.stack(features))
    (prediction * wanted).sum().backward()
    found = [head(own) for head, own in zip(separate, same, strict=True)]
    torch.stack([(own[1] * weight).sum() for own, weight in zip(found, wanted, strict=True)]).sum().backward()

    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(torch.stack([own[0] for own in found]), projection, **close)
    torch.testing.assert_close(torch.stack([own[1] for own in found]), prediction, **close)
    for ours, plain in zip(features, same, strict=True):
        torch.testing.assert_close(plain.grad, ours.grad, **close)
    for number, head in enumerate(separate):
        for own, stacked in zip(head.parameters(), heads.parameters(), strict=True):
            assert own.grad is not None and stacked.grad is not None
            torch.testing.assert_close(own.grad, stacked.grad.unflatten(0, (3, -1))[number].view_as(own.grad), **close)
        running = [(name, value) for name, value in head.named_buffers() if "running" in name]
        stacked_running = [value for name, value in heads.named_buffers() if "running" in name]
        for (name, value), ours in zip(running, stacked_running, strict=True):
            torch.testing.assert_close(value, ours.unflatten(0, (3, -1))[number], msg=name, **close)


def test_rows_are_ratios_of_times_with_the_sizes_measured() -> None:
    small = HeadsConfig(projector_hidden=4, predictor_hidden=4, output=4)
    sizes = HeadSizes(heads=2, views=3, embed_dim=4, config=small, images=(5,), repeats=1)
    rows = benchmark_heads(sizes, device="cpu")
    assert [row["norm"] for row in rows] == ["batch", "layer", "running"]
    for row in rows:
        assert row["value"] == float(row["separate_s"]) / float(row["together_s"])
        assert (row["heads"], row["images"], row["rows"]) == (2, 5, 15)
        ((what, much),) = heads_facts([row])
        assert f"{row['norm']} norm" in what and f"{row['value']:.2f} x" in much
