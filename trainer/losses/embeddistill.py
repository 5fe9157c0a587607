"""A teacher's embeddings as the goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.batch import Targets
from trainer.losses.base import Loss

Metric = Literal["mse", "l2", "cosine"]


class EmbedDistill(Loss):
    """Mean over rows and columns of the distance between an embedding and the teacher's of the same text.

    mse: mean over dimensions of the squared difference; l2: its euclidean norm; cosine: 1 - cosine similarity.
    Kim et al. 2023, https://arxiv.org/abs/2301.12005; sentence-transformers' EmbedDistillLoss.

    Args:
        distance: mse, l2 or cosine.
        projection_dim: dimension of the teacher; a linear head, trained with the encoder, maps embeddings to it. Unset:
            embeddings are compared as they are.
    """

    needs = frozenset({"teacher"})
    min_columns = 1
    max_columns = None
    citation = """@article{kim2023embeddistill,
    title = {EmbedDistill: A Geometric Knowledge Distillation for Information Retrieval},
    author = {Kim, Seungyeon and Rawat, Ankit Singh and Zaheer, Manzil and Jayasumana, Sadeep and
              Sadhanala, Veeranjaneyulu and Jitkrittum, Wittawat and Menon, Aditya Krishna and Fergus, Rob and
              Kumar, Sanjiv},
    year = {2023},
    eprint = {2301.12005},
    archivePrefix = {arXiv},
}"""

    def __init__(self, distance: Metric = "cosine", projection_dim: Optional[int] = None) -> None:
        super().__init__()
        if projection_dim is not None and projection_dim < 1:
            raise ValueError(f"{type(self).__name__} projection_dim is {projection_dim}; it must be 1 or more")
        self.distance: Metric = distance
        self.projection_dim = projection_dim

    def build(self, embedding_dimension: int) -> None:
        if self.projection_dim is not None:
            self.projection = nn.Linear(embedding_dimension, self.projection_dim)

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        teacher_BCD = targets.extras["teacher"]
        if self.projection_dim is None:  # else the head's goal is whole, whatever a loss beside this one has truncated
            teacher_BCD = targets.extras.get("truncated_teacher", teacher_BCD)
        goals_BCD = self.goals(teacher_BCD, len(columns))
        if self.projection_dim is not None:
            columns = [self.projection(column).float() for column in columns]
        self.refuse_teacher(columns[0].shape[1], goals_BCD.shape[2])
        terms = [self._distances(column, goals_BCD[:, c]).sum() for c, column in enumerate(columns)]
        return targets.weight * torch.stack(terms).mean()

    def goals(self, teacher_BCD: Tensor, num_columns: int) -> Tensor:
        """What each text is to be near to, (B, C, D)."""
        return teacher_BCD

    def refuse_teacher(self, embedding_dimension: int, teacher_dimension: int) -> None:
        ours = self.projection_dim or embedding_dimension
        if ours != teacher_dimension:
            raise ValueError(
                f"{type(self).__name__} compares embeddings of {ours} dimensions with a teacher's of "
                f"{teacher_dimension}; set projection_dim to {teacher_dimension}, or take a teacher of that size"
            )

    def truncated(self, targets: Targets, dimension: int) -> Targets:
        """The teacher's first dimensions, where ours are compared with them one by one."""
        if self.projection_dim is not None:
            return targets
        teacher_BCD = targets.extras["teacher"][..., :dimension]
        return replace(targets, extras={**targets.extras, "truncated_teacher": teacher_BCD})

    def _distances(self, ours_BD: Tensor, goals_BD: Tensor) -> Tensor:
        if self.distance == "mse":
            return (ours_BD - goals_BD).square().mean(dim=-1)
        if self.distance == "l2":
            return torch.linalg.vector_norm(ours_BD - goals_BD, dim=-1)
        return 1.0 - F.cosine_similarity(ours_BD, goals_BD, dim=-1)
