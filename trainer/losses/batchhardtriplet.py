"""Triplets mined in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.batch import Targets
from trainer.distributed.gather import gather_rows
from trainer.losses.base import Loss
from trainer.losses.similarity import similarity_matrix


def euclidean_distances(a_BD: Tensor, b_ND: Tensor) -> Tensor:
    """Euclidean distance of every row of a to every row of b, (B, N); the gradient at distance 0 is 0.

    Taken from differences. The expansion |a|^2 - 2ab + |b|^2 would leave the root of a rounding error between
    equal texts, with a gradient of noise, and a bfloat16 product under autocast.
    """
    return torch.cdist(a_BD, b_ND, compute_mode="donot_use_mm_for_euclid_dist")


class BatchHardTriplet(Loss):
    """Mean over anchors of max(0, d(a, hardest positive) - d(a, hardest negative) + margin).

    The hardest positive is the furthest text of the anchor's label, the hardest negative the nearest of another,
    over the global batch. Without another text of its label an anchor's positive distance is 0; without a text of
    another label its negative distance is its own furthest distance plus the nearest, as in sentence-transformers'
    BatchHardTripletLoss. Hermans et al. 2017, https://arxiv.org/abs/1703.07737.

    Args:
        margin: least gap wanted between the two distances, in units of the distance.
        distance: euclidean, or cosine (1 - cosine similarity).
    """

    needs = frozenset({"labels"})
    min_columns = 1
    max_columns = 1
    positives_by_label = True
    citation = """@misc{hermans2017defense,
    title = {In Defense of the Triplet Loss for Person Re-Identification},
    author = {Alexander Hermans and Lucas Beyer and Bastian Leibe},
    year = {2017},
    eprint = {1703.07737},
    archivePrefix = {arXiv},
}"""

    def __init__(self, margin: float = 5.0, distance: Literal["euclidean", "cosine"] = "euclidean") -> None:
        super().__init__()
        self.margin = margin
        self.distance = distance

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        assert targets.labels_B is not None
        rows_per_rank = targets.rows_per_rank
        anchors_BD, labels_B = columns[0], targets.labels_B
        texts_ND = gather_rows(anchors_BD, rows_per_rank)
        labels_N = gather_rows(labels_B, rows_per_rank)
        if self.distance == "euclidean":
            distances_BN = euclidean_distances(anchors_BD, texts_ND)
        else:
            distances_BN = 1.0 - similarity_matrix(anchors_BD, texts_ND, "cosine")
        if len(anchors_BD) == 0:
            return distances_BN.sum()
        first = targets.first_row
        itself_B = torch.arange(first, first + len(anchors_BD), device=labels_B.device)
        same_BN = labels_B[:, None] == labels_N[None, :]
        positive_BN = same_BN.clone()
        positive_BN[torch.arange(len(anchors_BD)), itself_B] = False
        hardest_positive_B = (positive_BN * distances_BN).max(dim=1).values
        furthest_B1 = distances_BN.max(dim=1, keepdim=True).values
        hardest_negative_B = (distances_BN + furthest_B1 * same_BN).min(dim=1).values
        terms_B = F.relu(hardest_positive_B - hardest_negative_B + self.margin)
        return targets.weight * terms_B.sum()

    def margin_limit(self, normalized: bool) -> float | None:
        """Cosine distances, and euclidean ones between vectors of length 1, are at most 2."""
        return 2.0 if normalized or self.distance == "cosine" else None

    def describe(self) -> dict[str, Any]:
        return {"margin": self.margin, "distance": self.distance}
