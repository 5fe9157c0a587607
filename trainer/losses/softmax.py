"""Classification of pairs, the natural-language-inference head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.batch import Targets
from trainer.losses.base import SENTENCE_BERT, Loss


class Softmax(Loss):
    """Cross entropy of softmax(W [u, v, |u - v|] + c), averaged over rows.

    Reimers and Gurevych, "Sentence-BERT", EMNLP 2019, https://arxiv.org/abs/1908.10084;
    sentence-transformers' SoftmaxLoss. The head is trained with the encoder, on every rank the same.

    Args:
        num_labels: classes, labels are 0 .. num_labels - 1.
    """

    needs = frozenset({"labels"})
    citation = SENTENCE_BERT

    def __init__(self, num_labels: int = 3) -> None:
        super().__init__()
        if num_labels < 2:
            raise ValueError(f"Softmax num_labels is {num_labels}; it must be 2 or more, one for each class")
        self.num_labels = num_labels

    def build(self, embedding_dimension: int) -> None:
        assert self.num_labels is not None
        self.classifier = nn.Linear(3 * embedding_dimension, self.num_labels)

    def logits(self, columns: Sequence[Tensor]) -> Tensor:
        """(B, num_labels) of two columns of embeddings; LabelAccuracy asks for them."""
        u_BD, v_BD = columns
        return self.classifier(torch.cat([u_BD, v_BD, (u_BD - v_BD).abs()], dim=-1))

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        assert targets.labels_B is not None
        logits = self.logits(columns)
        return targets.weight * F.cross_entropy(logits.float(), targets.labels_B, reduction="sum")
