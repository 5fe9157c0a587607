"""In-batch negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.batch import Targets
from trainer.distributed.gather import gather_rows
from trainer.losses.base import Loss
from trainer.losses.similarity import Similarity, similarity_matrix


class InfoNCE(Loss):
    """Cross entropy of each anchor's own positive among all positives and negatives of the global batch.

    l_i = -log( exp(s * sim(a_i, p_i)) / sum_j exp(s * sim(a_i, c_j)) ), c over every positive and negative
    column of every rank; the loss is the mean over anchors. With one rank it is sentence-transformers'
    MultipleNegativesRankingLoss. van den Oord et al. 2018, https://arxiv.org/abs/1807.03748;
    Henderson et al. 2017, https://arxiv.org/abs/1705.00652.

    Args:
        scale: s, the inverse temperature.
        similarity: cosine or dot product.
    """

    max_columns = None
    in_batch_negatives = True
    citation = """@misc{oord2019representationlearningcontrastivepredictive,
    title = {Representation Learning with Contrastive Predictive Coding},
    author = {Aaron van den Oord and Yazhe Li and Oriol Vinyals},
    year = {2019},
    eprint = {1807.03748},
    archivePrefix = {arXiv},
}"""

    def __init__(self, scale: float = 20.0, similarity: Similarity = "cosine") -> None:
        super().__init__()
        self.scale = scale
        self.similarity: Similarity = similarity

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        rows_per_rank = targets.rows_per_rank
        anchors_BD = columns[0]
        candidates_ND = torch.cat([gather_rows(column, rows_per_rank) for column in columns[1:]])
        logits_BN = self.scale * similarity_matrix(anchors_BD, candidates_ND, self.similarity)
        # Row i of this rank is row first + i of the global batch, and so is its positive.
        first = targets.first_row
        own_B = logits_BN[:, first : first + len(anchors_BD)].diagonal()
        # Written as sentence-transformers writes it: F.cross_entropy rounds differently enough (1e-6 a step) to
        # part the two curves by 1e-4 within 50 steps of Adam.
        return targets.weight * (torch.logsumexp(logits_BN, dim=1) - own_B).sum()

    def describe(self) -> dict[str, Any]:
        return {"scale": self.scale, "similarity": self.similarity}
