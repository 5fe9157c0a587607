"""Reranking against sentence-transformers' evaluator and scikit-learn, on the same embeddings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.sentence_transformer.evaluation import RerankingEvaluator
from sklearn.metrics import ndcg_score

from tests.evaluation.test_scores import Lookup
from trainer.data.evalsource import EvalSource
from trainer.data.loading import load
from trainer.evaluation import Reranking


def make_candidates(grades: int) -> tuple[Dataset, Lookup, torch.Tensor]:
    """40 queries with 2 to 15 candidates each, rows in mixed order; the labels go from 0 to ``grades``."""
    rng = np.random.default_rng(3)
    rows, table = [], {}
    for query in range(40):
        anchor = rng.normal(size=12)
        table[f"query {query}"] = anchor
        for candidate in range(rng.integers(2, 16)):
            label = int(rng.integers(0, grades + 1)) if candidate else grades
            text = f"candidate {query} {candidate}"
            table[text] = anchor * label / grades + 1.5 * rng.normal(size=12)
            rows.append({"anchor": f"query {query}", "positive": text, "label": label})
    rng.shuffle(rows)
    model = Lookup({text: vector.astype(np.float32) for text, vector in table.items()})
    data = Dataset.from_list(rows)
    embeddings = torch.from_numpy(model.encode([*data["anchor"], *data["positive"]]))
    model.encode_query = model.encode_document = lambda texts, **kwargs: torch.from_numpy(model.encode(texts))
    return data, model, embeddings


@pytest.mark.parametrize("at", [1, 10])
def test_equals_sentence_transformers(at: int) -> None:
    rows, model, embeddings = make_candidates(grades=1)
    samples = {query: {"query": query, "positive": [], "negative": []} for query in dict.fromkeys(rows["anchor"])}
    for row in rows:
        samples[row["anchor"]]["positive" if row["label"] else "negative"].append(row["positive"])
    theirs = RerankingEvaluator(list(samples.values()), at_k=at, write_csv=False)(model)
    ours = Reranking(at=at).score(embeddings, rows)
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert Reranking(at=at).primary in ours
    assert 0.3 < ours["map"] < 0.99


def test_lists_of_positives_and_negatives(tmp_path: Path) -> None:
    """The records that sentence-transformers takes: lists of unlike length, of which a source makes rows."""
    rows, model, _ = make_candidates(grades=1)
    samples: dict[str, dict[str, Any]] = {}
    for row in rows:
        empty = {"query": row["anchor"], "positive": [], "negative": []}
        samples.setdefault(row["anchor"], empty)["positive" if row["label"] else "negative"].append(row["positive"])
    records = [sample for sample in samples.values() if sample["positive"] and sample["negative"]]
    assert len({len(record["negative"]) for record in records}) > 3
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    columns = {"anchor": "query", "positives": "positive", "negatives": "negative"}
    source = EvalSource(str(tmp_path / "lists.jsonl"), columns, name="lists", max_negatives=20, evaluator=Reranking())
    loaded = load(source, tmp_path / "cache")
    embeddings = torch.from_numpy(model.encode(Reranking().texts(loaded)))
    theirs = RerankingEvaluator(records, write_csv=False)(model)
    assert Reranking().score(embeddings, loaded) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("more", [{}, {"prompts": {"negatives": "passage: "}}, {"max_rows": 45}])
def test_all_negatives_count_unless_a_number_is_given(tmp_path: Path, more: dict[str, Any]) -> None:
    """60 records of 1 to 30 negatives, of which a training source would take 7; no score of the worst is left out."""
    rng = np.random.default_rng(5)
    prompt = more.get("prompts", {}).get("negatives", "")
    records, table = [], {}
    for query in range(60):
        anchor = rng.normal(size=12)
        negatives = [f"other {query} {place}" for place in range(30 if query == 0 else rng.integers(1, 31))]
        records.append({"query": f"query {query}", "positive": [f"right {query}"], "negative": negatives})
        table[f"query {query}"] = anchor
        table[f"right {query}"] = anchor + 1.5 * rng.normal(size=12)
        table |= {prompt + text: 0.3 * anchor + rng.normal(size=12) for text in negatives}
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    columns = {"anchor": "query", "positives": "positive", "negatives": "negative"}
    source = EvalSource(str(tmp_path / "lists.jsonl"), columns, name="lists", evaluator=Reranking(), **more)
    rows = load(source, tmp_path / "cache")
    model = Lookup({text: vector.astype(np.float32) for text, vector in table.items()})
    ours = Reranking().score(torch.from_numpy(model.encode(Reranking().texts(rows))), rows)
    model.encode_query = model.encode_document = lambda texts, **kwargs: torch.from_numpy(model.encode(texts))
    kept = set(rows["anchor"])
    samples = [
        {**record, "negative": [prompt + text for text in record["negative"]]}
        for record in records
        if record["query"] in kept
    ]
    assert len(samples) == more.get("max_rows", 60)
    assert ours == pytest.approx(RerankingEvaluator(samples, write_csv=False)(model), abs=1e-6)


@pytest.mark.parametrize("lists", [False, True])
def test_a_sample_is_one_of_queries_with_all_their_candidates(lists: bool, tmp_path: Path) -> None:
    """30 queries of 20 candidates or of 3 positives and a negative: else a query is easier the fewer it keeps."""
    rows: list[dict[str, Any]] = [
        {"q": f"query {i % 30}", "p": f"passage {i}", "l": int(i < 30)} for i in range(30 * 20)
    ]
    columns: dict[str, int | str] = {"anchor": "q", "positive": "p", "label": "l"}
    if lists:
        rows = [{"q": f"query {i}", "p": [f"{i} {k}" for k in "abc"], "n": [f"{i} d"]} for i in range(30)]
        columns = {"anchor": "q", "positives": "p", "negatives": "n"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [
        load(EvalSource(str(tmp_path / "rows.jsonl"), columns, name="x", evaluator=Reranking(), **more), tmp_path / "c")
        for more in ({}, {"max_rows": 7}, {"max_rows": 30})
    ]
    whole, sample, all_queries = [found.to_pandas() for found in sets]
    assert whole.equals(all_queries)
    assert sample["anchor"].nunique() == 7
    assert sample.equals(whole[whole["anchor"].isin(sample["anchor"])].reset_index(drop=True))


def test_neither_labels_nor_negatives() -> None:
    with pytest.raises(ValueError, match=r"needs a label that says which .*; the set has anchor, positive"):
        Reranking().score(torch.randn(4, 3), {"anchor": ["q"] * 2, "positive": ["a", "b"]})


def test_a_label_beside_negatives_is_refused_when_the_set_is_opened() -> None:
    rows = {"anchor": ["q"] * 2, "positive": ["good", "bad"], "label": [1, 0], "negative": ["n1", "n2"]}
    with pytest.raises(ValueError, match=r"a label and negative, but a positive .*; leave one of the two out"):
        Reranking().refuse_rows(rows)


NO_CHOICE: dict[str, tuple[int, dict[str, list[Any]]]] = {
    "all relevant": (1, {"anchor": ["q"] * 2, "positive": ["a", "b"], "label": [1, 2]}),
    "none relevant": (2, {"anchor": ["q", "r"], "positive": ["a", "b"], "label": [0, 0]}),
    "one each": (2, {"anchor": ["q", "r"], "positive": ["a", "b"], "label": [1, 0]}),
    "no negatives": (1, {"anchor": ["q"] * 2, "positive": ["a", "b"], "negative_1": [None, None]}),
    "positives again": (1, {"anchor": ["q"] * 2, "positive": ["a", "b"], "negative_1": ["b", None]}),
}


@pytest.mark.parametrize("case", NO_CHOICE)
def test_a_set_without_a_choice_is_refused_when_it_is_opened(case: str) -> None:
    num_queries, rows = NO_CHOICE[case]
    wanted = f"none of {num_queries} queries has both relevant and other candidates"
    with pytest.raises(ValueError, match=wanted):
        Reranking().refuse_rows(rows)
    with pytest.raises(ValueError, match=wanted):
        Reranking().score(torch.randn(4 + sum(text is not None for text in rows.get("negative_1", [])), 3), rows)


def test_grades_are_gains() -> None:
    """One query: ndcg by scikit-learn from the grades, map and mrr from grades above 0."""
    angles = np.deg2rad([10, 20, 30, 40])
    positives = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], axis=1), dtype=torch.float32)
    grades = [0, 1, 0, 3]
    rows = {"anchor": ["q"] * 4, "positive": list("abcd"), "label": grades}
    metrics = Reranking().score(torch.cat([torch.tensor([[1.0, 0.0]] * 4), positives]), rows)
    assert metrics["ndcg@10"] == pytest.approx(ndcg_score([grades], [np.cos(angles)]))
    assert metrics["mrr@10"] == 0.5
    assert metrics["map"] == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_queries_without_a_choice_are_left_out_and_nothing_else_is_refused() -> None:
    rows, _, embeddings = make_candidates(grades=1)
    more = Dataset.from_list([*rows, {"anchor": "sure", "positive": "x", "label": 1}])
    half = len(rows)
    anchors, positives = embeddings[:half], embeddings[half:]
    padded = torch.cat([anchors, anchors[:1], positives, positives[:1]])
    assert Reranking().score(padded, more) == Reranking().score(embeddings, rows)
    with pytest.raises(ValueError, match="none of 1 queries has both relevant and other candidates"):
        Reranking().score(torch.randn(4, 3), {"anchor": ["q"] * 2, "positive": ["a", "b"], "label": [1, 1]})
