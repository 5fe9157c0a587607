"""One teacher's embedding of a sentence as the goal of all its translations."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from trainer.losses.embeddistill import EmbedDistill


class MSE(EmbedDistill):
    """Mean over rows and columns of the mean squared difference to the teacher's embedding of the row's anchor.

    With anchors in a language that the teacher knows, and translations in the other columns, the student learns to
    embed all of them alike. Reimers and Gurevych, "Making Monolingual Sentence Embeddings Multilingual using
    Knowledge Distillation", EMNLP 2020, https://arxiv.org/abs/2004.09813; sentence-transformers' MSELoss.

    Args:
        projection_dim: dimension of the teacher; a linear head, trained with the encoder, maps embeddings to it. Unset:
            embeddings are compared as they are.
    """

    citation = """@inproceedings{reimers-2020-multilingual-sentence-bert,
    title = "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation",
    author = "Reimers, Nils and Gurevych, Iryna",
    booktitle = "Proceedings of EMNLP 2020",
    year = "2020",
    url = "https://arxiv.org/abs/2004.09813",
}"""

    def __init__(self, projection_dim: Optional[int] = None) -> None:
        super().__init__("mse", projection_dim)

    def goals(self, teacher_BCD: Tensor, num_columns: int) -> Tensor:
        return teacher_BCD[:, :1].expand(-1, num_columns, -1)
