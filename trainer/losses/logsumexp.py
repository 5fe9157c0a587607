"""Log-sum-exp of the similarities of queries and candidates, whole or in tiles.

Shape suffixes: B queries, N candidates, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (queries, candidates) that a tile spans, and its similarities -> its logits. Their derivative by the similarity is
# the scale; -inf would make the gradient of a query without candidates nan, so what is left out gets LEFT_OUT.
ToLogits = Callable[[slice, slice, Tensor], Tensor]
LEFT_OUT = torch.finfo(torch.float32).min

# Logits up to which they are kept whole: 64 MiB, of which forward and backward hold about five. Below it memory does
# not count, and the plain form has a third less arithmetic and far fewer kernels to launch; above it tiles are no
# slower on a CPU, for they stay nearer to its caches (2.9 s against 3.3 for 8,192 pairs of 384 dimensions, one core).
MAX_WHOLE = 2**24
TILE = 2048  # queries and candidates of a tile: 16 MiB of logits, enough to keep the matrix units busy


def log_sum_exp(
    queries_BD: Tensor,
    candidates_ND: Tensor,
    scale: float,
    to_logits: ToLogits,
    own_B: Tensor,
    max_whole: int = MAX_WHOLE,
) -> tuple[Tensor, Tensor]:
    """log sum_j exp(logit_ij) of each query, (B,), and its logit with one candidate, (B,), with exact gradients.

    Args:
        queries_BD: their products with the candidates are the similarities.
        candidates_ND: of all queries.
        scale: derivative of a logit by its similarity.
        to_logits: of a tile; it is called again in the backward pass.
        own_B: number of that candidate; its logit is scale times its similarity.
        max_whole: above this number of logits memory grows with B + N, not with B * N.
    """
    # Autocast would round cosines to 3 digits: other hardest texts, and logits off by 0.04 at scale 20.
    with torch.autocast(queries_BD.device.type, enabled=False):
        if len(queries_BD) * len(candidates_ND) > max_whole:
            sums_B = _TiledLogSumExp.apply(queries_BD, candidates_ND, scale, to_logits)
            return sums_B, scale * (queries_BD * candidates_ND[own_B]).sum(dim=-1)
        logits_BN = to_logits(slice(None), slice(None), queries_BD @ candidates_ND.T)
        return torch.logsumexp(logits_BN, dim=1), logits_BN.gather(1, own_B[:, None]).squeeze(1)


class _TiledLogSumExp(torch.autograd.Function):
    """Tile by tile, as Cheng et al. 2024, "Breaking the Memory Barrier: Near Infinite Batch Size Scaling for
    Contrastive Loss" (Inf-CL), https://arxiv.org/abs/2410.17243: no matrix of all logits ever exists.

    With p_ij = exp(logit_ij - lse_i) and g the gradient of lse: dL/dq_i = scale g_i sum_j p_ij c_j and
    dL/dc_j = scale sum_i g_i p_ij q_i; the backward pass computes the p of each tile again.
    """

    @staticmethod
    def forward(ctx: Any, queries_BD: Tensor, candidates_ND: Tensor, scale: float, to_logits: ToLogits) -> Tensor:
        sums_B = queries_BD.new_full((len(queries_BD),), -torch.inf)
        for rows, columns in tiles(len(queries_BD), len(candidates_ND)):
            logits = to_logits(rows, columns, queries_BD[rows] @ candidates_ND[columns].T)
            sums_B[rows] = torch.logaddexp(sums_B[rows], torch.logsumexp(logits, dim=1))
        ctx.save_for_backward(queries_BD, candidates_ND, sums_B)
        ctx.scale, ctx.to_logits = scale, to_logits
        return sums_B

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        queries_BD, candidates_ND, sums_B = ctx.saved_tensors
        by_query, by_candidate = torch.zeros_like(queries_BD), torch.zeros_like(candidates_ND)
        factors_B1 = (ctx.scale * grads[0])[:, None]
        with torch.autocast(queries_BD.device.type, enabled=False):
            for rows, columns in tiles(len(queries_BD), len(candidates_ND)):
                queries, candidates = queries_BD[rows], candidates_ND[columns]
                logits = ctx.to_logits(rows, columns, queries @ candidates.T)
                weights = logits.sub_(sums_B[rows, None]).exp_().mul_(factors_B1[rows])
                by_query[rows].addmm_(weights, candidates)
                by_candidate[columns].addmm_(weights.T, queries)
        return by_query, by_candidate, None, None


def tiles(num_queries: int, num_candidates: int) -> list[tuple[slice, slice]]:
    """Queries and candidates of each tile."""

    def cut(size: int) -> list[slice]:
        return [slice(start, min(start + TILE, size)) for start in range(0, size, TILE)]

    return [(rows, columns) for rows in cut(num_queries) for columns in cut(num_candidates)]
