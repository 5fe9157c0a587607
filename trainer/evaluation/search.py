"""The contract of evaluators that search: they are given neighbours instead of embeddings.

A corpus may be larger than what one rank can hold, so its embeddings stay where they were made; what an evaluator gets
are the nearest documents of each query.

Shape suffixes: Q queries, N documents, k neighbours of a query, D embedding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.evaluation.base import Evaluator, Rows
from trainer.evaluation.topk import Neighbours, Similarity


@dataclass(frozen=True)
class Collection:
    """Queries, the documents to search, and which of them are relevant.

    Attributes:
        query_ids, queries: (Q,) names and texts.
        document_ids, documents: (N,) names and texts.
        relevance_Q: for each query the judged documents: number of the document -> relevance. Above 0 is relevant;
            each query has a relevant document.
    """

    query_ids: Sequence[str]
    queries: Sequence[str]
    document_ids: Sequence[str]
    documents: Sequence[str]
    relevance_Q: Sequence[Mapping[int, int]]


class Search(Evaluator):
    """An evaluator of a `Collection`: says how deep to search, and scores what was found.

    Attributes:
        similarity: what orders the documents.
        depth: documents that it wants of each query.
    """

    columns = ("query", "document")
    text_columns = ("query", "document")
    similarity: Similarity
    depth: int

    def texts(self, rows: Rows) -> list[str]:
        return [*rows.queries, *rows.documents]

    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, Any]:
        raise NotImplementedError("an evaluator that searches scores neighbours")

    @abstractmethod
    def score_neighbours(self, neighbours: Neighbours, collection: Collection) -> dict[str, float]:
        """Metrics of the nearest documents of each query.

        Args:
            neighbours: (Q, min(depth, N)) on the CPU, nearest first; ids are numbers of documents.
            collection: what was searched.
        """
