"""Regression of the cosine on a score."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trainer.batch import Targets
from trainer.losses.base import SENTENCE_BERT, Loss
from trainer.losses.similarity import pairwise_cosine


class CosineSimilarity(Loss):
    """Mean over rows of (cos(u_i, v_i) - score_i)^2, scores in -1..1.

    Reimers and Gurevych, "Sentence-BERT", EMNLP 2019, https://arxiv.org/abs/1908.10084;
    sentence-transformers' CosineSimilarityLoss.
    """

    needs = frozenset({"scores"})
    score_range = (-1.0, 1.0)
    citation = SENTENCE_BERT

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        assert targets.scores_B is not None
        error_B = pairwise_cosine(columns[0], columns[1]) - targets.scores_B
        return targets.weight * error_B.square().sum()
