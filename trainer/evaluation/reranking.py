"""Reranking: do the relevant ones of a query's candidates come first?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from sklearn.metrics import average_precision_score, ndcg_score
from torch import Tensor

from trainer.evaluation.base import Evaluator, Rows, cosine, num_not_finite, refuse_not_finite


class Reranking(Evaluator):
    """Quality of the order of each query's candidates by cosine, as the mean over queries.

    Rows of the same query (`anchor`) have its candidates: either one in each (`positive`) with its relevance (`label`;
    above 1: how much), or a relevant one (`positive`) and others (`negative`, `negative_1`, ..., also from lists), each
    different text once. Queries whose candidates are all relevant, or none, say nothing and are left out. Metrics are
    named as in sentence-transformers: `map`, `mrr@k` and `ndcg@k`; in map and ndcg candidates with the same similarity
    share their places.

    Args:
        at: depth of mrr and ndcg.
    """

    columns = ("anchor", "positive")
    text_columns = ("anchor", "positive")
    takes_lists = True

    def __init__(self, at: int = 10) -> None:
        if at < 1:
            raise ValueError(f"Reranking: at is {at}; it must be 1 or more")
        self.at = at
        self.primary = f"ndcg@{at}"
        self.metrics = ("map", f"mrr@{at}", self.primary)

    def refuse_rows(self, rows: Rows) -> None:
        negatives = _negatives(rows)
        if negatives and "label" in _names(rows):
            raise ValueError(
                f"Reranking: the set has a label and {negatives[0]}, but a positive beside negatives is relevant and "
                "has no label; leave one of the two out of `columns`"
            )
        if not negatives and "label" not in _names(rows):
            raise ValueError(
                "Reranking needs a label that says which candidates are relevant, or negatives; the set has "
                f"{', '.join(_names(rows))}. Map one of them under `columns`"
            )
        kinds = _kinds(rows)
        if all(len(found) == 1 for found in kinds.values()):
            raise ValueError(
                f"none of {len(kinds):,} queries has both relevant and other candidates; "
                "check the label column, or the negatives, of this validation set"
            )

    def texts(self, rows: Rows) -> list[str]:
        """Of two columns, then of the negatives that are there."""
        negatives = [text for name in _negatives(rows) for text in rows[name] if text is not None]
        return [*super().texts(rows), *negatives]

    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, float]:
        self.refuse_rows(rows)
        refuse_not_finite(num_not_finite(embeddings_ND), len(embeddings_ND))
        queries = self._candidates(embeddings_ND, rows)
        precisions, ranks, gains = [], [], []
        for judged in queries:
            relevance, scores = np.array(judged).T
            relevant = relevance > 0
            if relevant.all() or not relevant.any():
                continue
            order = np.argsort(-scores, kind="stable")
            found = np.flatnonzero(relevant[order[: self.at]])
            precisions.append(average_precision_score(relevant, scores))
            ranks.append(1.0 / (found[0] + 1) if len(found) else 0.0)
            gains.append(ndcg_score([relevance], [scores], k=self.at))
        return {
            "map": float(np.mean(precisions)),
            f"mrr@{self.at}": float(np.mean(ranks)),
            f"ndcg@{self.at}": float(np.mean(gains)),
        }

    def _candidates(self, embeddings_ND: Tensor, rows: Rows) -> list[list[tuple[float, float]]]:
        """Relevance and similarity of each query's candidates."""
        anchors, positives = rows["anchor"][:], rows["positive"][:]
        num_rows, names = len(anchors), _negatives(rows)
        anchor_BD, positive_BD = embeddings_ND[:num_rows], embeddings_ND[num_rows : 2 * num_rows]
        similarities = cosine(anchor_BD, positive_BD).tolist()
        if not names:
            labelled: dict[str, list[tuple[float, float]]] = {}
            for query, label, similarity in zip(anchors, rows["label"][:], similarities, strict=True):
                labelled.setdefault(query, []).append((float(label), similarity))
            return list(labelled.values())
        # By text, for a record with several positives is several rows with the same negatives; relevant wins.
        by_text: dict[str, dict[str, tuple[float, float]]] = {}
        place = 2 * num_rows
        for name in names:
            present = [(row, text) for row, text in enumerate(rows[name][:]) if text is not None]
            stop = place + len(present)
            similar = cosine(anchor_BD[[row for row, _ in present]], embeddings_ND[place:stop]).tolist()
            for (row, text), similarity in zip(present, similar, strict=True):
                by_text.setdefault(anchors[row], {})[text] = (0.0, similarity)
            place = stop
        for query, text, similarity in zip(anchors, positives, similarities, strict=True):
            by_text.setdefault(query, {})[text] = (1.0, similarity)
        return [list(candidates.values()) for candidates in by_text.values()]


def _kinds(rows: Rows) -> dict[str, set[bool]]:
    """For each query whether its candidates are relevant, and whether some are not."""
    anchors, kinds = rows["anchor"][:], dict[str, set[bool]]()
    if names := _negatives(rows):
        relevant = set(zip(anchors, rows["positive"][:], strict=True))
        kinds = {query: {True} for query in anchors}
        for name in names:
            for query, text in zip(anchors, rows[name][:], strict=True):
                if text is not None and (query, text) not in relevant:
                    kinds[query].add(False)
        return kinds
    for query, label in zip(anchors, rows["label"][:], strict=True):
        kinds.setdefault(query, set()).add(label > 0)
    return kinds


def _names(rows: Rows) -> list[str]:
    return list(rows) if isinstance(rows, Mapping) else list(rows.column_names)


def _negatives(rows: Rows) -> list[str]:
    return [name for name in _names(rows) if name.startswith("negative")]
