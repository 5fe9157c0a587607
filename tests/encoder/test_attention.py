"""Packed attention is plain attention on each segment alone.

Shape suffixes: T tokens of the stream, N heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers import AttentionInterface

from trainer.encoder import attention
from trainer.encoder.attention import PACKED_ATTENTION, Packing, packed_attention, plan_buckets

N, D = 3, 8
CPU = torch.device("cpu")
LENGTHS = {
    "one segment": (7,),
    "one token each": (1, 1, 1),
    "fewer segments than buckets": (2, 9),
    "equal lengths": (6,) * 8,
    "ragged": (1, 2, 2, 3, 5, 5, 5, 8, 9, 13, 21),
    "equal and ragged": (4, 4, 4, 4, 6, 6, 6, 7, 9, 9),
}


@pytest.fixture(params=["host", "buckets", "jagged"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways of attention that run on a CPU; the last two are a GPU's."""
    if request.param != "host":
        monkeypatch.setattr(Packing, "takes_host", lambda *_: False)
    if request.param == "jagged":
        monkeypatch.setattr(attention, "_GPUS", {"cpu"})
    return str(request.param)


def _streams(num_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, N, num_tokens, D, generator=generator, requires_grad=True) for _ in range(3)]


def _attend(streams: list[Tensor], packing: Packing, **kwargs: Any) -> Tensor:
    query, key, value = streams
    return packed_attention(nn.Module(), query, key, value, None, packing=packing, **kwargs)[0]


def _plain(streams: list[Tensor], lengths: tuple[int, ...], scale: float | None) -> Tensor:
    segments = zip(*(x.split(list(lengths), dim=2) for x in streams), strict=True)
    outs = [scaled_dot_product_attention(q, k, v, scale=scale) for q, k, v in segments]
    return torch.cat(outs, dim=2).transpose(1, 2)


def _assert_same_gradients(
    ours: tuple[Tensor, Sequence[Tensor]], theirs: tuple[Tensor, Sequence[Tensor]], tolerance: float
) -> None:
    """Of outputs with respect to their inputs, by the same weights; the tolerance is relative above 1."""
    weights = torch.randn(ours[0].shape, generator=torch.Generator().manual_seed(1))
    for out, _ in (ours, theirs):
        (out * weights).sum().backward()
    for our, their in zip(ours[1], theirs[1], strict=True):
        assert our.grad is not None
        assert their.grad is not None
        assert_close(our.grad, their.grad, rtol=0.0, atol=tolerance * max(1.0, float(their.grad.abs().max())))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("scale", [None, 0.7])
def test_packed_is_plain_per_segment(lengths: tuple[int, ...], scale: float | None) -> None:
    """In value and in the gradient of queries, keys and values."""
    ours, theirs = _streams(sum(lengths)), _streams(sum(lengths))
    out = _attend(ours, plan_buckets(lengths, CPU), scaling=scale)  # type: ignore[arg-type]
    expected = _plain(theirs, lengths, scale)
    assert out.shape == (1, sum(lengths), N, D)
    assert_close(out, expected, rtol=0.0, atol=1e-6)
    _assert_same_gradients((out, ours), (expected, theirs), 1e-6)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_padding_at_the_end_is_nothing(lengths: tuple[int, ...], route: str) -> None:
    """Whatever stands behind the last bucket: its attention and its gradient are 0, and nobody sees it."""
    if route == "jagged":
        return  # a GPU's stream has no padding
    num_tokens = sum(lengths)
    packing = plan_buckets(lengths, CPU)
    padded, alone = _streams(num_tokens + 5), _streams(num_tokens)
    with torch.no_grad():
        for x, y in zip(alone, padded, strict=True):
            x.copy_(y[:, :, :num_tokens])
            y[:, :, num_tokens:] = 1e30
    out, expected = _attend(padded, packing), _attend(alone, packing)
    assert_close(out[:, :num_tokens], expected, rtol=0.0, atol=1e-6)
    assert not bool(out[:, num_tokens:].any())
    out[:, :num_tokens].square().sum().backward()
    expected.square().sum().backward()
    for x, y in zip(alone, padded, strict=True):
        assert_close(y.grad[:, :, :num_tokens], x.grad, rtol=0.0, atol=1e-6)
        assert not bool(y.grad[:, :, num_tokens:].any())


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("lengths", [LENGTHS["ragged"], LENGTHS["equal and ragged"]], ids=["ragged", "equal"])
@pytest.mark.parametrize("window", [None, 3, 8])
@pytest.mark.parametrize("is_causal", [False, True])
def test_who_sees_whom(lengths: tuple[int, ...], window: int | None, is_causal: bool) -> None:
    """Causal layers, windows inside a segment and grouped heads, against a softmax over the keys written out one query
    at a time; in value and in gradient."""
    layer = nn.Module()
    layer.is_causal = is_causal
    heads = (4, 2, 2)  # two queries share a key
    ours, theirs = ([x.detach()[:, :1].repeat(1, n, 1, 1).requires_grad_() for x, n in zip(xs, heads, strict=True)]
                    for xs in (_streams(sum(lengths)), _streams(sum(lengths))))  # fmt: skip
    packing = plan_buckets(lengths, CPU)
    out = packed_attention(layer, *ours, None, packing=packing, sliding_window=window)[0]
    rows, first = [], 0
    for length in lengths:
        for i in range(length):
            seen = [
                first + j
                for j in range(length)
                if (window is None or abs(i - j) < window) and (j <= i or not is_causal)
            ]
            query, key, value = theirs
            keys, values = (x[0, :, seen].repeat_interleave(2, dim=0) for x in (key, value))
            scores = (keys @ query[0, :, first + i, :, None])[..., 0] / D**0.5
            rows.append((scores.softmax(-1)[..., None] * values).sum(1))
        first += length
    expected = torch.stack(rows)[None]
    assert_close(out, expected, rtol=0.0, atol=1e-6)
    _assert_same_gradients((out, ours), (expected, theirs), 2e-6)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_a_bias_by_position(lengths: tuple[int, ...]) -> None:
    """Is what a mask of floats adds to each segment alone, in value and gradient, its own too; two layers share it."""
    streams = [_streams(sum(lengths)) for _ in range(2)]
    tables = [torch.randn(N, 127, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in range(2)]

    def bias(table: Tensor, num: int) -> Tensor:
        places = torch.arange(num)
        return table[:, places - places[:, None] + 63][None]

    packing = Packing(lengths, CPU, partial(bias, tables[0]))
    query, key, value = streams[0]
    out = _attend([query, key, _attend(streams[0], packing).transpose(1, 2)], packing)
    (query, key, value), expected = streams[1], []
    for q, k, v in zip(*(x.split(list(lengths), dim=2) for x in (query, key, value)), strict=True):
        for _ in range(2):
            v = scaled_dot_product_attention(q, k, v, attn_mask=bias(tables[1], q.shape[2]))
        expected.append(v.transpose(1, 2))
    theirs = torch.cat(expected, dim=1)
    assert_close(out, theirs, rtol=0.0, atol=1e-6)
    _assert_same_gradients((out, [*streams[0], tables[0]]), (theirs, [*streams[1], tables[1]]), 2e-6)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_buckets_cover_the_stream(lengths: tuple[int, ...]) -> None:
    buckets = plan_buckets(lengths, CPU).buckets
    assert [bucket.start for bucket in buckets] == [0, *[bucket.stop for bucket in buckets[:-1]]]
    assert buckets[-1].stop == sum(lengths)
    assert sum(bucket.num for bucket in buckets) == len(lengths)
    for bucket in buckets:
        ragged = bucket.stop - bucket.start != bucket.num * bucket.longest
        assert (bucket.mask is not None) == (bucket.slots is not None) == (bucket.real is not None) == ragged


def test_unsorted_segments_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="sorted by length"):
        plan_buckets((3, 2), CPU)


