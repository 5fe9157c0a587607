"""Ranking of pairs by their scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.batch import Targets
from trainer.distributed.gather import gather_rows
from trainer.losses.base import Loss
from trainer.losses.similarity import pairwise_cosine
from trainer.messages import refuse_not_positive


class CoSENT(Loss):
    """log(1 + sum over pairs of rows with score_i < score_j of exp(s * (cos_i - cos_j))), on the global batch.

    Su 2022, https://kexue.fm/archives/8847; sentence-transformers' CoSENTLoss.

    Args:
        scale: s, the inverse temperature.
    """

    needs = frozenset({"scores"})
    citation = """@article{10531646,
    author = {Huang, Xiang and Peng, Hao and Zou, Dongcheng and Liu, Zhiwei and Li, Jianxin and Liu, Kay and
              Wu, Jia and Su, Jianlin and Yu, Philip S.},
    title = {CoSENT: Consistent Sentence Embedding via Similarity Ranking},
    journal = {IEEE/ACM Transactions on Audio, Speech, and Language Processing},
    year = {2024},
    doi = {10.1109/TASLP.2024.3402087},
}"""

    def __init__(self, scale: float = 20.0) -> None:
        super().__init__()
        refuse_not_positive(f"{type(self).__name__} scale", scale)
        self.scale = scale

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        assert targets.scores_B is not None
        rows_per_rank = targets.rows_per_rank
        # Only (b,) cosines cross the ranks; the value is the same on each of them.
        cosines_b = self.scale * gather_rows(self.similarities(columns), rows_per_rank)
        scores_b = gather_rows(targets.scores_B, rows_per_rank)
        differences = cosines_b[:, None] - cosines_b[None, :]
        differences = differences.masked_fill(scores_b[:, None] >= scores_b[None, :], -1e12)
        return torch.logsumexp(torch.cat([differences.new_zeros(1), differences.flatten()]), dim=0)

    def similarities(self, columns: Sequence[Tensor]) -> Tensor:
        """Of each pair, (B,)."""
        return pairwise_cosine(columns[0], columns[1])
