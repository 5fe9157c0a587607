"""STS and Triplet against sentence-transformers' evaluators and scipy, on the same embeddings."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    TripletEvaluator,
)

from trainer.evaluation import STS, Evaluator, Triplet

NAMES = ["cosine", "dot", "euclidean", "manhattan"]


class Lookup:
    """Answers sentence-transformers' evaluators with ready-made embeddings instead of a model."""

    similarity_fn_name = "cosine"

    def __init__(self, embeddings: dict[str, np.ndarray]) -> None:
        self.embeddings = embeddings
        self.model_card_data = self

    def encode(self, texts: list[str], **kwargs: object) -> np.ndarray:
        return np.stack([self.embeddings[text] for text in texts])

    encode_query = encode_document = encode

    def set_evaluation_metrics(self, *args: object, **kwargs: object) -> None:
        pass


def make_rows(columns: tuple[str, ...], num_rows: int = 200) -> tuple[Dataset, Lookup, torch.Tensor]:
    """Rows whose columns are noisy copies of the anchor; some rows are ties."""
    rng = np.random.default_rng(0)
    anchor = rng.normal(size=(num_rows, 16)).astype(np.float32)
    noise = rng.uniform(0, 3, size=(num_rows, 1)).astype(np.float32)
    data: dict[str, list] = {}
    table = {}
    parts = []
    for column in columns:
        vectors = anchor if column == "anchor" else anchor + noise * rng.normal(size=anchor.shape).astype(np.float32)
        if column != "anchor":
            vectors[:3] = anchor[:3] * 2  # ties, and a negative exactly as near as the positive
        data[column] = [f"{column} {i}" for i in range(num_rows)]
        table.update(zip(data[column], vectors, strict=True))
        parts.append(vectors)
    data["score"] = np.round(np.clip(1 - noise[:, 0] / 3 + rng.normal(0, 0.1, num_rows), 0, 1), 1).tolist()
    return Dataset.from_dict(data), Lookup(table), torch.from_numpy(np.concatenate(parts))


def assert_close(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name


def test_sts_equals_sentence_transformers() -> None:
    rows, model, embeddings = make_rows(("anchor", "positive"))
    peer = EmbeddingSimilarityEvaluator(
        rows["anchor"], rows["positive"], rows["score"], similarity_fn_names=NAMES, write_csv=False
    )
    ours = STS().score(embeddings, rows)
    assert_close(ours, peer(model))
    assert 0.2 < ours[STS.primary] < 0.99
    assert ours["spearman_cosine"] != ours["spearman_euclidean"]


def test_triplet_equals_sentence_transformers() -> None:
    rows, model, embeddings = make_rows(("anchor", "positive", "negative"))
    for margin in (0.0, 0.1):
        peer = TripletEvaluator(
            rows["anchor"],
            rows["positive"],
            rows["negative"],
            similarity_fn_names=NAMES,
            margin=margin,
            write_csv=False,
        )
        ours = Triplet(margin=margin).score(embeddings, rows)
        assert_close(ours, peer(model))
    assert ours[Triplet.primary] < 0.6


def test_a_margin_that_every_row_passes() -> None:
    """sentence-transformers counts all rows as right, where a margin of 0 finds less than 60 %."""
    rows, model, _ = make_rows(("anchor", "positive", "negative"))
    texts = (rows["anchor"], rows["positive"], rows["negative"])
    found = TripletEvaluator(*texts, similarity_fn_names=["cosine"], margin=-5.0, write_csv=False)(model)
    assert found == {"cosine_accuracy": 1.0}
    for margin in (-5.0, math.nan):
        with pytest.raises(ValueError, match=f"^Triplet evaluator: margin is {margin:g}; it must be 0 or more"):
            Triplet(margin=margin)


def test_texts_are_the_columns_one_behind_the_other() -> None:
    rows = {"anchor": ["a", "b"], "positive": ["c", "d"], "negative": ["e", "f"], "score": [0.0, 1.0]}
    assert STS().texts(rows) == ["a", "b", "c", "d"]
    assert Triplet().texts(rows) == ["a", "b", "c", "d", "e", "f"]


def test_plain_mappings_score_like_datasets() -> None:
    rows, _, embeddings = make_rows(("anchor", "positive"), num_rows=20)
    plain = {name: list(rows[name]) for name in rows.column_names}
    assert STS().score(embeddings, plain) == STS().score(embeddings, rows)


def test_sts_ranks_by_cosine() -> None:
    """Two dimensions, angles 0, 30, 60, 90 degrees: the order is known, lengths must not matter."""
    angles = np.deg2rad([0, 30, 60, 90])
    positive = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[5], [1], [9], [2]])
    embeddings = torch.tensor(np.concatenate([np.tile([1.0, 0.0], (4, 1)), positive]), dtype=torch.float32)
    gold = [1.0, 0.5, 0.7, 0.0]
    metrics = STS().score(embeddings, {"anchor": ["a"] * 4, "positive": ["b"] * 4, "score": gold})
    assert metrics["spearman_cosine"] == pytest.approx(spearmanr(gold, np.cos(angles))[0])
    assert metrics["spearman_cosine"] == pytest.approx(0.8)


@pytest.mark.parametrize("evaluator", [STS(), Triplet()])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_embeddings_are_refused_with_their_count(evaluator: Evaluator, bad: float) -> None:
    rows, _, embeddings = make_rows(evaluator.text_columns, num_rows=10)
    embeddings[3, 5] = embeddings[3, 6] = embeddings[7, 0] = bad
    with pytest.raises(ValueError, match=rf"2 of {len(embeddings)} embeddings are not finite"):
        evaluator.score(embeddings, rows)


def test_equal_gold_scores_are_refused() -> None:
    rows = {"anchor": ["a", "b"], "positive": ["c", "d"], "score": [0.5, 0.5]}
    with pytest.raises(ValueError, match="the 2 rows hold 1"):
        STS().score(torch.randn(4, 3), rows)


def test_collapsed_embeddings_have_no_correlation_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    rows = {"anchor": ["a", "b"], "positive": ["c", "d"], "score": [0.0, 1.0]}
    metrics = STS().score(torch.ones(4, 3), rows)
    assert all(math.isnan(value) for value in metrics.values())
    assert not recwarn.list
