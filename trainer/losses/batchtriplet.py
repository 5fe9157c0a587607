"""Triplets mined in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Union

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.batch import Targets
from trainer.distributed.gather import gather_rows
from trainer.losses.base import Loss
from trainer.losses.similarity import distance_limit, distance_matrix
from trainer.messages import refuse_not_positive


class BatchTriplet(Loss):
    """Triplets of an anchor, a text of its label and a text of another, found in the global batch.

    A triplet costs max(0, d(a, p) - d(a, n) + margin), or log(1 + exp(d(a, p) - d(a, n))) with margin soft. Mining:

    - hard: of each anchor its furthest positive and its nearest negative; mean over anchors. An anchor without a
      positive has d(a, p) 0; without a negative d(a, n) is its furthest distance plus the nearest.
    - all: every triplet; mean over those that cost something.
    - semi_hard: of each anchor and positive the nearest negative that is further than the positive, or else the
      furthest negative (none: distance 0); mean over anchors and positives.

    Hermans et al. 2017, https://arxiv.org/abs/1703.07737; semi_hard: Schroff et al. 2015,
    https://arxiv.org/abs/1503.03832. sentence-transformers' BatchHardTripletLoss, BatchHardSoftMarginTripletLoss,
    BatchAllTripletLoss and BatchSemiHardTripletLoss.

    Args:
        mining: which triplets.
        margin: least gap wanted between the two distances, in units of the distance; or soft.
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

    def __init__(
        self,
        mining: Literal["hard", "all", "semi_hard"] = "hard",
        margin: Union[float, Literal["soft"]] = 5.0,
        distance: Literal["euclidean", "cosine"] = "euclidean",
    ) -> None:
        super().__init__()
        if not isinstance(margin, str):
            refuse_not_positive(f"{type(self).__name__} margin", margin, or_zero=True)
        self.mining = mining
        self.margin = margin
        self.distance: Literal["euclidean", "cosine"] = distance

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        assert targets.labels_B is not None
        rows_per_rank = targets.rows_per_rank
        labels_B = targets.labels_B
        texts_ND = gather_rows(columns[0], rows_per_rank)
        labels_N = gather_rows(labels_B, rows_per_rank)
        distances_BN = distance_matrix(columns[0], texts_ND, self.distance)
        same_BN = labels_B[:, None] == labels_N[None, :]
        rows_B = torch.arange(len(labels_B), device=labels_B.device)
        positive_BN = same_BN.clone()
        positive_BN[rows_B, targets.first_row + rows_B] = False  # a text is not its own positive
        if self.mining == "hard":
            terms_B = self._cost(*_hardest(distances_BN, positive_BN, same_BN))
            return targets.weight * terms_B.sum()
        anchor_P, positive_P = positive_BN.nonzero(as_tuple=True)
        positives_P = distances_BN[anchor_P, positive_P]
        if self.mining == "all":
            costs_PN = self._cost(positives_P[:, None], distances_BN[anchor_P])
            costs_PN = costs_PN.masked_fill(same_BN[anchor_P], 0.0)
            total = costs_PN.sum()
            count_P = (costs_PN.detach() > 0.0).sum(dim=1, dtype=torch.float32)
            count_B = torch.zeros_like(labels_B, dtype=torch.float32).index_add(0, anchor_P, count_P)
        else:
            negatives_P = _semi_hard(distances_BN, same_BN)[anchor_P, positive_P]
            total = self._cost(positives_P, negatives_P).sum()
            count_B = positive_BN.sum(dim=1, dtype=torch.float32)
        # The mean is over triplets of all ranks, of which each has another number.
        count = gather_rows(count_B, rows_per_rank).sum().clamp(min=1.0)
        return len(rows_per_rank) * total / count

    def _cost(self, positives: Tensor, negatives: Tensor) -> Tensor:
        gap = positives - negatives
        return F.softplus(gap) if isinstance(self.margin, str) else F.relu(gap + self.margin)

    def margin_limit(self, normalized: bool) -> float | None:
        return None if self.margin == "soft" else distance_limit(self.distance, normalized)


class BatchHardTriplet(BatchTriplet):
    """BatchTriplet with mining hard.

    Args:
        margin: least gap wanted between the two distances, in units of the distance; or soft.
        distance: euclidean, or cosine (1 - cosine similarity).
    """

    def __init__(
        self,
        margin: Union[float, Literal["soft"]] = 5.0,
        distance: Literal["euclidean", "cosine"] = "euclidean",
    ) -> None:
        super().__init__("hard", margin, distance)

    def describe(self) -> dict[str, Any]:
        return {"mining": self.mining, **super().describe()}


def _hardest(distances_BN: Tensor, positive_BN: Tensor, same_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of each anchor to its furthest positive and its nearest negative, (B,) each."""
    furthest_B1 = distances_BN.max(dim=1, keepdim=True).values
    hardest_positive_B = (positive_BN * distances_BN).max(dim=1).values
    return hardest_positive_B, (distances_BN + furthest_B1 * same_BN).min(dim=1).values


def _semi_hard(distances_BN: Tensor, same_BN: Tensor) -> Tensor:
    """For each anchor and text, as if that were its positive, the distance of the anchor to their negative, (B, N).

    By sorting and a binary search: all triplets at once would be (B, N, N).
    """
    negatives_BN = distances_BN.masked_fill(same_BN, torch.inf).sort(dim=1, stable=True).values
    places_BN = torch.searchsorted(negatives_BN.detach(), distances_BN.detach(), right=True)
    further_BN = negatives_BN.gather(1, places_BN.clamp(max=negatives_BN.shape[1] - 1))
    furthest_B1 = distances_BN.masked_fill(same_BN, 0.0).max(dim=1, keepdim=True).values
    return torch.where(further_BN.isfinite(), further_BN, furthest_B1)
