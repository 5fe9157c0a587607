"""Attention over packed segments, registered with transformers under one name.

The stream holds segments sorted by length. A GPU attends without padding: in half precision and without dropout by
torch's ``varlen_attn``, else by its attention (SDPA) over a jagged tensor, which picks a kernel by type and device and
has its dropout. Biases by position, and causal layers and sliding windows that the first does not take, are cut into a
few buckets of neighbouring segments, each padded to its longest, which is little longer than its shortest. On a CPU
:func:`attend_on_host` is faster with dropout, with biases and for short texts, and buckets for the others. Who sees
whom is counted inside a segment.

Shape suffixes: T tokens of the stream, N heads, D head dimension, S segments, L longest segment of a bucket.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trainer.encoder.host_attention import Bins, HostAttention, attend_on_host, plan_bins, within

# Said once by each process that makes a jagged tensor.
warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype stage")

PACKED_ATTENTION = "packed_segments"

# Devices whose kernels need no padding.
_GPUS = {"cuda"}
# On a CPU, without dropout: longer segments take SDPA, which keeps no matrix of probabilities.
_LONG = 128


@dataclass(frozen=True, eq=False)
class Bucket:
    """Neighbouring segments of the stream that attend in one call.

    Attributes:
        start, stop: tokens of the stream.
        num: segments.
        longest: L.
        slots: (num * L,) token of the bucket in each padded slot, 0 in padding; None where lengths are equal.
        real: (stop - start,) slot of each token; None where lengths are equal.
        mask: (num, 1, 1, L) True where a slot holds a token; None where lengths are equal.
        windows: masks of sliding windows that a layer has asked for, for the layers behind it.
    """

    start: int
    stop: int
    num: int
    longest: int
    slots: Tensor | None = None
    real: Tensor | None = None
    mask: Tensor | None = None
    windows: dict[tuple[int, bool], Tensor] = field(default_factory=dict)

    def window(self, size: int, is_causal: bool, device: torch.device) -> Tensor:
        """(num or 1, 1, L, L) True where a query sees a key: less than ``size`` places away, and not behind it. Kept
        for the layers behind the one that asks."""
        if (size, is_causal) not in self.windows:
            every = torch.ones((1, 1, 1, self.longest), dtype=torch.bool, device=device)
            is_key = every if self.mask is None else self.mask
            self.windows[size, is_causal] = within(is_key, self.longest, size, is_causal)
        return self.windows[size, is_causal]


@dataclass(frozen=True, eq=False)
class Packing:
    """How a stream is cut, made when a layer asks for it. One object and no list: compiled layers would be compiled for
    each length of it.

    Attributes:
        lengths: of the segments, ascending.
        device: of the stream.
        position_bias: gives for L places in a row what is added to their scores, (1, N, L, L), a function of head and
            distance alone. Asked once: where weights are gathered for it, all ranks must ask as often. None: nothing.
    """

    lengths: Sequence[int]
    device: torch.device
    position_bias: Callable[[int], Tensor] | None = None

    @cached_property
    def boundaries(self) -> Tensor:
        """(S + 1,) int32: where segments start, and the end of the last."""
        starts = torch.zeros(len(self.lengths) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(self.lengths), 0, dtype=torch.int32, out=starts[1:])
        return starts.to(self.device, non_blocking=True)

    @cached_property
    def buckets(self) -> Sequence[Bucket]:
        """Several on a CPU, where arithmetic on padding costs most; two on a GPU, where small batches are bound by the
        number of kernels."""
        num_buckets = 3 if self.device.type == "cpu" else 2
        buckets: list[Bucket] = []
        for part in torch.tensor(self.lengths).tensor_split(min(num_buckets, len(self.lengths))):
            buckets.append(_bucket(part, buckets[-1].stop if buckets else 0, self.device))
        return buckets

    @cached_property
    def bins(self) -> Sequence[Bins]:
        """The same for :func:`attend_on_host`."""
        return plan_bins(self.lengths)

    @cached_property
    def bucket_biases(self) -> Sequence[Tensor]:
        """Of each bucket, (num or 1, N, L, L), -inf for keys in padding; empty without a bias."""
        if self.position_bias is None:
            return []
        whole = self.position_bias(self.lengths[-1])
        biases = []
        for bucket in self.buckets:
            # Rows of a view would start where a GPU's kernel does not take them.
            bias = whole[..., : bucket.longest, : bucket.longest].contiguous()
            biases.append(bias if bucket.mask is None else bias.masked_fill(~bucket.mask, -torch.inf))
        return biases

    @cached_property
    def bin_bias(self) -> Tensor | None:
        """(1, N, W, W) for the widest bins. One for all, so that the graph is the same on every rank: its shape is part
        of the order in which gradients come, by which ZeRO's second stage adds them."""
        return None if self.position_bias is None else self.position_bias(self.bins[-1].width)

    def takes_host(self, dropout: float) -> bool:
        """Whether attention with this dropout is that of :func:`attend_on_host`. SDPA keeps the probabilities, too, for
        the gradient of a bias."""
        is_short = self.lengths[-1] <= _LONG
        return self.device.type == "cpu" and (dropout > 0.0 or is_short or self.position_bias is not None)


