"""Embedding health against the formulas of the papers, in NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from trainer.evaluation import STS, BinaryClassification, LabelAccuracy, Triplet
from trainer.evaluation.base import Evaluator, Rows
from trainer.evaluation.health import MAX_TEXTS, NUM_BINS, effective_rank, measure, positive_rows

RNG = np.random.default_rng(0)


def made(num_rows: int, dimension: int = 8) -> tuple[dict, torch.Tensor, torch.Tensor, np.ndarray]:
    """Rows with scores, embeddings of distinct texts, their numbers; and the unit vectors (2, B, D) in NumPy. The first
    row's anchor is also the anchor of the second."""
    vectors_UD = RNG.normal(size=(2 * num_rows, dimension)) + 0.5
    text_N = np.arange(2 * num_rows)
    text_N[1] = 0
    rows = {"anchor": ["a"] * num_rows, "positive": ["b"] * num_rows, "score": np.linspace(0, 1, num_rows).tolist()}
    unit_UD = vectors_UD / np.linalg.norm(vectors_UD, axis=1, keepdims=True)
    return (
        rows,
        torch.tensor(vectors_UD, dtype=torch.float32),
        torch.tensor(text_N),
        unit_UD[text_N].reshape(2, num_rows, -1),
    )


def test_formulas() -> None:
    rows, embeddings_UD, text_N, unit = made(40)
    found = measure(STS(), rows, embeddings_UD, text_N)
    anchors, positives = unit
    good = np.array(rows["score"]) >= 0.8
    assert found.metrics["alignment"] == pytest.approx((np.linalg.norm(anchors - positives, axis=1) ** 2)[good].mean())
    distinct = np.concatenate([anchors[:1], anchors[2:], positives])
    assert found.metrics["uniformity"] == pytest.approx(np.log(np.exp(-2 * pdist(distinct) ** 2).mean()), abs=1e-6)
    shares = np.linalg.svd(distinct, compute_uv=False)
    shares /= shares.sum()
    assert found.metrics["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    cosines = anchors @ positives.T
    others = ~np.eye(40, dtype=bool)
    others[0, 1] = others[1, 0] = False  # one anchor: each may be right for the other
    for kind, values in (("positive", cosines.diagonal()[good]), ("negative", cosines[others])):
        for name, share in (("p05", 5), ("p50", 50), ("p95", 95)):
            assert found.metrics[f"{kind}_{name}"] == pytest.approx(np.percentile(values, share), abs=1e-6)
        counts, _ = np.histogram(values, NUM_BINS, (-1, 1))
        assert found.histograms[f"{kind}_histogram"] == counts.tolist()


def test_the_sample_is_bounded_and_always_the_same() -> None:
    rows, embeddings_UD, text_N, unit = made(1300)
    found = measure(Triplet2(), rows, embeddings_UD, text_N)
    chosen = np.arange(MAX_TEXTS // 2) * 1300 // (MAX_TEXTS // 2)
    cosines = (unit[0] * unit[1]).sum(axis=1)[chosen]
    assert found.metrics["positive_p50"] == pytest.approx(np.median(cosines), abs=1e-6)
    assert sum(found.histograms["positive_histogram"]) == MAX_TEXTS // 2
    assert found == measure(Triplet2(), rows, embeddings_UD, text_N)


class Triplet2(Triplet):
    """All rows are positives."""

    text_columns = ("anchor", "positive")


def test_effective_rank_at_its_ends() -> None:
    one_way = torch.ones(50, 8, dtype=torch.float64)
    assert effective_rank(one_way) == pytest.approx(1.0, abs=1e-4)
    assert effective_rank(torch.eye(8, dtype=torch.float64)) == pytest.approx(8.0)
    assert effective_rank(torch.eye(8, dtype=torch.float64)[:3]) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("evaluator", "rows", "expected"),
    [
        (STS(), {"score": [0.0, 4.0, 5.0]}, [False, True, True]),
        (BinaryClassification(), {"label": [1, 0, 1]}, [True, False, True]),
        (Triplet(), {"anchor": ["a", "b"]}, [True, True]),
        (LabelAccuracy(), {"label": [0, 2]}, None),
    ],
)
def test_which_rows_belong_together(evaluator: Evaluator, rows: dict, expected: list[bool] | None) -> None:
    found = positive_rows(evaluator, rows)
    assert (None if found is None else found.tolist()) == expected


def test_a_set_without_pairs_has_no_positives() -> None:
    _, embeddings_UD, text_N, unit = made(30)
    found = measure(LabelAccuracy(), {"label": [0] * 30}, embeddings_UD, text_N)
    distinct = np.concatenate([unit[0][:1], unit[0][2:], unit[1]])
    upper = np.triu_indices(len(distinct), 1)
    assert found.metrics["negative_p50"] == pytest.approx(np.median((distinct @ distinct.T)[upper]), abs=1e-6)
    assert found.histograms.keys() == {"negative_histogram"}
    assert "alignment" not in found.metrics


class WithMoreTexts(Triplet2):
    """It embeds some texts that are in no row."""

    def texts(self, rows: Rows) -> list[str]:
        return [*super().texts(rows), *(f"more {number}" for number in range(5))]


def test_texts_beside_those_of_the_rows_are_no_pairs() -> None:
    """Which of them belong together is not known: the health is that of all distinct texts."""
    rows, embeddings_UD, text_N, unit = made(30)
    more = RNG.normal(size=(5, 8))
    embeddings_UD = torch.cat([embeddings_UD, torch.tensor(more, dtype=torch.float32)])
    found = measure(WithMoreTexts(), rows, embeddings_UD, torch.cat([text_N, torch.arange(60, 65)]))
    distinct = np.concatenate([unit[0][:1], unit[0][2:], unit[1], more / np.linalg.norm(more, axis=1, keepdims=True)])
    assert found.metrics["uniformity"] == pytest.approx(np.log(np.exp(-2 * pdist(distinct) ** 2).mean()), abs=1e-6)
    assert found.metrics["negative_p50"] == pytest.approx(1 - np.median(pdist(distinct, "cosine")), abs=1e-6)
    assert found.histograms.keys() == {"negative_histogram"}
    assert "alignment" not in found.metrics
