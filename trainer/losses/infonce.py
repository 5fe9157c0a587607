"""In-batch negatives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, Optional

import torch
from torch import Tensor

from trainer.batch import Targets
from trainer.losses.base import Loss
from trainer.losses.inbatch import Candidates, InBatch
from trainer.losses.logsumexp import MAX_WHOLE
from trainer.losses.similarity import Similarity
from trainer.messages import refuse_infinite, refuse_not_positive

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
Hardness = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]


class InfoNCE(Loss):
    """Cross entropy of each anchor's own positive among all positives and negatives of the global batch.

    l_i = -log( exp(s * sim(a_i, p_i)) / sum_j exp(s * sim(a_i, c_j)) ), c over every positive and negative
    column of every rank; the loss is the mean over anchors. On one rank and without the mask it is
    sentence-transformers' MultipleNegativesRankingLoss. van den Oord et al. 2018, https://arxiv.org/abs/1807.03748;
    Henderson et al. 2017, https://arxiv.org/abs/1705.00652.

    Further directions add candidates to the sum: other anchors (query_to_query), and, compared with the positive
    instead of the anchor, all anchors (doc_to_query) and the documents of other rows (doc_to_doc); all four are GTE's
    loss, Li et al. 2023, https://arxiv.org/abs/2308.03281. With partition per_direction each direction has a sum of
    its own and the loss is their mean; query_to_doc and doc_to_query so are the symmetric loss of Radford et al. 2021.

    Args:
        scale: s, the inverse temperature.
        similarity: cosine or dot product.
        directions: whose similarities are summed; query_to_doc is among them.
        partition: one sum over all directions (joint), or one for each.
        hardness: negatives whose logit is raised by hardness_strength * sim, without a gradient: the hard ones count
            for more (Lan et al. 2025, LLaVE, https://arxiv.org/abs/2503.04812).
        hardness_strength: of it.
        mask_false_negatives: leave out candidates that are the row's own anchor or positive text once more, or belong
            to a row with its anchor, its positive or its group.
    """

    max_columns = None
    in_batch_negatives = True
    absent_texts = True
    citation = """@misc{oord2019representationlearningcontrastivepredictive,
    title = {Representation Learning with Contrastive Predictive Coding},
    author = {Aaron van den Oord and Yazhe Li and Oriol Vinyals},
    year = {2019},
    eprint = {1807.03748},
    archivePrefix = {arXiv},
}"""

    def __init__(
        self,
        scale: float = 20.0,
        similarity: Similarity = "cosine",
        directions: Sequence[Direction] = ("query_to_doc",),
        partition: Literal["joint", "per_direction"] = "joint",
        hardness: Optional[Hardness] = None,
        hardness_strength: float = 0.0,
        mask_false_negatives: bool = True,
    ) -> None:
        super().__init__()
        refuse_not_positive("InfoNCE scale", scale)
        if "query_to_doc" not in directions:
            raise ValueError(f"InfoNCE directions are {', '.join(directions)}; add query_to_doc, it holds the positive")
        if twice := sorted({direction for direction in directions if directions.count(direction) > 1}):
            raise ValueError(f"InfoNCE directions name {' and '.join(twice)} more than once; name each once")
        without = sorted({"query_to_query", "doc_to_doc"} & set(directions))
        if partition == "per_direction" and without:
            raise ValueError(
                f"InfoNCE partition per_direction: {' and '.join(without)} have no positive to find; set partition to "
                "joint, or leave them out"
            )
        refuse_infinite("InfoNCE hardness_strength", hardness_strength)
        if (hardness is None) != (hardness_strength == 0.0) or hardness_strength < 0.0:
            raise ValueError(
                f"InfoNCE hardness is {hardness} and hardness_strength {hardness_strength:g}: set both, the strength "
                "above 0, or none"
            )
        self.scale = scale
        self.similarity: Similarity = similarity
        self.directions = tuple(directions)
        self.partition = partition
        self.hardness = hardness
        self.hardness_strength = hardness_strength
        self.mask_false_negatives = mask_false_negatives
        self.max_whole = MAX_WHOLE

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        with_anchors = not {"query_to_query", "doc_to_query"}.isdisjoint(self.directions)
        batch = InBatch(columns, targets, self.similarity, self.mask_false_negatives, with_anchors)
        wanted: dict[Direction, tuple[int, range]] = {
            "query_to_doc": (0, batch.documents),
            "query_to_query": (0, range(1)),
            "doc_to_query": (1, range(1)),
            "doc_to_doc": (1, batch.documents),
        }
        anchors = batch.candidates(*wanted["query_to_doc"])
        raised = None if self.hardness is None else partial(_hard, anchors, self.hardness)
        sums_B, own_B = anchors.sums(self.scale, self.max_whole, raised, self.hardness_strength)
        others = [wanted[direction] for direction in self.directions if direction != "query_to_doc"]
        all_sums = [sums_B, *(batch.candidates(*other).sums(self.scale, self.max_whole)[0] for other in others)]
        if self.partition == "per_direction":
            sums_B = torch.stack(all_sums).mean(dim=0)
        elif others:
            sums_B = torch.logsumexp(torch.stack(all_sums), dim=0)
        self.last_metrics = anchors.metrics(targets.weight)
        # Written as sentence-transformers writes it: F.cross_entropy rounds differently enough (1e-6 a step) to
        # part the two curves by 1e-4 within 50 steps of Adam.
        return targets.weight * (sums_B - own_B).sum()


def _hard(candidates: Candidates, hardness: Hardness, rows: slice, columns: slice) -> Tensor:
    """Which candidates' logits are raised, (B, N)."""
    if hardness == "in_batch_negatives":
        return ~candidates.same_row(rows, columns)
    if hardness == "hard_negatives":
        return candidates.same_row(rows, columns) & (candidates.column_N[columns] > 1)
    return ~candidates.own(rows, columns)
