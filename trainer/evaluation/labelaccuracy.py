"""Label accuracy: does the trained head give each row its class?"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from trainer.evaluation.base import Rows
from trainer.evaluation.classification import Classification


class LabelAccuracy(Classification):
    """Share of rows to which the head of a Softmax loss gives their label: `accuracy`, as in sentence-transformers.

    The head is trained with the encoder; that of an encoder that was not trained with it gives random classes.

    Args:
        loss: name of the loss in model.losses whose head is asked; unset: model.loss.
    """

    primary = "accuracy"

    def __init__(self, loss: Optional[str] = None) -> None:
        self.loss = loss

    def score_logits(self, logits_BL: Tensor, rows: Rows) -> dict[str, float]:
        labels_B = torch.as_tensor(rows["label"][:], dtype=torch.int64)
        low, high, num_classes = int(labels_B.min()), int(labels_B.max()), logits_BL.shape[1]
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"LabelAccuracy: the {len(labels_B)} rows have labels {low} to {high}, the head has {num_classes} "
                f"classes, 0 to {num_classes - 1}. Set label_map of this validation set"
            )
        return {"accuracy": float((logits_BL.argmax(dim=1) == labels_B).float().mean())}
