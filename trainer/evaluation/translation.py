"""Translation matching: is a sentence's translation its nearest neighbour among all translations?"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trainer.evaluation.base import Evaluator, Rows
from trainer.evaluation.topk import top_k


class Translation(Evaluator):
    """Share of rows whose positive is the nearest of all positives, and of those whose anchor is the nearest anchor.

    By cosine; where the nearest is another row with the same text, it counts as right. Metrics are named as in
    sentence-transformers: `src2trg_accuracy` (anchor to positive), `trg2src_accuracy`, `mean_accuracy`.
    """

    columns = ("anchor", "positive")
    text_columns = ("anchor", "positive")
    primary = "mean_accuracy"
    metrics = ("src2trg_accuracy", "trg2src_accuracy", "mean_accuracy")

    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, float]:
        anchor_BD, positive_BD = self.split(embeddings_ND, rows)
        forward = _accuracy(anchor_BD, positive_BD, rows["positive"][:])
        backward = _accuracy(positive_BD, anchor_BD, rows["anchor"][:])
        return {
            "src2trg_accuracy": forward,
            "trg2src_accuracy": backward,
            "mean_accuracy": (forward + backward) / 2,
        }


def _accuracy(from_BD: Tensor, to_BD: Tensor, texts: Sequence[str]) -> float:
    nearest = top_k(from_BD, to_BD, k=1).ids_Qk[:, 0].tolist()
    return sum(texts[found] == text for found, text in zip(nearest, texts, strict=True)) / len(texts)
