"""Pairs that belong together and pairs that do not, the hard ones of each batch only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.batch import Targets
from trainer.distributed.gather import gather_rows
from trainer.losses.base import SENTENCE_BERT
from trainer.losses.contrastive import Contrastive
from trainer.losses.similarity import pairwise_distance


class OnlineContrastive(Contrastive):
    """Sum of d^2 over hard positives and of max(0, margin - d)^2 over hard negatives of the global batch.

    A pair of label 0 is hard where its distance d is below the largest of label 1, a pair of label 1 where it is above
    the smallest of label 0; where the batch has none of the other label, the mean of its own stands in for it. A sum:
    it grows with the batch. sentence-transformers' OnlineContrastiveLoss.

    Args:
        margin: distance from which on a pair of label 0 costs nothing.
        distance: cosine (1 - cosine similarity), euclidean or manhattan.
    """

    citation = SENTENCE_BERT

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        assert targets.labels_B is not None
        rows_per_rank = targets.rows_per_rank
        distances_B = pairwise_distance(columns[0], columns[1], self.distance)
        # The bounds are numbers, not functions of the embeddings: they cross the ranks without a gradient.
        distances_b = gather_rows(distances_B.detach(), rows_per_rank)
        labels_b = gather_rows(targets.labels_B, rows_per_rank)
        together_b, apart_b = labels_b == 1, labels_b == 0
        furthest = torch.where(together_b, distances_b, -torch.inf).amax()
        nearest = torch.where(apart_b, distances_b, torch.inf).amin()
        below = torch.where(together_b.any(), furthest, _mean(distances_b, apart_b))
        above = torch.where(apart_b.any(), nearest, _mean(distances_b, together_b))
        hard_negative_B = (targets.labels_B == 0) & (distances_B < below)
        hard_positive_B = (targets.labels_B == 1) & (distances_B > above)
        missing_B = F.relu(self.margin - distances_B)
        total = (hard_positive_B * distances_B.square()).sum() + (hard_negative_B * missing_B.square()).sum()
        return len(rows_per_rank) * total


def _mean(values_b: Tensor, chosen_b: Tensor) -> Tensor:
    """Of the chosen values; 0 where there is none. Without reading their number, which would stall a GPU."""
    return (values_b * chosen_b).sum() / chosen_b.sum().clamp(min=1)