def padded_layout(lengths_S: Tensor) -> tuple[Tensor, Tensor]:
    """Segments padded to the longest, on the host: (S, L) True where a slot holds a token, and the slot of each
    token (T,)."""
    mask_SL = torch.arange(int(lengths_S.max())) < lengths_S[:, None]
    return mask_SL, mask_SL.flatten().nonzero()[:, 0]


def _bucket(lengths: Tensor, start: int, device: torch.device) -> Bucket:
    num, longest, tokens = len(lengths), int(lengths[-1]), int(lengths.sum())
    if int(lengths[0]) == longest:
        return Bucket(start, start + tokens, num, longest)
    mask, real = padded_layout(lengths)
    slots = torch.zeros(num * longest, dtype=torch.int64)
    slots[real] = torch.arange(tokens)
    slots, real, mask = (t.to(device, non_blocking=True) for t in (slots, real, mask[:, None, None, :]))
    return Bucket(start, start + tokens, num, longest, slots, real, mask)


def plan_buckets(lengths: Sequence[int], device: torch.device) -> Packing:
    """How to cut a stream of segments of ascending length."""
    assert all(a <= b for a, b in pairwise(lengths)), "segments must be sorted by length"
    return Packing(lengths, device)


def _padded(x_TND: Tensor, bucket: Bucket) -> Tensor:
    """The tokens of a bucket, segment by segment: (T, N, D) -> (num, N, L, D)."""
    if bucket.slots is not None:
        x_TND = x_TND.index_select(0, bucket.slots)
    return x_TND.reshape(bucket.num, bucket.longest, *x_TND.shape[1:]).transpose(1, 2)


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Block-diagonal attention over one packed stream; transformers' attention interface.

    Args:
        module: the attention layer; its ``is_causal``, and that of its config, say whether a token sees only those
            before it.
        query, key, value: (1, N, T, D); keys and values may have fewer heads, each for a group of queries.
        packing: from :func:`plan_buckets`; its buckets cover the stream, but for padding at its end, whose
            attention is 0.
        sliding_window: a token sees those less than so many places away; None: all of its segment.

    Returns:
        (1, T, N, D) and no weights.
    """
    assert packing is not None, "packed attention needs the buckets of the stream"
    is_causal = bool(getattr(module, "is_causal", False))
    config: Any = getattr(module, "config", None)
    is_decoder = is_causal or getattr(config, "use_bidirectional_attention", False)  # the latter is Gemma 3's
    if is_decoder and not getattr(config, "is_causal", True):
        # transformers makes a decoder look both ways by its config; the window's last place counts in such masks.
        is_causal, sliding_window = False, None if sliding_window is None else sliding_window + 1
    if (group := query.shape[1] // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    if packing.takes_host(dropout):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        host = HostAttention(packing.bins, query.shape[1], scale, dropout, sliding_window, is_causal)
        return attend_on_host(query, key, value, host, packing.bin_bias), None
    if sliding_window is not None and sliding_window >= packing.lengths[-1]:
        sliding_window = None
    # Not x[0], whose backward fills a whole gradient.
    streams = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    if packing.device.type in _GPUS and packing.position_bias is None:
        if dropout == 0.0 and takes_varlen(value.device, value.dtype, value.shape[-1]):
            return _attend_by_varlen(streams, packing, scaling, sliding_window, is_causal)[None], None
        if sliding_window is None and not is_causal:
            return _attend_jagged(streams, packing, dropout, scaling)[None], None
    return _attend_in_buckets(streams, packing, dropout, scaling, sliding_window, is_causal)[None], None


@cache
def _has_varlen(device: torch.device) -> bool:
    """On GPUs since Ampere; with windows since torch 2.11."""
    has_windows = "window_size" in signature(varlen_attn).parameters
    return has_windows and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def takes_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether a GPU's kernel takes a stream of segments as it is."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return is_half and head_size % 8 == 0 and head_size <= 256 and _has_varlen(device)


def _attend_by_varlen(
    streams: Sequence[Tensor], packing: Packing, scaling: float | None, window: int | None, is_causal: bool
) -> Tensor:
    """Queries, keys and values (T, N, D) to (T, N, D), in the type of the values."""
    query, key, value = (x.to(streams[2].dtype) for x in streams)
    behind = -1 if window is None else window - 1
    boundaries, longest = packing.boundaries, packing.lengths[-1]
    inputs = query, key, value, boundaries, boundaries, longest, longest
    attended = varlen_attn(*inputs, scale=scaling, window_size=(behind, 0 if is_causal else behind))
    assert isinstance(attended, Tensor)
    return attended


def _attend_jagged(streams: Sequence[Tensor], packing: Packing, dropout: float, scaling: float | None) -> Tensor:
    """Queries, keys and values (T, N, D) to (T, N, D), in the type of the values."""
    shortest, longest = packing.lengths[0], packing.lengths[-1]
    query, key, value = (
        # Told the extremes, it does not ask the device for them.
        torch.nested.nested_tensor_from_jagged(
            x.to(streams[2].dtype).contiguous(), packing.boundaries, min_seqlen=shortest, max_seqlen=longest
        ).transpose(1, 2)
        for x in streams
    )
    attended = scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
    tokens: Tensor = attended.transpose(1, 2).values()
    return tokens


def _attend_in_buckets(
    streams_TND: Sequence[Tensor],
    packing: Packing,
    dropout: float,
    scaling: float | None,
    window: int | None,
    is_causal: bool,
) -> Tensor:
    """Queries, keys and values (T, N, D) to (T, N, D); 0 for what stands behind the last bucket."""
    buckets, biases = packing.buckets, packing.bucket_biases
    num_padding = len(streams_TND[0]) - buckets[-1].stop
    sizes = [*(bucket.stop - bucket.start for bucket in buckets), num_padding]
    # One split, not a slice per bucket: the backward of a slice fills a gradient as long as the stream.
    streams = [x_TND.split(sizes) for x_TND in streams_TND]
    parts = []
    for i, (bucket, *tokens) in enumerate(zip(buckets, *(stream[:-1] for stream in streams), strict=True)):
        q_SNLD, k_SNLD, v_SNLD = (_padded(x_TND, bucket) for x_TND in tokens)
        mask, causal = biases[i].to(q_SNLD.dtype) if biases else bucket.mask, False
        if window is not None and window < bucket.longest:
            mask = bucket.window(window, is_causal, q_SNLD.device)
        elif is_causal:  # hides padding, too
            mask, causal = None, True
        out_SNLD = scaled_dot_product_attention(
            q_SNLD, k_SNLD, v_SNLD, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling
        )
        out = out_SNLD.transpose(1, 2).flatten(0, 1)
        parts.append(out if bucket.real is None else out.index_select(0, bucket.real))
    if num_padding:
        parts.append(torch.zeros_like(streams[0][-1]))
    return torch.cat(parts)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
