"""Triplets as the data gives them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from trainer.batch import Targets
from trainer.losses.base import Loss
from trainer.losses.batchtriplet import BatchTriplet
from trainer.losses.similarity import Distance, distance_limit, pairwise_distance
from trainer.messages import refuse_not_positive


class Triplet(Loss):
    """Mean over rows of max(0, d(anchor, positive) - d(anchor, negative) + margin).

    Hermans et al. 2017, https://arxiv.org/abs/1703.07737; sentence-transformers' TripletLoss.

    Args:
        margin: least gap wanted between the two distances, in units of the distance.
        distance: euclidean, cosine (1 - cosine similarity) or manhattan.
    """

    min_columns = 3
    max_columns = 3
    citation = BatchTriplet.citation

    def __init__(self, margin: float = 5.0, distance: Distance = "euclidean") -> None:
        super().__init__()
        refuse_not_positive("Triplet margin", margin, or_zero=True)
        self.margin = margin
        self.distance: Distance = distance

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        anchors_BD, positives_BD, negatives_BD = columns
        to_positive_B = pairwise_distance(anchors_BD, positives_BD, self.distance)
        to_negative_B = pairwise_distance(anchors_BD, negatives_BD, self.distance)
        return targets.weight * F.relu(to_positive_B - to_negative_B + self.margin).sum()

    def margin_limit(self, normalized: bool) -> float | None:
        return distance_limit(self.distance, normalized)
