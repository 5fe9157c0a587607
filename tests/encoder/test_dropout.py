"""Dropout by 16 random bits is dropout: its rate, its expectation, its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from trainer.encoder.dropout import HostDropout, dropout, use_host_dropout


def _kept(shape: tuple[int, ...], rate: float, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return (dropout(torch.ones(shape), rate) != 0.0).double()


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_elements_are_dropped_at_the_rate_each_on_its_own(rate: float) -> None:
    """The share of dropped elements, and the correlation of neighbours in a row, in a column and of two draws, are
    within five standard deviations of independent draws'."""
    kept, other = _kept((512, 512), rate), _kept((512, 512), rate, seed=1)
    num, variance = kept.numel(), rate * (1.0 - rate)
    assert abs(float(1.0 - kept.mean()) - rate) < 5.0 * (variance / num) ** 0.5
    centred, centred_other = kept - (1.0 - rate), other - (1.0 - rate)
    for left, right in (
        (centred[:, :-1], centred[:, 1:]),
        (centred[:-1], centred[1:]),
        (centred, centred_other),
    ):
        assert abs(float((left * right).mean()) / variance) < 5.0 / num**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (33, 64)], ids=str)
def test_value_and_gradient_are_the_mask_by_the_true_rate(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    x = torch.randn(shape).to(dtype).requires_grad_()
    weights = torch.randn(shape).to(dtype)
    out = dropout(x, 0.1)
    (grad,) = torch.autograd.grad((out * weights).sum(), x)
    mask = (out != 0.0).double() / (1.0 - 6554 / 65536)  # the multiple of 2^-16 that is nearest to 0.1
    assert_close(out, (x.detach().double() * mask).to(dtype))
    assert_close(grad, (weights.double() * mask).to(dtype))


def test_a_mask_is_a_function_of_torch_s_seed() -> None:
    assert torch.equal(_kept((100, 10), 0.1, seed=5), _kept((100, 10), 0.1, seed=5))
    assert not torch.equal(_kept((100, 10), 0.1, seed=5), _kept((100, 10), 0.1, seed=6))


def test_checkpointing_replays_the_mask() -> None:
    x = torch.randn(50, 40, requires_grad=True)
    torch.manual_seed(0)
    whole = torch.autograd.grad(dropout(x, 0.3).square().sum(), x)
    torch.manual_seed(0)
    replayed = torch.autograd.grad(checkpoint(dropout, x, 0.3, use_reentrant=False).square().sum(), x)
    assert torch.equal(*whole, *replayed)


def test_the_ends_of_the_rate() -> None:
    x = torch.randn(100)
    assert torch.equal(dropout(x, 0.0), x)
    assert torch.equal(dropout(x, 1.0), torch.zeros(100))


def test_it_stands_in_for_every_dropout() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.25), nn.Sequential(nn.Dropout(0.5)))
    use_host_dropout(model)
    assert [(type(m), m.p) for m in model.modules() if isinstance(m, nn.Dropout)] == [
        (HostDropout, 0.25),
        (HostDropout, 0.5),
    ]
    x = torch.randn(8, 4)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model[0](x))
