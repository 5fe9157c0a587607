"""The contract of evaluators that judge the classes a loss head gives: they are given logits instead of embeddings."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Optional

from torch import Tensor

from trainer.evaluation.base import Evaluator, Rows


class Classification(Evaluator):
    """An evaluator of the classes that a trained head gives to rows; the head belongs to a loss, not to it.

    Attributes:
        loss: name of the loss in model.losses whose head is asked; None: model.loss.
    """

    columns: ClassVar[tuple[str, ...]] = ("anchor", "positive", "label")
    text_columns: ClassVar[tuple[str, ...]] = ("anchor", "positive")
    loss: Optional[str]

    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, Any]:
        raise NotImplementedError("an evaluator of classes scores logits")

    def refuse_labels(self, rows: Rows, num_classes: int) -> None:
        """Called when the head is known, before a weight is read.

        Raises:
            ValueError: rows have labels that are none of its classes.
        """
        labels = rows["label"][:]
        low, high = min(labels), max(labels)
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{type(self).__name__}: the {len(labels)} rows have labels {low} to {high}, the head has "
                f"{num_classes} classes, 0 to {num_classes - 1}. Set label_map of this validation set"
            )

    @abstractmethod
    def score_logits(self, logits_BL: Tensor, rows: Rows) -> dict[str, float]:
        """Metrics of the logits of each row: (B, classes) float32 on the CPU."""
