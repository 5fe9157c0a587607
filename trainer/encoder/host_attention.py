"""Attention on a CPU in one autograd function, dropout included.

torch's own attention with dropout is there a row of plain operations, each with a node of the graph, and for short
texts calling them takes longer than their arithmetic. Here segments are put into bins of one width, several to a bin,
so that few slots stay empty and few calls do it all: a copy of the stream to the bins, a softmax between two batched
products, and one copy back; the backward is written out.

Shape suffixes: T tokens of the stream, N heads, D head dimension, H = N D, B bins, W slots of a bin, G bins times
heads, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.encoder.dropout import draw_masks

# Two short texts or three go into the narrowest bin; a bin twice as wide costs four times the pairs. Texts above it are
# sorted into bins of at most 64, 128, ... slots.
_NARROWEST = 32
# Few widths: in bf16, oneDNN writes a kernel for each shape of a product (0.5 ms, 0.7 MB), and keeps 1,024. And torch's
# softmax takes numbers one by one where they do not fill a vector register, up to ten times slower.
_WIDTH_STEP = 16


class _Places(NamedTuple):
    """Where rows of D numbers of a stream (T, C, N, D), C streams side by side, lie in bins (C, B, N, W, D).

    Attributes:
        rows: (C * B * N * W,) row of the stream for each slot; that of any token where a slot has none.
        slots: (tokens * C * N,) slot for each row of the stream.
        empty: slots without a token.
    """

    rows: Tensor
    slots: Tensor
    empty: Tensor


@dataclass(eq=False)
class Bins:
    """Bins of one width, which attend in one call; what depends on lengths alone is made once for all layers.

    Attributes:
        start, stop: tokens of the stream.
        slot_T: the slot of each token in (B, W).
        segment_BW: the segment that holds a slot, -1 where none does.
    """

    start: int
    stop: int
    slot_T: Tensor
    segment_BW: Tensor
    _places: dict[tuple[int, int], _Places] = field(default_factory=dict)
    _biases: dict[tuple[int | None, bool, torch.dtype], Tensor] = field(default_factory=dict)

    @property
    def num(self) -> int:
        """B."""
        return self.segment_BW.shape[0]

    @property
    def width(self) -> int:
        """W."""
        return self.segment_BW.shape[1]

    def places(self, num_streams: int, num_heads: int) -> _Places:
        """For C streams of N heads."""
        if (num_streams, num_heads) not in self._places:
            stream_C111 = torch.arange(num_streams)[:, None, None, None]
            head_N1 = torch.arange(num_heads)[:, None]
            token_BW = torch.full_like(self.segment_BW, self.start)
            token_BW.view(-1)[self.slot_T] = torch.arange(self.start, self.stop)
            rows = (token_BW[:, None] * num_streams + stream_C111) * num_heads + head_N1
            bin_T11, slot_T11 = (x[:, None, None] for x in (self.slot_T // self.width, self.slot_T % self.width))
            group_TCN = (stream_C111[:, 0, 0] * self.num + bin_T11) * num_heads + head_N1[:, 0]
            empty = (self.segment_BW < 0)[:, None].expand(rows.shape).flatten().nonzero()[:, 0]
            slots = (group_TCN * self.width + slot_T11).flatten()
            self._places[num_streams, num_heads] = _Places(rows.flatten(), slots, empty)
        return self._places[num_streams, num_heads]

    def bias(self, window: int | None, is_causal: bool, dtype: torch.dtype) -> Tensor:
        """(B, 1, W, W): 0 where a query sees a key, -inf elsewhere."""
        if window is not None and window >= self.width:
            window = None
        if (window, is_causal, dtype) not in self._biases:
            # Empty slots see each other: the softmax of one that sees nothing would be NaN.
            seen = (self.segment_BW[:, :, None] == self.segment_BW[:, None, :])[:, None]
            if window is not None or is_causal:
                seen = within(seen, self.width, window, is_causal)
            self._biases[window, is_causal, dtype] = torch.zeros(seen.shape, dtype=dtype).masked_fill_(
                ~seen, -torch.inf
            )
        return self._biases[window, is_causal, dtype]


def plan_bins(lengths: Sequence[int]) -> list[Bins]:
    """Put segments of ascending length into bins, in their order.

    Returns:
        Of each width the bins, which cover the stream.
    """
    lengths_S = torch.tensor(lengths)
    plans, first, start, widest = [], 0, 0, _NARROWEST
    while first < len(lengths):
        last = int(torch.searchsorted(lengths_S, widest, right=True))
        if last > first:
            width = _NARROWEST if widest == _NARROWEST else _round_up(lengths[last - 1])
            plans.append(_fill(lengths_S[first:last], width, start))
            first, start = last, plans[-1].stop
        widest *= 2
    return plans


def _fill(lengths_S: Tensor, width: int, start: int) -> Bins:
    """Each segment into the last bin, or a new one where it has no room."""
    starts, num, free = [], 0, 0
    for length in lengths_S.tolist():
        if length > free:
            num, free = num + 1, width
        starts.append(num * width - free)
        free -= length
    num_tokens = int(lengths_S.sum())
    segment_T = torch.arange(len(starts)).repeat_interleave(lengths_S)
    place_T = torch.arange(num_tokens) - (lengths_S.cumsum(0) - lengths_S)[segment_T]
    slot_T = torch.tensor(starts)[segment_T] + place_T
    segment_BW = torch.full((num, width), -1)
    segment_BW.view(-1)[slot_T] = segment_T
    return Bins(start, start + num_tokens, slot_T, segment_BW)


def within(is_key_S1LK: Tensor, num_queries: int, window: int | None, is_causal: bool) -> Tensor:
    """Which keys a query sees.

    Args:
        is_key_S1LK: (S, 1, 1 or L, K) False where a slot for keys holds no token that this query may see.
        num_queries: L.
        window: sees those less than so many places away; None: any.
        is_causal: does not see those behind it.

    Returns:
        (S, 1, L, K) bool.
    """
    place_L = torch.arange(num_queries, device=is_key_S1LK.device)
    distance_LK = place_L[:, None] - torch.arange(is_key_S1LK.shape[-1], device=is_key_S1LK.device)
    seen = is_key_S1LK
    if window is not None:
        seen = seen & (distance_LK.abs() < window)
    if is_causal:
        seen = seen & (distance_LK >= 0)
    # The softmax of padding that sees nothing would be NaN, and so would the gradient of all keys.
    return seen | (distance_LK == 0)


@dataclass(frozen=True, eq=False)
class HostAttention:
    """Attention of each segment to itself, forward and backward, without a graph.

    Attributes:
        bins: cover the stream, but for padding at its end, which attends to nothing and gets 0.
        num_heads: N.
        scale: of the scores.
        rate: of the dropout of attention probabilities.
        window: a token sees those less than so many places away; None: all of its segment.
        is_causal: a token does not see those behind it.
    """

    bins: Sequence[Bins]
    num_heads: int
    scale: float
    rate: float = 0.0
    window: int | None = None
    is_causal: bool = False

    def forward(self, qkv_T3H: Tensor, position_bias: Tensor | None = None) -> tuple[Tensor, float, list[Tensor]]:
        """Queries, keys and values side by side, (T, 3 H), to (T, H); then what dropout multiplies by, and what the
        backward needs: probabilities of each of ``bins``, and behind them their masks. What is added to the scores,
        (1, N, W, W), is as wide as the widest of ``bins``, and a function of the distance of slots."""
        num_tokens, hidden = qkv_T3H.shape[0], qkv_T3H.shape[1] // 3
        rows = qkv_T3H.view(-1, hidden // self.num_heads)
        masks, grow = draw_masks([b.num * self.num_heads * b.width**2 for b in self.bins], self.rate, rows.dtype)
        out = rows.new_empty(num_tokens * self.num_heads, rows.shape[-1])
        out[self.bins[-1].stop * self.num_heads :] = 0.0
        probabilities = []
        for i, bins in enumerate(self.bins):
            q_GWD, k_GWD, v_GWD = self._in_bins(rows, bins)
            scores = _product(q_GWD, k_GWD.mT, self.scale)
            bias = bins.bias(self.window, self.is_causal, rows.dtype)
            scores.view(bins.num, -1, bins.width, bins.width).add_(bias)
            if position_bias is not None:
                cut = position_bias[..., : bins.width, : bins.width].to(rows.dtype)
                scores.view(bins.num, -1, bins.width, bins.width).add_(cut)
            weights = probability = scores.softmax(-1)
            if masks:
                weights = probability * masks[i].view_as(scores).to(rows.dtype)
            _put(_product(weights, v_GWD, grow), bins, 1, self.num_heads, out)
            probabilities.append(probability)
        return out.view(num_tokens, hidden), grow, [*probabilities, *masks]

    def backward(
        self, grad_TH: Tensor, qkv_T3H: Tensor, grow: float, saved: Sequence[Tensor], with_bias: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of queries, keys and values, shaped as they are; and that of ``position_bias``, if wanted."""
        rows = qkv_T3H.view(-1, grad_TH.shape[1] // self.num_heads)
        grad = grad_TH.reshape(-1, rows.shape[-1])
        into = torch.empty_like(rows)
        into[self.bins[-1].stop * 3 * self.num_heads :] = 0.0
        probabilities, masks = saved[: len(self.bins)], saved[len(self.bins) :]
        widest = self.bins[-1].width
        g_bias = grad.new_zeros(1, self.num_heads, widest, widest) if with_bias else None
        for i, (bins, probability) in enumerate(zip(self.bins, probabilities, strict=True)):
            # Not saved: in bins they take more memory than in the stream.
            q_GWD, k_GWD, v_GWD = self._in_bins(rows, bins)
            places = bins.places(1, self.num_heads)
            g_GWD = grad.index_select(0, places.rows).index_fill_(0, places.empty, 0.0).view_as(q_GWD)
            g_weights, weights = _product(g_GWD, v_GWD.mT, grow), probability
            if masks:
                mask = masks[i].view_as(weights).to(rows.dtype)
                g_weights *= mask
                weights = weights * mask
            g_scores = torch._softmax_backward_data(g_weights, probability, -1, rows.dtype)
            if g_bias is not None:
                g_bias[0, :, : bins.width, : bins.width] += g_scores.view(bins.num, -1, bins.width, bins.width).sum(0)
            parts = rows.new_empty(3, *q_GWD.shape)
            _product(g_scores, k_GWD, self.scale, parts[0])
            _product(g_scores.mT, q_GWD, self.scale, parts[1])
            _product(weights.mT, g_GWD, grow, parts[2])
            _put(parts, bins, 3, self.num_heads, into)
        return into.view(qkv_T3H.shape), g_bias

    def _in_bins(self, rows: Tensor, bins: Bins) -> tuple[Tensor, ...]:
        """Queries, keys and values, (G, W, D) each."""
        padded = rows.index_select(0, bins.places(3, self.num_heads).rows)
        return padded.view(3, -1, bins.width, rows.shape[-1]).unbind(0)


def attend_on_host(
    query: Tensor, key: Tensor, value: Tensor, attention: HostAttention, position_bias: Tensor | None = None
) -> Tensor:
    """Attention with its gradient.

    Args:
        query, key, value: (1, N, T, D); computed in the type of the values.
        position_bias: as :meth:`HostAttention.forward` takes it.

    Returns:
        (1, T, N, D).
    """
    _, num_heads, num_tokens, _ = query.shape
    with torch.autocast("cpu", enabled=False):  # which would compute the softmax in fp32, unlike SDPA
        qkv_T3H = torch.stack([x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value)], dim=1).flatten(1)
        attended: Tensor = _HostAttention.apply(qkv_T3H, attention, position_bias)  # type: ignore[no-untyped-call]
    return attended.view(1, num_tokens, num_heads, -1)


class _HostAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_T3H: Tensor, attention: HostAttention, position_bias: Tensor | None) -> Tensor:
        out, ctx.grow, saved = attention.forward(qkv_T3H, position_bias)
        ctx.save_for_backward(qkv_T3H, *saved)
        ctx.attention = attention
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv_T3H, *saved = ctx.saved_tensors  # read once: checkpointing gives them away
        with torch.autocast("cpu", enabled=False):
            g_qkv, g_bias = ctx.attention.backward(grads[0], qkv_T3H, ctx.grow, saved, ctx.needs_input_grad[2])
        return g_qkv, None, g_bias


def _round_up(number: int) -> int:
    return -(-number // _WIDTH_STEP) * _WIDTH_STEP


def _put(padded: Tensor, bins: Bins, num_streams: int, num_heads: int, stream: Tensor) -> None:
    """Write the tokens of (C, G, W, D) to their rows of the stream."""
    num = num_streams * num_heads
    rows = stream[bins.start * num : bins.stop * num]
    torch.index_select(padded.view(-1, padded.shape[-1]), 0, bins.places(num_streams, num_heads).slots, out=rows)


def _product(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """``scale * a @ b``, rounded once."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale, out=out)
