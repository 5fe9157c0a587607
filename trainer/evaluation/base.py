"""The contract of an evaluator, and the similarities evaluators score with.

Shape suffixes: N texts, B rows, D embedding.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor

# A datasets.Dataset or a plain dict: column name -> values.
Rows = Any


class Evaluator(ABC):
    """Says which texts of a validation set to embed and turns their embeddings into metrics.

    Pure: it knows no ranks, files or trackers.

    Attributes:
        columns: canonical columns the rows must have; those named in `text_columns` are embedded.
        text_columns: the columns with text, in the order of their embeddings.
        primary: the metric that stands for the whole, higher is better.
        metrics: all that `score` gives, so that one that is misspelt is refused before the first step; empty: not known
            before.
        teacher_column: the column whose texts a teacher embeds; `score` finds its embeddings (B, D) in the rows, as
            the column `teacher`. None: it compares with none.
        takes_lists: whether a row may have fewer texts than columns (None), as lists of positives and negatives give.
            The rows of an anchor are then scored together, so max_rows of a source draws anchors.
    """

    columns: ClassVar[tuple[str, ...]]
    text_columns: ClassVar[tuple[str, ...]]
    primary: str
    metrics: Collection[str] = ()
    teacher_column: ClassVar[Optional[str]] = None
    takes_lists: ClassVar[bool] = False

    def texts(self, rows: Rows) -> list[str]:
        """All texts to embed, column by column: (len(text_columns) * B,)."""
        return [text for column in self.text_columns for text in rows[column]]

    def refuse_rows(self, rows: Rows) -> None:  # noqa: B027 - most score any rows
        """Called when a set is opened.

        Raises:
            ValueError: rows that can't be scored, whatever their embeddings.
        """

    @abstractmethod
    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, float]:
        """Metrics of the embeddings of `texts(rows)`: float32, on the CPU, in the same order.

        Raises:
            ValueError: embeddings that are not finite, or rows that can't be scored.
        """

    def split(self, embeddings_ND: Tensor, rows: Rows) -> Sequence[Tensor]:
        """The embeddings of each text column, (B, D) each.

        Raises:
            ValueError: some embeddings are not finite, or they are not those of all texts of the columns.
        """
        num_columns, num_rows = len(self.text_columns), len(rows[self.text_columns[0]])
        if len(embeddings_ND) != num_columns * num_rows:
            name, named = type(self).__name__, ", ".join(self.text_columns)
            raise ValueError(
                f"{name}.split got {len(embeddings_ND):,} embeddings, but {num_rows:,} rows of text_columns {named} "
                f"have {num_columns * num_rows:,} texts: give it all that score() got, or, where {name}.texts gives "
                "others, take them apart in score() as texts() lays them out"
            )
        refuse_not_finite(num_not_finite(embeddings_ND), len(embeddings_ND))
        return embeddings_ND.chunk(num_columns)


def num_not_finite(embeddings_ND: Tensor) -> int:
    """Embeddings that hold a value that is no finite number."""
    return int((~torch.isfinite(embeddings_ND)).any(dim=1).sum())


def refuse_not_finite(num_bad: int, num_embeddings: int) -> None:
    """Raises ValueError where some embeddings are not finite: no score of them means anything."""
    if num_bad:
        raise ValueError(
            f"{num_bad} of {num_embeddings} embeddings are not finite: the weights diverged. "
            "Lower model.learning_rate, or train in bf16 or fp32 instead of fp16."
        )


def cosine(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    normalize = torch.nn.functional.normalize
    return (normalize(a_BD, dim=-1) * normalize(b_BD, dim=-1)).sum(dim=-1)


# Row by row, higher is more similar; in float32 like sentence-transformers, so that ties are the same ties.
SIMILARITIES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine,
    "dot": lambda a_BD, b_BD: (a_BD * b_BD).sum(dim=-1),
    "euclidean": lambda a_BD, b_BD: -torch.linalg.vector_norm(a_BD - b_BD, dim=-1),
    "manhattan": lambda a_BD, b_BD: -(a_BD - b_BD).abs().sum(dim=-1),
}
