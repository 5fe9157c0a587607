"""Attention written out for a CPU is that of plain formulas, in value and gradient, dropout included.

Shape suffixes: T tokens of the stream, N heads, D head dimension, L tokens of a segment.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from trainer.encoder import host_attention
from trainer.encoder.host_attention import Bins, HostAttention, attend_on_host, plan_bins

LENGTHS = (1, 2, 2, 4, 5, 5)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bins for texts of a few tokens."""
    monkeypatch.setattr(host_attention, "_NARROWEST", 4)
    monkeypatch.setattr(host_attention, "_WIDTH_STEP", 1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: tuple[int, ...] = LENGTHS,
    scale: float | None = None,
    rate: float = 0.0,
    window: int | None = None,
    is_causal: bool = False,
    position_bias: Tensor | None = None,
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attention = HostAttention(plan_bins(lengths), query.shape[1], scale, rate, window, is_causal)
    return attend_on_host(query, key, value, attention, position_bias)


def _streams(width: int = 3, dtype: torch.dtype = torch.float64, num_tokens: int = sum(LENGTHS)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, num_tokens, width)
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for _ in range(3)]


def _segments(bins: Bins) -> list[list[int]]:
    """Lengths in each bin."""
    return [[int(n) for n in row[row >= 0].unique_consecutive(return_counts=True)[1]] for row in bins.segment_BW]


def test_bins_hold_neighbours() -> None:
    """Of one width as many as have room, in order; those too long for it in wider ones, as wide as the longest."""
    short, long = plan_bins(LENGTHS)
    assert (short.width, _segments(short)) == (4, [[1, 2], [2], [4]])
    assert (long.width, _segments(long)) == (5, [[5], [5]])
    assert (short.start, short.stop, long.start, long.stop) == (0, 9, 9, 19)
    assert [_segments(bins) for bins in plan_bins((1, 1, 1, 1, 17))] == [[[1, 1, 1, 1]], [[17]]]
    assert [bins.width for bins in plan_bins((3, 8, 9, 33))] == [4, 8, 9, 33]


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_backward_is_the_derivative(window: int | None, is_causal: bool) -> None:
    """Against finite differences; nothing leaks from padding, whose slots hold tokens of the segment."""
    attend = partial(_attend, scale=0.9, window=window, is_causal=is_causal)
    assert torch.autograd.gradcheck(attend, _streams())


def test_the_gradient_of_a_bias() -> None:
    """Against finite differences, with masks of one seed."""
    bias = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)

    def attend(*tensors: Tensor) -> Tensor:
        torch.manual_seed(5)
        return _attend(*tensors[:3], rate=0.3, position_bias=tensors[3])

    assert torch.autograd.gradcheck(attend, [*_streams(), bias])


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_against_the_formula(rate: float) -> None:
    """softmax(scores) * mask / (1 - rate) times values, and what autograd makes of it in float64, with the mask read
    from an output whose values are one-hot: masks are a function of the seed."""
    width = max(LENGTHS)
    ours, theirs = _streams(width=width), _streams(width=width)
    query, key, _ = ours
    one_hot = torch.cat([torch.eye(width, dtype=torch.float64)[:n] for n in LENGTHS]).expand(1, 2, -1, -1)
    torch.manual_seed(5)
    weights_TNL = _attend(query, key, one_hot, rate=rate)[0].detach()
    torch.manual_seed(5)
    out = _attend(*ours, rate=rate)
    segments = []
    true_rate = round(rate * 2**16) / 2**16
    for weights, *tokens in zip(weights_TNL.split(LENGTHS), *(x[0].split(LENGTHS, 1) for x in theirs), strict=True):
        q, k, v = tokens
        mask = (weights.transpose(0, 1)[..., : len(weights)] != 0.0) / (1.0 - true_rate)
        segments.append((q @ k.mT / width**0.5).softmax(-1) * mask @ v)
    expected = torch.cat(segments, dim=1).transpose(0, 1)[None]
    assert_close(out, expected)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    for our, their in zip(
        torch.autograd.grad(out, ours, direction), torch.autograd.grad(expected, theirs, direction), strict=True
    ):
        assert_close(our, their)


def test_padding_changes_nothing_beside_it() -> None:
    """A segment has, beside one of five tokens, the output and the gradients that it has alone; also where autocast
    is on around the backward, which would compute in another type."""
    together = _streams(num_tokens=6)
    alone = [x.detach()[:, :, :1].requires_grad_() for x in together]
    out = _attend(*together, lengths=(1, 5))[:, :1]
    expected = _attend(*alone, lengths=(1,))
    assert_close(out, expected, rtol=0.0, atol=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        (out.sum() + expected.sum()).backward()
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_close(ours.grad[:, :, :1], theirs.grad)
        assert not ours.grad[:, :, 1:].any(), "no weight on the output of those tokens"


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_bf16_is_near_float32(rate: float) -> None:
    """And queries in another type than the values, as a rotary embedding leaves them, get gradients in their own."""
    whole, (query, key, value) = (_streams(dtype=torch.float32, num_tokens=32) for _ in range(2))
    outs = []
    for streams in (whole, [query, key, value.bfloat16()]):
        torch.manual_seed(2)
        outs.append(_attend(*streams, lengths=(32,), rate=rate))
        outs[-1].float().square().sum().backward()
    assert outs[1].dtype == torch.bfloat16
    assert_close(outs[1].float(), outs[0], rtol=2.0**-6, atol=0.03)
    for ours, theirs in zip(whole, (query, key, value), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert theirs.grad.dtype == torch.float32
        assert_close(theirs.grad, ours.grad, rtol=0.0, atol=0.03 * float(ours.grad.abs().max()))


def test_checkpointing_replays_the_masks() -> None:
    """Bitwise, in value and gradient; another seed drops others."""

    def run(seed: int, replay: bool) -> list[Tensor]:
        torch.manual_seed(seed)
        streams = _streams(dtype=torch.float32)
        attend = partial(_attend, rate=0.3)
        out: Tensor = checkpoint(attend, *streams, use_reentrant=False) if replay else attend(*streams)
        return [out, *torch.autograd.grad(out.square().sum(), streams)]

    plain = run(0, False)
    assert all(torch.equal(a, b) for a, b in zip(plain, run(0, True), strict=True))
    assert not torch.equal(plain[0], run(1, False)[0])


def test_everything_dropped_is_zero() -> None:
    streams = _streams()
    out = _attend(*streams, rate=1.0)
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), streams))
