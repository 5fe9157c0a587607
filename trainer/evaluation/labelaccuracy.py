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
    metrics = ("accuracy",)

    def __init__(self, loss: Optional[str] = None) -> None:
        self.loss = loss

    def score_logits(self, logits_BL: Tensor, rows: Rows) -> dict[str, float]:
        self.refuse_labels(rows, logits_BL.shape[1])
        labels_B = torch.as_tensor(rows["label"][:], dtype=torch.int64)
        return {"accuracy": float((logits_BL.argmax(dim=1) == labels_B).float().mean())}
