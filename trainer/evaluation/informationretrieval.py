"""Retrieval: do the documents that people judged relevant come first?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.search import Collection, Search
from trainer.evaluation.topk import Neighbours, Similarity


class InformationRetrieval(Search):
    """Quality of a ranking of a whole corpus, as the mean over queries.

    Metrics are named as in sentence-transformers, e.g. `cosine_ndcg@10`:

    - `accuracy@k`: share of queries with a relevant document among the first k.
    - `precision@k`, `recall@k`: relevant documents among the first k, of k and of all relevant ones.
    - `mrr@k`: 1 / place of the first relevant document, 0 where it stands behind place k.
    - `map@k`: mean precision at the places of relevant documents, of min(k, relevant documents).
    - `ndcg@k`: with the relevance as gain, discounted by log2(1 + place): trec_eval's `ndcg_cut_k`, which BEIR and MTEB
      report (Jaervelin and Kekaelaeinen 2002, https://doi.org/10.1145/582415.582418).
    - `binary_ndcg@k`: with gain 1 for every relevant document, which sentence-transformers calls ndcg@k. The two are
      equal where all judgements are 0 or 1.

    Args:
        similarity: of a query with a document.
        ndcg_at, mrr_at, map_at: depths of these ([10], [10], [100]); empty for none.
        accuracy_at: depths of accuracy, precision and recall ([1, 3, 5, 10]); empty for none.
        ignore_identical_ids: leave out the document that has the id of the query, as BEIR does: in ArguAna and Quora a
            query stands in the corpus, too.
    """

    def __init__(
        self,
        similarity: Similarity = "cosine",
        ndcg_at: Optional[list[int]] = None,
        mrr_at: Optional[list[int]] = None,
        map_at: Optional[list[int]] = None,
        accuracy_at: Optional[list[int]] = None,
        ignore_identical_ids: bool = False,
    ) -> None:
        self.similarity = similarity
        self.ndcg_at = [10] if ndcg_at is None else ndcg_at
        self.mrr_at = [10] if mrr_at is None else mrr_at
        self.map_at = [100] if map_at is None else map_at
        self.accuracy_at = [1, 3, 5, 10] if accuracy_at is None else accuracy_at
        named = {"ndcg": self.ndcg_at, "mrr": self.mrr_at, "map": self.map_at, "accuracy": self.accuracy_at}
        depths = [depth for of_metric in named.values() for depth in of_metric]
        if not depths:
            raise ValueError("InformationRetrieval: ndcg_at, mrr_at, map_at and accuracy_at are empty; fill one")
        if min(depths) < 1:
            raise ValueError(f"InformationRetrieval: a depth of {min(depths)}; each must be 1 or more")
        self.ignore_identical_ids = ignore_identical_ids
        self.num_ranked = max(depths)
        self.depth = self.num_ranked + int(ignore_identical_ids)
        first = next(name for name, of_metric in named.items() if of_metric)
        self.primary = f"{similarity}_{first}@{max(named[first])}"
        beside = {"ndcg": ["binary_ndcg"], "accuracy": ["precision", "recall"]}
        self.metrics = [
            f"{similarity}_{metric}@{depth}"
            for name, of_metric in named.items()
            for metric in (name, *beside.get(name, []))
            for depth in of_metric
        ]

    def score_neighbours(self, neighbours: Neighbours, collection: Collection) -> dict[str, float]:
        judged = collection.relevance_Q
        own_Q = self._own_documents(collection)
        gains_Qk = np.zeros((len(judged), self.num_ranked))  # a corpus may have fewer documents
        for row, relevance, own, ids in zip(gains_Qk, judged, own_Q, neighbours.ids_Qk.tolist(), strict=True):
            ranked = [document for document in ids if document != own][: self.num_ranked]
            row[: len(ranked)] = [max(0, relevance.get(document, 0)) for document in ranked]
        ideal = [[float(r) for r in sorted(relevance.values(), reverse=True) if r > 0] for relevance in judged]
        num_relevant_Q = np.array([len(gains) for gains in ideal])
        hits_Qk = (gains_Qk > 0).astype(np.float64)
        places_k = np.arange(1, self.num_ranked + 1)
        hits_so_far_Qk = hits_Qk.cumsum(axis=1)
        metrics: dict[str, NDArray[np.float64]] = {}
        for k in self.accuracy_at:
            metrics[f"accuracy@{k}"] = (hits_so_far_Qk[:, k - 1] > 0).astype(np.float64)
            metrics[f"precision@{k}"] = hits_so_far_Qk[:, k - 1] / k
            metrics[f"recall@{k}"] = hits_so_far_Qk[:, k - 1] / num_relevant_Q
        for k in self.ndcg_at:
            metrics[f"ndcg@{k}"] = _dcg(gains_Qk[:, :k]) / _ideal_dcg(ideal, k)
            ones = [[1.0] * len(gains) for gains in ideal]
            metrics[f"binary_ndcg@{k}"] = _dcg(hits_Qk[:, :k]) / _ideal_dcg(ones, k)
        for k in self.mrr_at:
            metrics[f"mrr@{k}"] = (hits_Qk / places_k)[:, :k].max(axis=1)
        for k in self.map_at:
            precision_Qk = hits_so_far_Qk / places_k
            metrics[f"map@{k}"] = (precision_Qk * hits_Qk)[:, :k].sum(axis=1) / np.minimum(num_relevant_Q, k)
        return {f"{self.similarity}_{name}": float(values_Q.mean()) for name, values_Q in metrics.items()}

    def _own_documents(self, collection: Collection) -> list[Optional[int]]:
        """For each query the number of the document to leave out."""
        if not self.ignore_identical_ids:
            return [None] * len(collection.queries)
        numbers = {name: number for number, name in enumerate(collection.document_ids)}
        return [numbers.get(name) for name in collection.query_ids]


def _dcg(gains_Qk: NDArray[np.float64]) -> NDArray[np.float64]:
    return (gains_Qk / np.log2(np.arange(2, gains_Qk.shape[1] + 2))).sum(axis=1)


def _ideal_dcg(gains_Q: Sequence[Sequence[float]], k: int) -> NDArray[np.float64]:
    """Of the best order there is; above 0, for each query has a relevant document."""
    best_Qk = np.zeros((len(gains_Q), k))
    for row, gains in zip(best_Qk, gains_Q, strict=True):
        row[: len(gains)] = gains[:k]
    return _dcg(best_Qk)
