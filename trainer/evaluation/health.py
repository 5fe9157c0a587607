"""How the embeddings of a validation set lie on the sphere, whatever its evaluator measures.

Of a bounded sample, a few hundredths of a second on one CPU core: it is computed at every evaluation. Embeddings are
compared by their direction. Shape suffixes: N sampled texts, B sampled rows, P pairs, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from trainer.evaluation.base import Evaluator, Rows
from trainer.evaluation.binaryclassification import BinaryClassification
from trainer.evaluation.classification import Classification

MAX_TEXTS = 512
NUM_BINS = 20
QUANTILES = {"p05": 0.05, "p50": 0.50, "p95": 0.95}
_SCALE = 2.0  # t of the uniformity, as in the paper
_POSITIVE_SCORE = 0.8  # of the way from the lowest to the highest score: above 4 of 5, as SimCSE measures STSb


@dataclass(frozen=True)
class Health:
    """
    Attributes:
        metrics: `uniformity`, the logarithm of the mean of exp(-2 d²) over the distances d of pairs of texts, and
            `alignment`, the mean d² of positives (Wang & Isola 2020); `effective_rank`, e to the entropy of the
            singular values (Roy & Vetterli 2007); quantiles of cosine similarities, `negative_p50` and so on.
        histograms: counts of cosine similarities in equal bins from -1 to 1.
    """

    metrics: dict[str, float]
    histograms: dict[str, list[int]]


def measure(evaluator: Evaluator, rows: Rows, embeddings_UD: Tensor, text_N: Tensor) -> Health:
    """Of a set with pairs: positives are the pairs that belong together, negatives texts of different rows. Of other
    sets, and where an evaluator's own `texts` gives more or fewer than its columns have, there are no positives.

    Args:
        embeddings_UD: of the distinct texts, on any device.
        text_N: for each text of the set, column by column, the distinct text it is.
    """
    chosen_B = positive_rows(evaluator, rows)
    if chosen_B is None or len(text_N) != len(evaluator.text_columns) * len(chosen_B):
        texts_N = _every(text_N.unique(), MAX_TEXTS)
        near_ND = _directions(embeddings_UD, texts_N)
        return _health(near_ND, None, _of_pairs(near_ND))
    anchors_B, partners_B = text_N.chunk(len(evaluator.text_columns))[:2]
    rows_B = _every(torch.arange(len(anchors_B)), MAX_TEXTS // 2)
    anchors_B, partners_B, chosen_B = anchors_B[rows_B], partners_B[rows_B], chosen_B[rows_B]
    similarity_BB = _directions(embeddings_UD, anchors_B) @ _directions(embeddings_UD, partners_B).T
    # Rows that share a text may belong together.
    alike_BB = (anchors_B[:, None] == anchors_B) | (partners_B[:, None] == partners_B)
    alike_BB |= anchors_B[:, None] == partners_B
    texts_N = torch.cat([anchors_B, partners_B]).unique()
    return _health(_directions(embeddings_UD, texts_N), similarity_BB.diagonal()[chosen_B], similarity_BB[~alike_BB])


def positive_rows(evaluator: Evaluator, rows: Rows) -> Optional[Tensor]:
    """Which rows hold two texts that belong together, (B,) bool; None where the set has no pairs."""
    if evaluator.text_columns[:2] != ("anchor", "positive") or evaluator.takes_lists:
        return None
    if isinstance(evaluator, Classification):  # what a class means is not known
        return None
    if isinstance(evaluator, BinaryClassification):
        return torch.as_tensor(rows["label"][:]) == 1
    if "score" in evaluator.columns:
        score_B = torch.as_tensor(rows["score"][:], dtype=torch.float64)
        return score_B >= score_B.min() + _POSITIVE_SCORE * (score_B.max() - score_B.min())
    return torch.ones(len(rows["anchor"]), dtype=torch.bool)


def _every(items: Tensor, most: int) -> Tensor:
    """At most so many, evenly spaced: the same ones at every evaluation."""
    if len(items) <= most:
        return items
    return items[torch.arange(most) * len(items) // most]


def _directions(embeddings_UD: Tensor, texts_N: Tensor) -> Tensor:
    chosen_ND = embeddings_UD[texts_N.to(embeddings_UD.device)].cpu().double()
    return torch.nn.functional.normalize(chosen_ND, dim=-1)


def _of_pairs(texts_ND: Tensor) -> Tensor:
    """Cosines of all pairs of different texts."""
    first_P, second_P = torch.triu_indices(len(texts_ND), len(texts_ND), offset=1)
    return (texts_ND @ texts_ND.T)[first_P, second_P]


def _health(texts_ND: Tensor, positive_P: Optional[Tensor], negative_P: Tensor) -> Health:
    metrics = {"effective_rank": effective_rank(texts_ND)}
    if len(texts_ND) > 1:
        distances_P = 2.0 - 2.0 * _of_pairs(texts_ND)  # d² of unit vectors
        metrics["uniformity"] = float(distances_P.mul(-_SCALE).exp().mean().log())
    histograms = {}
    for kind, values_P in (("positive", positive_P), ("negative", negative_P)):
        if values_P is None or not len(values_P):
            continue
        if kind == "positive":
            metrics["alignment"] = float((2.0 - 2.0 * values_P).mean())
        marks = torch.quantile(values_P, torch.tensor(list(QUANTILES.values()), dtype=torch.float64))
        metrics |= {f"{kind}_{name}": mark for name, mark in zip(QUANTILES, marks.tolist(), strict=True)}
        inside_P = values_P.clamp(-1.0, 1.0).float()
        histograms[f"{kind}_histogram"] = torch.histc(inside_P, NUM_BINS, -1.0, 1.0).long().tolist()
    return Health(metrics, histograms)


def effective_rank(texts_ND: Tensor) -> float:
    """e to the entropy of the singular values: 1 where all point the same way, min(N, D) where none is preferred."""
    # From the smaller of the two products of the matrix with itself, which is quicker.
    product = texts_ND.T @ texts_ND if texts_ND.shape[0] > texts_ND.shape[1] else texts_ND @ texts_ND.T
    values = torch.linalg.eigvalsh(product).clamp(min=0.0).sqrt()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
