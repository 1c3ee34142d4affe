"""The weight average against its closed form."""

import pytest
import torch
from torch import nn

from mimref.training.ema import WeightAverage


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False)).double()


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.9999])
def test_average_equals_the_closed_form(decay: float) -> None:
    module = tiny()
    average = WeightAverage(module, decay)
    history = [[parameter.detach().clone() for parameter in module.parameters()]]
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        average.update()
        history.append([parameter.detach().clone() for parameter in module.parameters()])
    n = len(history) - 1
    for index, parameter in enumerate(average.module.parameters()):
        expected = decay**n * history[0][index]
        for k in range(1, n + 1):
            expected = expected + (1 - decay) * decay ** (n - k) * history[k][index]
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-12)


def test_weights_that_stand_still_are_kept_to_the_bit() -> None:
    module = tiny().float()
    average = WeightAverage(module, 0.9)
    for _ in range(5):
        average.update()
    for mean, weight in zip(average.module.parameters(), module.parameters(), strict=True):
        assert torch.equal(mean, weight)


def test_frozen_parameters_are_copied_once() -> None:
    module = tiny()
    module[0].requires_grad_(False)  # type: ignore[index]
    average = WeightAverage(module, 0.5)
    start = [parameter.detach().clone() for parameter in module.parameters()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    average.update()
    for number, parameter in enumerate(average.module.parameters()):
        moved = 0.0 if number < 2 else 0.5
        torch.testing.assert_close(parameter, start[number] + moved)


def test_the_module_in_training_is_left_alone() -> None:
    module = tiny().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    average = WeightAverage(module, 0.5)
    average.update()
    assert module.training and all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not average.module.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    # No storage is shared.
    pointers = {parameter.data_ptr() for parameter in module.parameters()}
    assert pointers.isdisjoint(parameter.data_ptr() for parameter in average.module.parameters())
