"""The contract of a loss: plain tensors in, a scalar out.

A loss sees the embeddings of this rank's rows and the targets. It returns the value whose mean over ranks is the
loss of the global batch: ``targets.weight`` (W / b) times the sum of its own rows' terms, or a value computed on
the gathered whole, which is the same on every rank. Other ranks' rows come through ``gather_rows`` alone, which
carries the exact gradient.

Shape suffixes: B rows of this rank, b rows of the global batch, N candidates, D embedding.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from trainer.batch import Targets

# The paper of the losses that have none of their own.
SENTENCE_BERT = """@inproceedings{reimers-2019-sentence-bert,
    title = "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
    author = "Reimers, Nils and Gurevych, Iryna",
    booktitle = "Proceedings of EMNLP 2019",
    year = "2019",
    url = "https://arxiv.org/abs/1908.10084",
}"""


# What a loss may want of a batch besides row ids.
NEEDS = ("scores", "candidate_scores", "labels", "teacher")


class Loss(nn.Module, ABC):
    """Turns the columns of a batch into a scalar. It may own small heads, never an encoder.

    Attributes:
        needs: which targets it wants besides row ids: "scores" (one a row), "candidate_scores" (one a candidate),
            "labels", "teacher".
        min_columns, max_columns: text columns it takes; max_columns None for any number.
        num_labels: the labels it has a place for are 0 .. num_labels - 1; None: any, or it wants none.
        score_range: lowest and highest score it can reach; None: any, or it wants none.
        in_batch_negatives: whether texts of other rows of the global batch are negatives.
        positives_by_label: whether the positives of a text are the other texts of its label.
        absent_texts: whether a row may lack some of its negatives (``Targets.present_BC``).
        citation: BibTeX of the paper, for the model card.
        last_metrics: what the last forward found besides its value, detached: like the value, the mean over ranks
            is that of the global batch. Logged as train/<name>.
    """

    needs: frozenset[str] = frozenset()
    min_columns: int = 2
    max_columns: int | None = 2
    num_labels: int | None = None
    score_range: tuple[float, float] | None = None
    in_batch_negatives: bool = False
    positives_by_label: bool = False
    absent_texts: bool = False
    citation: str = ""

    def __init__(self) -> None:
        super().__init__()
        self.last_metrics: dict[str, Tensor] = {}

    def build(self, embedding_dimension: int) -> None:
        """Make the heads, once the embedding dimension is known."""

    def parts(self) -> Iterator[Loss]:
        """Itself, and the losses that it wraps, if any, with theirs."""
        yield self

    def margin_limit(self, normalized: bool) -> float | None:
        """The margin that no pair of distances can reach, for embeddings of length 1 or of any; None: there is none."""
        return None

    def teacher_margin_limit(self, normalized: bool) -> float | None:
        """The largest margin of a teacher that similarities can differ by, of embeddings of length 1 or of any; None:
        any, or it wants none."""
        return None

    def scores_taken(self, num_candidates: int) -> tuple[int, ...] | None:
        """How many scores a row may have beside so many candidates; None: any number, or it wants none."""
        return None

    def refuse_dimension(self, embedding_dimension: int) -> None:
        """Raises ValueError where embeddings have too few dimensions for it."""

    def refuse_teacher(self, embedding_dimension: int, teacher_dimension: int) -> None:
        """Raises ValueError where embeddings of these sizes, whole ones, can't be compared."""

    def truncated(self, targets: Targets, dimension: int) -> Targets:
        """What the first ``dimension`` values of each embedding are to be compared with."""
        return targets

    @abstractmethod
    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        """Loss of this rank.

        Args:
            columns: (B, D) embeddings, one tensor a text column; B may be 0.
            targets: of the same rows.
        """

    def describe(self) -> dict[str, Any]:
        """Its settings that are plain values, for the model card."""
        names = inspect.signature(type(self).__init__).parameters
        kept = {name: getattr(self, name) for name in names if hasattr(self, name)}
        values = (str, int, float, list, tuple, type(None))
        plain = {name: value for name, value in kept.items() if isinstance(value, values)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def refuse_incomplete(loss: Loss) -> None:
    """Raises ValueError where a loss, or one that it wraps, keeps less than the contract, as classes of a user may."""
    for part in reversed([*loss.parts()]):  # what a wrapper needs it has from those inside
        name = type(part).__name__
        if not hasattr(part, "last_metrics"):
            raise ValueError(f"{name} was not initialised; call super().__init__() first in {name}.__init__")
        if unknown := sorted(set(part.needs) - set(NEEDS)):
            raise ValueError(
                f"{name}.needs has '{unknown[0]}', which is none of {', '.join(NEEDS)}; these are what a loss can want"
            )
