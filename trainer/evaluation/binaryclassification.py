"""Binary classification: does a threshold on the similarity tell pairs that belong together from others?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, matthews_corrcoef
from torch import Tensor

from trainer.evaluation.base import SIMILARITIES, Evaluator, Rows

_METRICS = ("accuracy", "f1", "precision", "recall", "ap", "mcc")


class BinaryClassification(Evaluator):
    """How well pairs with label 1 can be told from pairs with label 0.

    Metrics are named as in sentence-transformers, for each of cosine, dot, euclidean and manhattan: `cosine_accuracy`
    at its best threshold, `cosine_accuracy_threshold`; `cosine_f1`, `cosine_precision`, `cosine_recall` and
    `cosine_mcc` (Matthews' correlation) at the threshold of the best F1, `cosine_f1_threshold`; `cosine_ap`, the
    average precision over all thresholds. Thresholds of distances are distances. `max_accuracy`, ... are the best of
    the four.
    """

    columns = ("anchor", "positive", "label")
    text_columns = ("anchor", "positive")
    primary = "cosine_ap"
    metrics = (
        *(f"{name}_{metric}" for name in (*SIMILARITIES, "max") for metric in _METRICS),
        *(f"{name}_{metric}_threshold" for name in SIMILARITIES for metric in ("accuracy", "f1")),
    )

    def refuse_rows(self, rows: Rows) -> None:
        labels_B = np.asarray(rows["label"])
        found = sorted(set(labels_B.tolist()))
        if found != [0, 1]:
            raise ValueError(
                f"Binary classification needs labels 0 and 1, both of them; the {len(labels_B)} rows hold "
                f"{', '.join(map(str, found[:5]))}. Check the label column and label_map of this validation set."
            )

    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, float]:
        self.refuse_rows(rows)
        anchor_BD, positive_BD = self.split(embeddings_ND, rows)
        labels_B = np.asarray(rows["label"])
        metrics: dict[str, float] = {}
        for name, similarity in SIMILARITIES.items():
            scores_B = similarity(anchor_BD, positive_BD).numpy()
            sign = -1.0 if name in ("euclidean", "manhattan") else 1.0
            cuts = _cuts(scores_B, labels_B)
            accuracy, accuracy_threshold = _best_accuracy(cuts)
            f1, precision, recall, f1_threshold = _best_f1(cuts)
            metrics |= {
                f"{name}_accuracy": accuracy,
                f"{name}_accuracy_threshold": sign * accuracy_threshold,
                f"{name}_f1": f1,
                f"{name}_f1_threshold": sign * f1_threshold,
                f"{name}_precision": precision,
                f"{name}_recall": recall,
                f"{name}_ap": float(average_precision_score(labels_B, scores_B)),
                f"{name}_mcc": float(matthews_corrcoef(labels_B, scores_B >= f1_threshold)),
            }
        for metric in _METRICS:
            metrics[f"max_{metric}"] = max(metrics[f"{name}_{metric}"] for name in SIMILARITIES)
        return metrics


class _Cuts(NamedTuple):
    """What follows from calling the first rows by similarity 1, for each place at which the similarity falls.

    Attributes:
        thresholds_C: half way to the next similarity, float32.
        num_called_C, num_right_C: rows called 1, and those of them that are.
        num_positives, num_rows: of all.
        above: a threshold that calls no row 1.
    """

    thresholds_C: NDArray[np.float32]
    num_called_C: NDArray[np.int64]
    num_right_C: NDArray[np.int64]
    num_positives: int
    num_rows: int
    above: float


def _cuts(scores_B: NDArray[np.float32], labels_B: NDArray[np.int64]) -> _Cuts:
    order = np.argsort(-scores_B, kind="stable")
    scores, right = scores_B[order], labels_B[order].cumsum()
    ends = np.flatnonzero(np.r_[scores[1:] != scores[:-1], True])
    following = np.r_[scores[ends[:-1] + 1], scores[-1]]
    half = (scores[ends] + following) / np.float32(2)
    # Between neighbouring numbers there is none: half way would be the next one, which is not called 1.
    thresholds = np.where(half == following, scores[ends], half)
    above = float(np.nextafter(scores[0], np.float32(np.inf)))
    return _Cuts(thresholds, ends + 1, right[ends], int(right[-1]), len(scores), above)


def _best_accuracy(cuts: _Cuts) -> tuple[float, float]:
    num_negatives = cuts.num_rows - cuts.num_positives
    num_true_C = cuts.num_right_C + num_negatives - (cuts.num_called_C - cuts.num_right_C)
    best = int(num_true_C.argmax())
    if num_true_C[best] <= num_negatives:  # no better than calling nothing 1
        return num_negatives / cuts.num_rows, cuts.above
    return float(num_true_C[best] / cuts.num_rows), float(cuts.thresholds_C[best])


def _best_f1(cuts: _Cuts) -> tuple[float, float, float, float]:
    precision_C, recall_C = cuts.num_right_C / cuts.num_called_C, cuts.num_right_C / cuts.num_positives
    f1_C = 2 * cuts.num_right_C / (cuts.num_called_C + cuts.num_positives)
    best = int(f1_C.argmax())
    return float(f1_C[best]), float(precision_C[best]), float(recall_C[best]), float(cuts.thresholds_C[best])
