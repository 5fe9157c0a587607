"""What the other tests of this folder lean on: the GPU refuses what a GPU refuses, and a read of it is noticed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from tests.gpu.conftest import WithoutReads


def test_two_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="cuda") + torch.ones(3)


@pytest.mark.parametrize("read", [float, torch.Tensor.tolist, torch.Tensor.cpu, torch.nonzero])
def test_a_read_is_noticed(without_reads: WithoutReads, read: object) -> None:
    number = torch.ones((), device="cuda")
    with pytest.raises((AssertionError, RuntimeError)), without_reads():
        read(number)  # type: ignore[operator]
    with without_reads():
        number + 1


def test_its_numbers_are_true() -> None:
    torch.manual_seed(0)
    results = []
    start = torch.randn(2, 3, 8, 16)
    for device in ("cpu", "cuda"):
        x = start.to(device, copy=True).requires_grad_()
        attended = scaled_dot_product_attention(x, x, x)
        (attended * attended.flatten().cumsum(0).view_as(x)).sum().backward()
        assert x.grad is not None
        results.append([attended.detach().cpu(), x.grad.cpu()])
    assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
