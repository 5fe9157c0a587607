"""Embeddings whose first dimensions are embeddings too."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, Optional, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.batch import Targets
from trainer.distributed import gather
from trainer.losses.base import Loss
from trainer.messages import refuse_not_positive

logger = logging.getLogger(__name__)


class Matryoshka(Loss):
    """Sum over dimensions d of w_d times a loss of the first d values of the embeddings, scaled to length 1.

    Heads of the loss, as Softmax has one, are made once for each dimension. Kusupati et al. 2022,
    https://arxiv.org/abs/2205.13147; sentence-transformers' MatryoshkaLoss.

    Args:
        loss: of the embeddings.
        dims: of the truncated embeddings; name the whole dimension too.
        weights: one for each of dims; unset: 1.
    """

    citation = """@inproceedings{kusupati2022matryoshka,
    title = {Matryoshka Representation Learning},
    author = {Aditya Kusupati and Gantavya Bhatt and Aniket Rege and Matthew Wallingford and Aditya Sinha and
              Vivek Ramanujan and William Howard-Snyder and Kaifeng Chen and Sham Kakade and Prateek Jain and
              Ali Farhadi},
    booktitle = {Advances in Neural Information Processing Systems},
    year = {2022},
}"""

    def __init__(self, loss: Loss, dims: list[int], weights: Optional[list[float]] = None) -> None:
        super().__init__()
        if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
            raise ValueError(f"Matryoshka dims are {dims}; name different dimensions, each 1 or more")
        if weights is not None and len(weights) != len(dims):
            raise ValueError(f"Matryoshka has {len(dims)} dims and {len(weights)} weights; give one for each")
        for weight in weights or []:
            refuse_not_positive("Matryoshka: a weight", weight, or_zero=True)
        if weights is not None and not any(weights):
            raise ValueError("Matryoshka has no weight above 0; give one")
        self.dims = dims
        self.weights = weights or [1.0] * len(dims)
        self.losses = nn.ModuleList(deepcopy(loss) for _ in dims)
        self.needs = loss.needs
        self.min_columns, self.max_columns = loss.min_columns, loss.max_columns
        self.num_labels, self.score_range = loss.num_labels, loss.score_range
        self.in_batch_negatives, self.positives_by_label = loss.in_batch_negatives, loss.positives_by_label
        self.absent_texts = loss.absent_texts

    @property
    def _wrapped(self) -> list[Loss]:
        return [cast(Loss, loss) for loss in self.losses]

    def parts(self) -> Iterator[Loss]:
        yield self
        yield from self._wrapped[0].parts()

    def refuse_dimension(self, embedding_dimension: int) -> None:
        if max(self.dims) > embedding_dimension:
            raise ValueError(
                f"Matryoshka dims has {max(self.dims)}, but embeddings have {embedding_dimension} dimensions; take "
                f"{embedding_dimension} and smaller ones"
            )

    def build(self, embedding_dimension: int) -> None:
        self.refuse_dimension(embedding_dimension)
        if embedding_dimension not in self.dims:
            gather.warn(
                logger,
                f"Matryoshka dims are {self.dims}, but embeddings have {embedding_dimension} dimensions: the whole "
                f"of them is not trained; add {embedding_dimension}, or use no more than the first {max(self.dims)} "
                "values",
            )
        for loss, dimension in zip(self._wrapped, self.dims, strict=True):
            loss.build(dimension)

    def truncated(self, targets: Targets, dimension: int) -> Targets:
        return self._wrapped[0].truncated(targets, dimension)

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        # Here both are whole; below, a larger teacher would be cut to the student's size, and fit.
        if "teacher" in targets.extras and "truncated_teacher" not in targets.extras:
            for part in self.parts():
                part.refuse_teacher(columns[0].shape[1], targets.extras["teacher"].shape[2])
        values = []
        for loss, dimension, weight in zip(self._wrapped, self.dims, self.weights, strict=True):
            short = [F.normalize(column[:, :dimension], dim=-1) for column in columns]
            values.append(weight * loss(short, loss.truncated(targets, dimension)))
        largest = max(range(len(self.dims)), key=lambda i: self.dims[i])
        self.last_metrics = self._wrapped[largest].last_metrics
        return torch.stack(values).sum()

    def describe(self) -> dict[str, Any]:
        loss = self._wrapped[0]
        return {"loss": {type(loss).__name__: loss.describe()}, "dims": self.dims, "weights": self.weights}
