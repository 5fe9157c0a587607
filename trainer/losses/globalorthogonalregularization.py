"""Embeddings that spread over the sphere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.batch import Targets
from trainer.distributed.gather import gather_columns, gather_rows
from trainer.losses.base import Loss
from trainer.losses.similarity import similarity_matrix
from trainer.messages import refuse_not_positive


class GlobalOrthogonalRegularization(Loss):
    """M1^2 + max(0, M2 - 1/D) of each column, M1 and M2 the mean cosine and mean squared cosine of its texts.

    The means are over all pairs of different rows of the global batch; for points drawn evenly from the sphere M1 is 0
    and M2 is 1/D. It regularises: sum it with another loss (WeightedSum). Zhang et al. 2017,
    https://arxiv.org/abs/1708.06320; sentence-transformers' GlobalOrthogonalRegularizationLoss.

    Args:
        mean_weight: of the first term.
        second_moment_weight: of the second.
        aggregation: over columns.
    """

    min_columns = 1
    max_columns = None
    citation = """@misc{zhang2017learningspreadoutlocalfeature,
    title = {Learning Spread-out Local Feature Descriptors},
    author = {Xu Zhang and Felix X. Yu and Sanjiv Kumar and Shih-Fu Chang},
    year = {2017},
    eprint = {1708.06320},
    archivePrefix = {arXiv},
}"""

    def __init__(
        self,
        mean_weight: float = 1.0,
        second_moment_weight: float = 1.0,
        aggregation: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        for name, weight in (("mean_weight", mean_weight), ("second_moment_weight", second_moment_weight)):
            refuse_not_positive(f"GlobalOrthogonalRegularization {name}", weight, or_zero=True)
        if not mean_weight and not second_moment_weight:
            raise ValueError("GlobalOrthogonalRegularization has two weights of 0; give one of them another value")
        self.mean_weight = mean_weight
        self.second_moment_weight = second_moment_weight
        self.aggregation = aggregation

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        columns = [F.normalize(column, dim=-1) for column in columns]
        rows_B = torch.arange(len(columns[0]), device=columns[0].device)
        sums = []
        for column_BD, column_bD in zip(columns, gather_columns(columns, targets.rows_per_rank), strict=True):
            cosines_Bb = similarity_matrix(column_BD, column_bD, "dot")
            itself_Bb = torch.zeros_like(cosines_Bb, dtype=torch.bool)
            itself_Bb[rows_B, targets.first_row + rows_B] = True
            cosines_Bb = cosines_Bb.masked_fill(itself_Bb, 0.0)
            sums += [cosines_Bb.sum(dim=1), cosines_Bb.square().sum(dim=1)]
        # The square of a mean over all pairs is no sum of terms of ranks: the sums of rows cross the ranks, with their
        # gradient, and the value is the same on each of them.
        num_rows, dimension = targets.num_global_rows, columns[0].shape[1]
        totals = gather_rows(torch.stack(sums, dim=1), targets.rows_per_rank).sum(dim=0)
        means_C2 = totals.view(-1, 2) / max(num_rows * (num_rows - 1), 1)
        terms_C = self.mean_weight * means_C2[:, 0].square()
        terms_C = terms_C + self.second_moment_weight * F.relu(means_C2[:, 1] - 1.0 / dimension)
        return terms_C.sum() if self.aggregation == "sum" else terms_C.mean()
