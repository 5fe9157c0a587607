"""Which of the nearest documents become negatives: the rules of sentence-transformers' mine_hard_negatives.

Shape suffixes: Q anchors, C candidates, K positives of these anchors, n negatives of an anchor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.data.hashes import mix_all
from trainer.data.permutation import mix

Sampling = Literal["top", "random"]


@dataclass(frozen=True)
class Rules:
    """What makes a candidate a negative.

    Attributes:
        num_negatives: n, of each anchor.
        range_min: nearest candidates that are passed over, of those that the other rules leave.
        range_max: candidates that are looked at; None: enough for the others (`resolved`).
        margin: a negative's similarity is at least so much below that of the anchor's least similar positive.
        relative_margin: the same, as a share of that positive's similarity (0.05: NV-Retriever's TopK-PercPos 95%,
            arXiv:2407.15831).
        min_score, max_score: lowest and highest similarity of a negative.
        sampling: the nearest, or drawn.
        seed: of the draw.
    """

    num_negatives: int = 3
    range_min: int = 0
    range_max: int | None = None
    margin: float | None = None
    relative_margin: float | None = None
    min_score: float | None = None
    max_score: float | None = None
    sampling: Sampling = "top"
    seed: int = 42

    def resolved(self, most_positives: int) -> int:
        """range_max, as sentence-transformers chooses it.

        Raises:
            ValueError: the ranks, or the scores, left hold fewer candidates than negatives are wanted.
        """
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise ValueError(
                f"--min-score is {self.min_score:g}, above --max-score, {self.max_score:g}: no negative is between them"
            )
        spare = 10 if any(rule is not None for rule in (self.margin, self.relative_margin, self.max_score)) else 1
        range_max = self.range_max
        if range_max is None:
            range_max = self.range_min + spare * self.num_negatives + most_positives
        if range_max - self.range_min < self.num_negatives:
            raise ValueError(
                f"--num-negatives is {self.num_negatives}, but ranks {self.range_min} to {range_max} hold "
                f"{max(0, range_max - self.range_min)} candidates; raise --range-max or lower --range-min"
            )
        return range_max


@dataclass(frozen=True)
class Selected:
    """Negatives of some anchors.

    Attributes:
        scores_Qn: similarity to the anchor, descending, float32; -inf where there is none.
        ids_Qn: documents.
        removed: rule -> candidates that it alone, or it first, has removed.
    """

    scores_Qn: NDArray[np.float32]
    ids_Qn: NDArray[np.int64]
    removed: dict[str, int]


def select(
    scores_QC: NDArray[np.float32],
    ids_QC: NDArray[np.int64],
    lowest_positive_Q: NDArray[np.float32],
    is_positive_QC: NDArray[np.bool_],
    rules: Rules,
    range_max: int,
    first_anchor: int,
) -> Selected:
    """Negatives among the nearest documents of each anchor.

    Args:
        scores_QC: similarities, descending; -inf for what is no candidate (the anchor's own text).
        ids_QC: documents.
        lowest_positive_Q: similarity of the anchor to the least similar of its positives.
        is_positive_QC: which documents are positives of the anchor.
        rules: what to take.
        range_max: as the rules resolve it.
        first_anchor: number of the first anchor, for the draw: it depends on seed, anchor and document alone.
    """
    scores = np.where(is_positive_QC, -np.inf, scores_QC).astype(np.float32)
    lowest = lowest_positive_Q[:, None]
    removed: dict[str, int] = {}

    def remove(rule: str, wrong_QC: NDArray[np.bool_]) -> None:
        wrong_QC &= np.isfinite(scores)
        scores[wrong_QC] = -np.inf
        removed[rule] = int(wrong_QC.sum())

    if rules.margin is not None:
        remove("margin", scores + np.float32(rules.margin) > lowest)
    if rules.relative_margin is not None:
        # Of the magnitude: a factor (1 - share) would raise the limit of a negative similarity.
        remove("relative-margin", scores > lowest - np.abs(lowest) * np.float32(rules.relative_margin))
    if rules.max_score is not None:
        remove("max-score", scores > np.float32(rules.max_score))
    if rules.min_score is not None:
        remove("min-score", scores < np.float32(rules.min_score))
    order = np.argsort(-scores, axis=1, kind="stable")[:, rules.range_min : range_max]
    if rules.sampling == "random":
        kept = np.isfinite(np.take_along_axis(scores, order, axis=1))
        draws = _draws(rules.seed, first_anchor, np.take_along_axis(ids_QC, order, axis=1))
        # What is no candidate comes last; 2^64 - 1 is no draw.
        drawn = np.argsort(np.where(kept, draws >> np.uint64(1), ~np.uint64(0)), axis=1, kind="stable")
        order = np.take_along_axis(order, np.sort(drawn[:, : rules.num_negatives], axis=1), axis=1)
    order = order[:, : rules.num_negatives]
    chosen, ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids_QC, order, axis=1)
    missing = ((0, 0), (0, rules.num_negatives - order.shape[1]))  # of a corpus smaller than that
    return Selected(np.pad(chosen, missing, constant_values=-np.inf), np.pad(ids, missing), removed)


def _draws(seed: int, first_anchor: int, ids_QC: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A pseudo-random number for each anchor and document, a function of nothing else: splitmix64 of the three."""
    anchors = np.arange(first_anchor, first_anchor + len(ids_QC), dtype=np.uint64)[:, None]
    return mix_all(mix_all(anchors + np.uint64(mix(seed) >> 1), 0) ^ ids_QC.astype(np.uint64), 0)
