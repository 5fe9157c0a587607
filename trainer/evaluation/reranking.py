"""Reranking: do the relevant ones of a query's candidates come first?"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import average_precision_score, ndcg_score
from torch import Tensor

from trainer.evaluation.base import Evaluator, Rows, cosine


class Reranking(Evaluator):
    """Quality of the order of each query's candidates by cosine, as the mean over queries.

    A row is a query (`anchor`), a candidate (`positive`) and whether it is relevant (`label`; above 1: how much). Rows
    of the same anchor are its candidates. Queries whose candidates are all relevant, or none, say nothing and are left
    out. Metrics are named as in sentence-transformers: `map`, `mrr@k` and `ndcg@k`; in map and ndcg candidates with the
    same similarity share their places.

    Args:
        at: depth of mrr and ndcg.
    """

    columns = ("anchor", "positive", "label")
    text_columns = ("anchor", "positive")

    def __init__(self, at: int = 10) -> None:
        if at < 1:
            raise ValueError(f"Reranking: at is {at}; it must be 1 or more")
        self.at = at
        self.primary = f"ndcg@{at}"

    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, float]:
        anchor_BD, positive_BD = self.split(embeddings_ND, rows)
        similarities_B = cosine(anchor_BD, positive_BD).numpy()
        labels_B = np.asarray(rows["label"])
        candidates: dict[str, list[int]] = {}
        for row, query in enumerate(rows["anchor"]):
            candidates.setdefault(query, []).append(row)
        precisions, ranks, gains = [], [], []
        for places in candidates.values():
            relevance, scores = labels_B[places], similarities_B[places]
            relevant = relevance > 0
            if relevant.all() or not relevant.any():
                continue
            order = torch.argsort(-torch.from_numpy(scores), stable=True).numpy()
            found = np.flatnonzero(relevant[order[: self.at]])
            precisions.append(average_precision_score(relevant, scores))
            ranks.append(1.0 / (found[0] + 1) if len(found) else 0.0)
            gains.append(ndcg_score([relevance], [scores], k=self.at))
        if not ranks:
            raise ValueError(
                f"none of {len(candidates):,} queries has both relevant and other candidates; "
                "check the label column of this validation set"
            )
        return {
            "map": float(np.mean(precisions)),
            f"mrr@{self.at}": float(np.mean(ranks)),
            f"ndcg@{self.at}": float(np.mean(gains)),
        }
