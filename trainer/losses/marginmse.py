"""A teacher's margins as the goal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.batch import Targets
from trainer.losses.base import Loss
from trainer.losses.similarity import Similarity, pairwise_similarity


class MarginMSE(Loss):
    """Mean over rows and negatives of (sim(a, p) - sim(a, n) - margin)^2, with the margins of a teacher.

    The data gives, for K negatives, K + 1 scores of the teacher (columns score_1 of the positive, score_2, ...), or K
    margins (score_1, ...; of one negative also score). Hofstätter et al. 2020, https://arxiv.org/abs/2010.02666;
    sentence-transformers' MarginMSELoss.

    Args:
        similarity: dot product, whose range is the teacher's, or cosine.
    """

    needs = frozenset({"candidate_scores"})
    min_columns = 3
    max_columns = None
    citation = """@misc{hofstätter2021improving,
    title = {Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation},
    author = {Sebastian Hofstätter and Sophia Althammer and Michael Schröder and Mete Sertkan and Allan Hanbury},
    year = {2021},
    eprint = {2010.02666},
    archivePrefix = {arXiv},
}"""

    def __init__(self, similarity: Similarity = "dot") -> None:
        super().__init__()
        self.similarity: Similarity = similarity

    def teacher_margin_limit(self, normalized: bool) -> float | None:
        return 2.0 if normalized or self.similarity == "cosine" else None

    def scores_taken(self, num_candidates: int) -> tuple[int, ...]:
        return num_candidates - 1, num_candidates

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        anchors_BD, *candidates = columns
        scores_BK, num_negatives = candidate_scores(targets), len(candidates) - 1
        if scores_BK.shape[1] == num_negatives + 1:
            scores_BK = scores_BK[:, :1] - scores_BK[:, 1:]
        if scores_BK.shape[1] != num_negatives:
            raise ValueError(
                f"MarginMSE has {num_negatives} negatives and {scores_BK.shape[1]} scores a row; give {num_negatives} "
                f"margins, or {num_negatives + 1} scores, of the positive first"
            )
        ours_BN = torch.stack([pairwise_similarity(anchors_BD, c, self.similarity) for c in candidates], dim=1)
        errors_BK = ours_BN[:, :1] - ours_BN[:, 1:] - scores_BK
        return targets.weight * errors_BK.square().sum() / num_negatives


def candidate_scores(targets: Targets) -> Tensor:
    """The scores of a row's candidates, (B, K); a source with one score a row has K = 1."""
    if "scores" in targets.extras:
        return targets.extras["scores"]
    assert targets.scores_B is not None
    return targets.scores_B[:, None]
