"""Attention on a CPU in one autograd function, dropout included.

torch's own attention with dropout is there a row of plain operations, each with a node of the graph, and for short
texts calling them takes longer than their arithmetic. Here each bucket of segments takes one copy of each stream to its
padded form, a softmax between two batched products, and one copy back; the backward is written out.

Shape suffixes: T tokens of the stream, N heads, D head dimension, S segments of a bucket, L slots of a segment for
queries, K for keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trainer.encoder.dropout import draw_kept

# Padded widths are few. In bf16, oneDNN writes a kernel for each shape of a product (0.5 ms, 0.7 MB), and keeps 1,024.
_QUERY_STEP = 8
# And torch's softmax takes numbers one by one where they do not fill a vector register, up to ten times slower.
_VECTOR_BYTES = 64


@dataclass(frozen=True)
class _Slots:
    """Segments padded to one width, as rows of D numbers: (T, N) of the stream, (S, N, width) of slots.

    Attributes:
        rows: (S * N * width,) row of the stream for each slot; in padding that of the segment's last token.
        real: (tokens * N,) slot for each row of the stream.
        padding: slots without a token.
    """

    rows: Tensor
    real: Tensor
    padding: Tensor


@dataclass(eq=False)
class HostBucket:
    """Neighbouring segments of the stream that attend in one call; what depends on lengths alone is made once for all
    layers.

    Attributes:
        start: first token of the stream.
        lengths_S: of the segments, ascending.
    """

    start: int
    lengths_S: Tensor
    _slots: dict[tuple[int, int], _Slots] = field(default_factory=dict)
    _biases: dict[tuple[int | None, bool, torch.dtype], Tensor] = field(default_factory=dict)

    @cached_property
    def stop(self) -> int:
        return self.start + int(self.lengths_S.sum())

    @cached_property
    def longest(self) -> int:
        return int(self.lengths_S[-1])

    @property
    def num_queries(self) -> int:
        """L."""
        return _round_up(self.longest, _QUERY_STEP)

    def num_keys(self, dtype: torch.dtype) -> int:
        """K."""
        return _round_up(self.longest, _VECTOR_BYTES // dtype.itemsize)

    def slots(self, width: int, num_heads: int) -> _Slots:
        if (width, num_heads) not in self._slots:
            head_N1, place_W = torch.arange(num_heads)[:, None], torch.arange(width)
            length_S1 = self.lengths_S[:, None]
            token_SW = self.start + length_S1.cumsum(0) - length_S1 + place_W.minimum(length_S1 - 1)
            rows_SNW = token_SW[:, None] * num_heads + head_N1
            is_real_SNW = (place_W < length_S1)[:, None].expand_as(rows_SNW)
            slot_SNW = torch.arange(rows_SNW.numel()).view_as(rows_SNW)
            real = slot_SNW.transpose(1, 2)[is_real_SNW.transpose(1, 2)]
            self._slots[width, num_heads] = _Slots(rows_SNW.flatten(), real, slot_SNW[~is_real_SNW])
        return self._slots[width, num_heads]

    def bias(self, window: int | None, is_causal: bool, dtype: torch.dtype) -> Tensor:
        """(S, 1, 1 or L, K): 0 where a query sees a key, -inf elsewhere."""
        if window is not None and window >= self.longest:
            window = None
        if (window, is_causal, dtype) not in self._biases:
            key_K = torch.arange(self.num_keys(dtype))
            seen = (key_K < self.lengths_S[:, None])[:, None, None]
            if window is not None or is_causal:
                seen = within(seen, self.num_queries, window, is_causal)
            bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
            self._biases[window, is_causal, dtype] = bias
        return self._biases[window, is_causal, dtype]


def within(is_key_S11K: Tensor, num_queries: int, window: int | None, is_causal: bool) -> Tensor:
    """Which keys a query sees.

    Args:
        is_key_S11K: (S, 1, 1, K) False where a slot for keys holds no token.
        num_queries: L.
        window: sees those less than so many places away; None: any.
        is_causal: does not see those behind it.

    Returns:
        (S, 1, L, K) bool.
    """
    place_L = torch.arange(num_queries, device=is_key_S11K.device)
    distance_LK = place_L[:, None] - torch.arange(is_key_S11K.shape[-1], device=is_key_S11K.device)
    seen = is_key_S11K
    if window is not None:
        seen = seen & (distance_LK.abs() < window)
    if is_causal:
        seen = seen & (distance_LK >= 0)
    # The softmax of padding that sees nothing would be NaN, and so would the gradient of all keys.
    return seen | (distance_LK == 0)


def attend_on_host(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buckets: Sequence[HostBucket],
    rate: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attention of each segment to itself.

    Args:
        query, key, value: (1, N, T, D); computed in the type of the values.
        buckets: cover the stream, but for padding at its end, which attends to nothing and gets 0.
        rate: of the dropout of attention probabilities.
        scaling: of the scores; None: 1 / sqrt(D).
        window: a token sees those less than so many places away; None: all of its segment.
        is_causal: a token does not see those behind it.

    Returns:
        (1, T, N, D).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = value.dtype
    with torch.autocast("cpu", enabled=False):  # which would compute the softmax in fp32, unlike SDPA
        biases = [bucket.bias(window, is_causal, dtype) for bucket in buckets]
        attended: Tensor = _HostAttention.apply(  # type: ignore[no-untyped-call]
            query.to(dtype), key.to(dtype), value, buckets, biases, rate, scale
        )
    return attended


class _HostAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        buckets: Sequence[HostBucket],
        biases: Sequence[Tensor],
        rate: float,
        scale: float,
    ) -> Tensor:
        _, N, T, D = query.shape
        streams = [_rows(x) for x in (query, key, value)]
        shapes = [
            (len(b.lengths_S) * N, b.num_queries, bias.shape[-1]) for b, bias in zip(buckets, biases, strict=True)
        ]
        # One draw for all buckets.
        kepts: Sequence[Tensor | None] = [None] * len(buckets)
        grow = 1.0
        if rate:
            sizes = [num * L * K for num, L, K in shapes]
            drawn, grow = draw_kept(sum(sizes), rate)
            kepts = drawn.split(sizes)
        out = _stream_like(query, buckets)
        saved: list[Tensor | None] = []
        for bucket, bias, (num, L, K), kept in zip(buckets, biases, shapes, kepts, strict=True):
            places, key_places = bucket.slots(L, N), bucket.slots(K, N)
            q, k, v = _padded(streams, places, key_places, num)
            scores = torch.baddbmm(bias.expand(-1, N, -1, -1).flatten(0, 1), q, k.mT, alpha=scale)
            probabilities = scores.softmax(-1)
            weights = probabilities if kept is None else probabilities * kept.view_as(scores).to(scores.dtype)
            _put(_product(weights, v, grow), places, bucket, out)
            saved += [probabilities, kept]
        ctx.save_for_backward(query, key, value, *saved)
        ctx.buckets, ctx.scale, ctx.grow = buckets, scale, grow
        return out.view(1, T, N, D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, T, N, D = grads[0].shape
        grad = grads[0].reshape(T * N, D)
        query, key, value, *saved = ctx.saved_tensors  # read once: checkpointing gives them away
        streams = [_rows(x) for x in (query, key, value)]
        into = [_stream_like(x, ctx.buckets) for x in (query, key, value)]
        with torch.autocast("cpu", enabled=False):
            for i, bucket in enumerate(ctx.buckets):
                probabilities, kept = saved[2 * i : 2 * i + 2]
                num, L, K = probabilities.shape
                places, key_places = bucket.slots(L, N), bucket.slots(K, N)
                # Not saved: padded, they take more memory than the streams.
                q, k, v = _padded(streams, places, key_places, num)
                # Padded queries pass nothing on, and padded keys have probability 0.
                g = grad.index_select(0, places.rows).index_fill_(0, places.padding, 0.0).view_as(q)
                g_weights, weights = _product(g, v.mT, ctx.grow), probabilities
                if kept is not None:
                    mask = kept.view_as(weights).to(g.dtype)
                    g_weights *= mask
                    weights = weights * mask
                g_scores = torch._softmax_backward_data(g_weights, probabilities, -1, g.dtype)
                _put(_product(g_scores, k, ctx.scale), places, bucket, into[0])
                _put(_product(g_scores.mT, q, ctx.scale), key_places, bucket, into[1])
                _put(_product(weights.mT, g, ctx.grow), key_places, bucket, into[2])
        return *(x.view(1, T, N, D).transpose(1, 2) for x in into), None, None, None, None


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _rows(x_1NTD: Tensor) -> Tensor:
    """(T * N, D); no copy where a linear layer has just made the tensor."""
    return x_1NTD.transpose(1, 2).reshape(-1, x_1NTD.shape[-1])


def _stream_like(x_1NTD: Tensor, buckets: Sequence[HostBucket]) -> Tensor:
    """(T * N, D) to be written to by all buckets, 0 behind them."""
    _, N, T, D = x_1NTD.shape
    rows = x_1NTD.new_empty((T * N, D))
    rows[buckets[-1].stop * N :] = 0.0
    return rows


def _padded(streams: Sequence[Tensor], places: _Slots, key_places: _Slots, num: int) -> list[Tensor]:
    """Queries (num, L, D), and keys and values (num, K, D), of S * N = num."""
    slots = (places, key_places, key_places)
    rows = (x.index_select(0, slot.rows) for x, slot in zip(streams, slots, strict=True))
    return [x.view(num, -1, x.shape[-1]) for x in rows]


def _put(padded: Tensor, places: _Slots, bucket: HostBucket, stream: Tensor) -> None:
    """Write the tokens of a padded (S * N, width, D) to the rows of its bucket."""
    num_heads = len(places.real) // (bucket.stop - bucket.start)
    rows = stream[bucket.start * num_heads : bucket.stop * num_heads]
    torch.index_select(padded.view(-1, padded.shape[-1]), 0, places.real, out=rows)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * a @ b``, rounded once."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)
