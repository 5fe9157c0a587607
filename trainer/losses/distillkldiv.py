"""A teacher's ranking as the goal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from trainer.batch import Targets
from trainer.losses.base import Loss
from trainer.losses.marginmse import candidate_scores
from trainer.losses.similarity import Similarity, pairwise_similarity
from trainer.messages import refuse_not_positive


class DistillKLDiv(Loss):
    """Mean over rows of KL(q || p) / s^2, with p = softmax(s sim(a, c)) over the row's candidates c, and q =
    softmax(t score) of a teacher's scores of the same.

    The data gives one score for each candidate: columns score_1 of the positive, score_2, ... of the negatives. Lin et
    al. 2020, https://arxiv.org/abs/2010.11386; the factor is Hinton et al.'s, 2015, https://arxiv.org/abs/1503.02531,
    which keeps gradients of one size. sentence-transformers' DistillKLDivLoss, with scales = 1 / temperatures.

    Args:
        scale: s, the inverse temperature of the student.
        teacher_scale: t, that of the teacher; unset: the student's.
        similarity: dot product, whose range is the teacher's, or cosine.
    """

    needs = frozenset({"candidate_scores"})
    min_columns = 3
    max_columns = None
    citation = """@misc{lin2020distillingdenserepresentationsranking,
    title = {Distilling Dense Representations for Ranking using Tightly-Coupled Teachers},
    author = {Sheng-Chieh Lin and Jheng-Hong Yang and Jimmy Lin},
    year = {2020},
    eprint = {2010.11386},
    archivePrefix = {arXiv},
}"""

    def __init__(
        self, scale: float = 1.0, teacher_scale: Optional[float] = None, similarity: Similarity = "dot"
    ) -> None:
        super().__init__()
        self.scale = scale
        self.teacher_scale = scale if teacher_scale is None else teacher_scale
        refuse_not_positive("DistillKLDiv scale", self.scale)
        refuse_not_positive("DistillKLDiv teacher_scale", self.teacher_scale)
        self.similarity: Similarity = similarity

    def scores_taken(self, num_candidates: int) -> tuple[int, ...]:
        return (num_candidates,)

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        anchors_BD, *candidates = columns
        scores_BK = candidate_scores(targets)
        if scores_BK.shape[1] != len(candidates):
            raise ValueError(
                f"DistillKLDiv has {len(candidates)} candidates and {scores_BK.shape[1]} scores a row; give one for "
                "each, of the positive first"
            )
        ours_BK = torch.stack([pairwise_similarity(anchors_BD, c, self.similarity) for c in candidates], dim=1)
        log_p_BK = torch.log_softmax(self.scale * ours_BK, dim=1)
        log_q_BK = torch.log_softmax(self.teacher_scale * scores_BK, dim=1)
        terms_B = (log_q_BK.exp() * (log_q_BK - log_p_BK)).sum(dim=1)
        return targets.weight * terms_B.sum() / self.scale**2
