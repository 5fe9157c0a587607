"""Pairs that belong together, pairs that do not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from trainer.batch import Targets
from trainer.losses.base import Loss
from trainer.losses.similarity import Distance, distance_limit, pairwise_distance
from trainer.messages import refuse_not_positive


class Contrastive(Loss):
    """Mean over rows of y/2 d^2 + (1 - y)/2 max(0, margin - d)^2, with d the distance of the pair and y its label.

    Label 1 says that the two texts belong together, 0 that they do not. Hadsell et al., "Dimensionality Reduction by
    Learning an Invariant Mapping", CVPR 2006; sentence-transformers' ContrastiveLoss.

    Args:
        margin: distance from which on a pair of label 0 costs nothing.
        distance: cosine (1 - cosine similarity), euclidean or manhattan.
    """

    needs = frozenset({"labels"})
    num_labels = 2
    citation = """@inproceedings{hadsell2006dimensionality,
    author = {Hadsell, R. and Chopra, S. and LeCun, Y.},
    booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
    title = {Dimensionality Reduction by Learning an Invariant Mapping},
    year = {2006},
    pages = {1735-1742},
    doi = {10.1109/CVPR.2006.100},
}"""

    def __init__(self, margin: float = 0.5, distance: Distance = "cosine") -> None:
        super().__init__()
        refuse_not_positive(f"{type(self).__name__} margin", margin)
        self.margin = margin
        self.distance: Distance = distance

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        assert targets.labels_B is not None
        distances_B = pairwise_distance(columns[0], columns[1], self.distance)
        labels_B = targets.labels_B.to(distances_B.dtype)
        missing_B = F.relu(self.margin - distances_B)
        terms_B = labels_B * distances_B.square() + (1.0 - labels_B) * missing_B.square()
        return 0.5 * targets.weight * terms_B.sum()

    def margin_limit(self, normalized: bool) -> float | None:
        return distance_limit(self.distance, normalized)
