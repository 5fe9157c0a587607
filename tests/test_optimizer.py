"""The gradient norm against NumPy's; groups, steps and clipping are held by whole runs in test_module.py."""

import numpy as np
import pytest
import torch
from torch import nn

from trainer.optimizer import gradient_norm

SHAPES = ((), (7,), (300, 513), (5, 4, 3), (0, 8))


def _parameters() -> list[nn.Parameter]:
    torch.manual_seed(3)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for scale, parameter in enumerate(parameters, start=1):
        parameter.grad = scale * torch.randn(parameter.shape)
    return [*parameters, nn.Parameter(torch.ones(4))]  # the last has no gradient


def test_the_norm_of_all_gradients_is_numpys() -> None:
    parameters = _parameters()
    flat = np.concatenate([p.grad.double().numpy().ravel() for p in parameters if p.grad is not None])
    assert float(gradient_norm(parameters)) == pytest.approx(np.linalg.norm(flat), rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_number_that_is_not_finite_shows_in_the_norm(value: float) -> None:
    parameters = _parameters()
    assert parameters[2].grad is not None
    parameters[2].grad[17, 300] = value
    assert not torch.isfinite(gradient_norm(parameters))
