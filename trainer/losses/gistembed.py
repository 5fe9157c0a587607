"""In-batch negatives that a guide has looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from trainer.batch import Targets
from trainer.losses.base import Loss
from trainer.losses.inbatch import InBatch, Judge
from trainer.losses.logsumexp import MAX_WHOLE
from trainer.losses.similarity import similarity_matrix
from trainer.messages import refuse_infinite, refuse_not_positive

# A sum over the rows and a product of matrices round apart, by up to 5e-7 at lengths of 32 to 4,096: without it about
# half of the texts that the guide embeds like the positive would be left out, others in other tiles.
_ROUNDING = 1e-6


class GISTEmbed(Loss):
    """InfoNCE on cosines, without the candidates that the guide finds nearer to the query than its own positive.

    The guide is ``model.teacher``. Candidates of an anchor are all positives, anchors and negatives of the global
    batch; all positives are compared with the row's positive too. Solatorio 2024, https://arxiv.org/abs/2402.16829;
    sentence-transformers' GISTEmbedLoss, with scale = 1 / temperature and any number of negative columns.

    Args:
        scale: inverse temperature.
        margin_strategy: a candidate is left out whose similarity under the guide is above g - margin (absolute), or
            above g - margin * |g| (relative), with g that of the anchor and its positive. A tie, to 1e-6, stays in.
        margin: of it.
        contrast_anchors: whether other anchors are candidates.
        contrast_positives: whether positives are compared with positives.
        mask_false_negatives: leave out candidates that are the row's own anchor or positive text once more, or belong
            to a row with its anchor, its positive or its group.
    """

    needs = frozenset({"teacher"})
    max_columns = None
    in_batch_negatives = True
    absent_texts = True
    citation = """@misc{solatorio2024gistembed,
    title = {GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning},
    author = {Aivin V. Solatorio},
    year = {2024},
    eprint = {2402.16829},
    archivePrefix = {arXiv},
}"""

    def __init__(
        self,
        scale: float = 100.0,
        margin_strategy: Literal["absolute", "relative"] = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        mask_false_negatives: bool = True,
    ) -> None:
        super().__init__()
        refuse_not_positive("GISTEmbed scale", scale)
        refuse_infinite("GISTEmbed margin", margin)
        self.scale = scale
        self.margin_strategy = margin_strategy
        self.margin = margin
        self.contrast_anchors = contrast_anchors
        self.contrast_positives = contrast_positives
        self.mask_false_negatives = mask_false_negatives
        self.max_whole = MAX_WHOLE

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        batch = InBatch(columns, targets, "cosine", self.mask_false_negatives, self.contrast_anchors)
        guide = InBatch(targets.extras["teacher"].unbind(dim=1), targets, "cosine", False, self.contrast_anchors)
        own_B = (guide.columns_BD[0] * guide.columns_BD[1]).sum(dim=-1)
        bound_B = own_B - self.margin * (own_B.abs() if self.margin_strategy == "relative" else 1.0)
        anchors = batch.candidates(0, batch.documents, _judge(guide, 0, batch.documents, bound_B))
        sums_B, own_logits_B = anchors.sums(self.scale, self.max_whole)
        all_sums = [sums_B]
        if self.contrast_anchors:
            others = batch.candidates(0, range(1), _judge(guide, 0, range(1), bound_B))
            all_sums.append(others.sums(self.scale, self.max_whole)[0])
        if self.contrast_positives:
            others = batch.candidates(1, range(1, 2), _judge(guide, 1, range(1, 2), bound_B))
            all_sums.append(others.sums(self.scale, self.max_whole)[0])
        self.last_metrics = anchors.metrics(targets.weight)
        return targets.weight * (torch.logsumexp(torch.stack(all_sums), dim=0) - own_logits_B).sum()


def _judge(guide: InBatch, query: int, among: range, bound_B: Tensor) -> Judge:
    """Names the candidates that are too near to be negatives."""
    seen = guide.candidates(query, among)

    def judge(rows: slice, columns: slice) -> Tensor:
        found_BN = similarity_matrix(seen.queries_BD[rows], seen.candidates_ND[columns], "dot")
        return found_BN > bound_B[rows, None] + _ROUNDING

    return judge
