"""Attention on a GPU in half precision, forward and backward, without a graph: the kernel (Dao 2023,
https://arxiv.org/abs/2307.08691) behind torch's ``varlen_attn``, which takes no dropout, and its jagged attention.

Shape suffixes: T tokens of the stream, N heads, D head dimension, H = N D, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FlashAttention:
    """Attention of each segment to itself; takes and gives what ``HostAttention`` does.

    Attributes:
        boundaries: (S + 1,) int32, on the device: where segments start, and the end of the last.
        longest: tokens of the longest.
        num_heads: N.
        scale: of the scores.
        rate: of the dropout of attention probabilities.
    """

    boundaries: Tensor
    longest: int
    num_heads: int
    scale: float
    rate: float = 0.0

    def forward(self, qkv_T3H: Tensor, position_bias: Tensor | None = None) -> tuple[Tensor, float, list[Tensor]]:
        """Queries, keys and values side by side, (T, 3 H), to (T, H); 1, for the kernel scales what dropout keeps; and
        what the backward needs."""
        assert position_bias is None, "the kernel adds no bias"
        boundaries, longest = self.boundaries, self.longest
        out_TND, *saved, _ = torch.ops.aten._flash_attention_forward(
            *self._split(qkv_T3H), boundaries, boundaries, longest, longest, self.rate, False, False, scale=self.scale
        )
        return out_TND.flatten(1), 1.0, [out_TND, *saved]

    def backward(
        self, grad_TH: Tensor, qkv_T3H: Tensor, grow: float, saved: Sequence[Tensor], with_bias: bool = False
    ) -> tuple[Tensor, None]:
        """The gradient of queries, keys and values, shaped as they are."""
        out_TND, logsumexp, *random_state = saved
        boundaries, longest = self.boundaries, self.longest
        grads_TND = torch.ops.aten._flash_attention_backward(
            *(grad_TH.view_as(out_TND), *self._split(qkv_T3H), out_TND, logsumexp),
            *(boundaries, boundaries, longest, longest, self.rate, False, *random_state),
            scale=self.scale,
        )
        return torch.cat([grad.flatten(1) for grad in grads_TND], dim=1), None

    def _split(self, qkv_T3H: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, (T, N, D) each."""
        return qkv_T3H.unflatten(1, (3, self.num_heads, -1)).unbind(1)
