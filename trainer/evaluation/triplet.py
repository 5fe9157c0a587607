"""Triplet accuracy: is the anchor nearer to its positive than to its negative?"""

from torch import Tensor

from trainer.evaluation.base import SIMILARITIES, Evaluator, Rows
from trainer.messages import refuse_not_positive


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
    metrics = tuple(f"{name}_accuracy" for name in (*SIMILARITIES, "max"))

    def __init__(self, margin: float = 0.0) -> None:
        refuse_not_positive("Triplet evaluator: margin", margin, or_zero=True)
        self.margin = margin

    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, float]:
        anchor_BD, positive_BD, negative_BD = self.split(embeddings_ND, rows)
        metrics = {}
        for name, similarity in SIMILARITIES.items():
            right = similarity(anchor_BD, positive_BD) > similarity(anchor_BD, negative_BD) + self.margin
            metrics[f"{name}_accuracy"] = float(right.float().mean())
        metrics["max_accuracy"] = max(metrics.values())
        return metrics
