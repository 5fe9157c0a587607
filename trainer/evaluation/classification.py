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

    @abstractmethod
    def score_logits(self, logits_BL: Tensor, rows: Rows) -> dict[str, float]:
        """Metrics of the logits of each row: (B, classes) float32 on the CPU."""