def _no_bias(num: int) -> Tensor:
    return torch.zeros(1, N, num, num)


def _weights_under_dropout(
    lengths: tuple[int, ...], rate: float, bias: Callable[[int], Tensor] | None = None
) -> list[Tensor]:
    """Attention weights after dropout, times the length of the segment, one tensor (N, L, L) a segment.

    Queries of 0 give every key the weight 1 / L, and one-hot values make the output the weights themselves.
    """
    longest = max(lengths)
    values = torch.cat([torch.eye(longest)[:n] for n in lengths]).expand(N, -1, -1)[None]
    zeros = torch.zeros_like(values)
    out_1TNL = _attend([zeros, zeros, values], Packing(lengths, CPU, bias), dropout=rate)
    segments = out_1TNL[0].split(list(lengths))
    return [segment.transpose(0, 1)[..., :n] * n for segment, n in zip(segments, lengths, strict=True)]


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("lengths", [(40,) * 8, (31, 34, 36, 37, 39, 40, 40, 40)], ids=["equal", "ragged"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("bias", [None, _no_bias])
def test_dropout_has_its_rate_and_expectation(
    lengths: tuple[int, ...], rate: float, bias: Callable[[int], Tensor] | None
) -> None:
    """A weight is 0 with probability p and else grows by 1 / (1 - p), each on its own; on every bucket."""
    torch.manual_seed(0)
    weights = _weights_under_dropout(lengths, rate, bias)
    for segment, n in zip(weights, lengths, strict=True):
        kept = segment != 0.0
        # The rate is a multiple of 2^-16.
        assert_close(segment[kept], torch.full_like(segment[kept], 1.0 / (1.0 - rate)), rtol=2.0**-16, atol=0.0)
        sigma = (rate * (1.0 - rate) / (N * n * n)) ** 0.5
        assert abs(float((~kept).double().mean()) - rate) < 4.5 * sigma
    everything = torch.cat([segment.flatten() for segment in weights])
    assert abs(float(everything.mean()) - 1.0) < 4.5 * (rate / (1.0 - rate) / len(everything)) ** 0.5
    # Heads and segments draw their own masks.
    assert not torch.equal(weights[-1][0], weights[-1][1])
    assert not torch.equal(weights[-1], weights[-2])


@pytest.mark.usefixtures("route")
def test_no_dropout_is_exact() -> None:
    for segment in _weights_under_dropout((3, 5, 5), 0.0):
        assert_close(segment, torch.ones_like(segment))


def test_registered_with_transformers() -> None:
    assert AttentionInterface()[PACKED_ATTENTION] is packed_attention
