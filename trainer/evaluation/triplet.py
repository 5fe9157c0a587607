"""Triplet accuracy: is the anchor nearer to its positive than to its negative?"""

import math

from torch import Tensor

from trainer.evaluation.base import SIMILARITIES, Evaluator, Rows


class Triplet(Evaluator):
    """Share of rows whose anchor is more similar to the positive than to the negative.

    Metrics are named as in sentence-transformers: `cosine_accuracy`, `dot_accuracy`, `euclidean_accuracy`,
    `manhattan_accuracy`, and the best of them as `max_accuracy`. Equal similarities count as wrong.

    Args:
        margin: the positive must be more similar by more than this.
    """

    columns = ("anchor", "positive", "negative")
    text_columns = ("anchor", "positive", "negative")
    primary = "cosine_accuracy"

    def __init__(self, margin: float = 0.0) -> None:
        if not 0.0 <= margin < math.inf:
            raise ValueError(f"Triplet evaluator: margin is {margin:g}; it must be 0 or more, and finite")
        self.margin = margin

    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, float]:
        anchor_BD, positive_BD, negative_BD = self.split(embeddings_ND, rows)
        metrics = {}
        for name, similarity in SIMILARITIES.items():
            right = similarity(anchor_BD, positive_BD) > similarity(anchor_BD, negative_BD) + self.margin
            metrics[f"{name}_accuracy"] = float(right.float().mean())
        metrics["max_accuracy"] = max(metrics.values())
        return metrics
