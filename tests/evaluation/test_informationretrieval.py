"""InformationRetrieval against pytrec-eval and sentence-transformers on the same neighbours; sets on 1 and 2 ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from tests.evaluation.test_sharded import MAX_TOKENS, Recorder
from tests.two_ranks import TwoRanks
from trainer.data.collate import TokenSpans
from trainer.data.evalsource import EvalSource
from trainer.data.validation import open_validation
from trainer.distributed import gather
from trainer.encoder import Encoder, EncoderSpec
from trainer.evaluation import InformationRetrieval
from trainer.evaluation.scoring import evaluate
from trainer.evaluation.search import Collection
from trainer.evaluation.sharded import TokenizedTexts, of_all_texts
from trainer.evaluation.topk import Neighbours, top_k

NUM_QUERIES, NUM_DOCUMENTS = 30, 150


class Lookup:
    """Answers sentence-transformers' evaluator with ready-made embeddings instead of a model."""

    similarity_fn_name = "cosine"

    def __init__(self, embeddings: dict[str, torch.Tensor]) -> None:
        self.embeddings = embeddings
        self.model_card_data = self

    def encode_query(self, texts: list[str], **kwargs: object) -> torch.Tensor:
        return torch.stack([self.embeddings[text] for text in texts])

    encode_document = encode_query

    def similarity(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T

    def set_evaluation_metrics(self, *args: object, **kwargs: object) -> None:
        pass


def make_collection() -> tuple[Collection, torch.Tensor, torch.Tensor]:
    """Graded judgements 0 to 4, 1 to 14 relevant documents a query, and embeddings that find some of them."""
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(NUM_DOCUMENTS, 24))
    relevance, queries = [], []
    for _ in range(NUM_QUERIES):
        judged = rng.choice(NUM_DOCUMENTS, size=rng.integers(2, 16), replace=False)
        grades = rng.integers(0, 5, size=len(judged))
        grades[0] = max(1, grades[0])
        relevance.append(dict(zip(judged.tolist(), grades.tolist(), strict=True)))
        queries.append(documents[judged].mean(axis=0) + 0.4 * rng.normal(size=24))
    collection = Collection(
        query_ids=[f"q{i}" for i in range(NUM_QUERIES)],
        queries=[f"query {i}" for i in range(NUM_QUERIES)],
        document_ids=[f"d{i}" for i in range(NUM_DOCUMENTS)],
        documents=[f"document {i}" for i in range(NUM_DOCUMENTS)],
        relevance_Q=relevance,
    )
    as_tensor = lambda rows: torch.tensor(np.array(rows), dtype=torch.float32)  # noqa: E731
    return collection, as_tensor(queries), as_tensor(documents)


def test_metrics_equal_those_of_pytrec_eval() -> None:
    """Of the graded judgements: ndcg_cut, P, recall, success, and map and mrr over the whole ranking."""
    collection, queries, documents = make_collection()
    evaluator = InformationRetrieval(
        ndcg_at=[3, 10], mrr_at=[NUM_DOCUMENTS], map_at=[NUM_DOCUMENTS], accuracy_at=[1, 10]
    )
    ours = evaluator.score_neighbours(top_k(queries, documents, evaluator.depth), collection)
    names, qrels = collection.document_ids, dict(zip(collection.query_ids, collection.relevance_Q, strict=True))
    judge = pytrec_eval.RelevanceEvaluator(
        {query: {names[d]: grade for d, grade in judged.items()} for query, judged in qrels.items()},
        {"ndcg_cut.3,10", "P.1,10", "recall.1,10", "success.1,10", "map", "recip_rank"},
    )
    scores = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(documents).T
    run = {query: dict(zip(names, row.tolist(), strict=True)) for query, row in zip(qrels, scores, strict=True)}
    theirs = judge.evaluate(run)
    pairs = {"ndcg@3": "ndcg_cut_3", "ndcg@10": "ndcg_cut_10", f"map@{NUM_DOCUMENTS}": "map"}
    pairs |= {f"mrr@{NUM_DOCUMENTS}": "recip_rank"}
    for k in (1, 10):
        pairs |= {f"precision@{k}": f"P_{k}", f"recall@{k}": f"recall_{k}", f"accuracy@{k}": f"success_{k}"}
    for name, their_name in pairs.items():
        mean = float(np.mean([theirs[query][their_name] for query in collection.query_ids]))
        assert ours[f"cosine_{name}"] == pytest.approx(mean, abs=1e-6), name
    assert 0.2 < ours["cosine_ndcg@10"] < 0.95
    assert abs(ours["cosine_ndcg@10"] - ours["cosine_binary_ndcg@10"]) > 0.01


def test_metrics_equal_those_of_sentence_transformers() -> None:
    """Theirs know no grades: ndcg is our binary_ndcg, all others have the same name."""
    collection, queries, documents = make_collection()
    model = Lookup(dict(zip([*collection.queries, *collection.documents], [*queries, *documents], strict=True)))
    names = collection.document_ids
    relevant = {
        query: {names[d] for d, grade in judged.items() if grade > 0}
        for query, judged in zip(collection.query_ids, collection.relevance_Q, strict=True)
    }
    peer = InformationRetrievalEvaluator(
        dict(zip(collection.query_ids, collection.queries, strict=True)),
        dict(zip(names, collection.documents, strict=True)),
        relevant,
        write_csv=False,
    )
    evaluator = InformationRetrieval()
    ours = evaluator.score_neighbours(top_k(queries, documents, evaluator.depth), collection)
    theirs = peer(model)
    theirs["cosine_binary_ndcg@10"] = theirs.pop("cosine_ndcg@10")
    assert ours.keys() == theirs.keys() | {"cosine_ndcg@10"}
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name


def test_an_empty_list_is_none_of_a_metric() -> None:
    """As in sentence-transformers; the first metric that is left is the primary one."""
    collection, queries, documents = make_collection()
    evaluator = InformationRetrieval(ndcg_at=[], mrr_at=[], map_at=[5, 20], accuracy_at=[])
    ours = evaluator.score_neighbours(top_k(queries, documents, evaluator.depth), collection)
    assert list(ours) == ["cosine_map@5", "cosine_map@20"]
    assert evaluator.primary == "cosine_map@20"
    default = InformationRetrieval(map_at=[5, 20])
    assert default.primary == "cosine_ndcg@10"
    whole = default.score_neighbours(top_k(queries, documents, default.depth), collection)
    assert ours.items() <= whole.items()
    with pytest.raises(ValueError, match="ndcg_at, mrr_at, map_at and accuracy_at are empty; fill one"):
        InformationRetrieval(ndcg_at=[], mrr_at=[], map_at=[], accuracy_at=[])
    with pytest.raises(ValueError, match="a depth of 0; each must be 1 or more"):
        InformationRetrieval(mrr_at=[0])


def test_a_query_that_stands_in_the_corpus() -> None:
    """Left out where asked, as BEIR does: pytrec-eval over a run without it, at full depth."""
    collection, queries, documents = make_collection()
    own = replace(collection, query_ids=[f"d{i}" for i in range(0, 2 * NUM_QUERIES, 2)])
    documents[: 2 * NUM_QUERIES : 2] = queries  # each query is its own nearest document
    evaluator = InformationRetrieval(ignore_identical_ids=True)
    neighbours = top_k(queries, documents, evaluator.depth)
    ours = evaluator.score_neighbours(neighbours, own)
    names = own.document_ids
    scores = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(documents).T
    run = {
        query: {name: score for name, score in zip(names, row.tolist(), strict=True) if name != query}
        for query, row in zip(own.query_ids, scores, strict=True)
    }
    qrels = {
        query: {names[d]: grade for d, grade in judged.items()}
        for query, judged in zip(own.query_ids, own.relevance_Q, strict=True)
    }
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.10"}).evaluate(run)
    for name, their_name in (("ndcg@10", "ndcg_cut_10"), ("recall@10", "recall_10")):
        mean = float(np.mean([found[their_name] for found in theirs.values()]))
        assert ours[f"cosine_{name}"] == pytest.approx(mean, abs=1e-6), name
    whole = InformationRetrieval().score_neighbours(top_k(queries, documents, 100), own)
    assert whole["cosine_ndcg@10"] < ours["cosine_ndcg@10"] - 0.05


def test_a_corpus_smaller_than_the_depth() -> None:
    collection, queries, documents = make_collection()
    small = Collection(
        collection.query_ids[:1], collection.queries[:1], names := collection.document_ids[:4], names, [{1: 1, 3: 2}]
    )
    metrics = InformationRetrieval().score_neighbours(top_k(queries[:1], documents[:4], 100), small)
    assert metrics["cosine_recall@10"] == metrics["cosine_accuracy@10"] == 1.0
    assert metrics["cosine_precision@10"] == pytest.approx(0.2)


def run(
    source: EvalSource, encoder_dir: Path, cache: Path, max_tokens: int, bad: float | None = None
) -> tuple[dict[str, float] | str, list]:
    """On each rank: metrics of the source, or the text of the error, and the texts of each forward."""
    encoder = Encoder(EncoderSpec(str(encoder_dir), compact_vocabulary="off"), max_tokens=max_tokens).eval()
    encode = Recorder(encoder, bad)
    sets = open_validation(source, encoder.text, cache)
    try:
        return evaluate(encode, sets, gather.rank(), gather.world_size(), max_tokens), encode.seen
    except ValueError as error:
        return str(error), encode.seen


def write_set(folder: Path, texts: list[str], copies: int, num_documents: int = 60, capitals: bool = False) -> None:
    """A set as BEIR has it: every text ``copies`` times under other ids, queries that share words with documents.

    With ``capitals`` only the first copy is in small letters, which an uncased encoder does not see.
    """
    texts = list(dict.fromkeys(texts))
    folder.mkdir(parents=True)
    (folder / "qrels").mkdir()
    num_distinct = num_documents // copies
    corpus = [{"_id": f"d{i}", "title": "", "text": texts[i % num_distinct]} for i in range(num_documents)]
    for row in corpus[num_distinct:] if capitals else ():
        row["text"] = row["text"].upper()
    queries = [{"_id": f"q{i}", "text": texts[i] + " " + texts[i + 1]} for i in range(12)]
    lines = ["query-id\tcorpus-id\tscore"]
    lines += [f"q{i}\td{i}\t2" for i in range(12)] + [f"q{i}\td{i + 1}\t1" for i in range(12)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("capitals", [False, True])
def test_two_ranks_equal_one_process(
    capitals: bool, two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str], tmp_path: Path
) -> None:
    """Each distinct text is embedded once on one of the ranks; texts that stand twice keep their places, also those
    that the encoder can't tell apart."""
    write_set(tmp_path / "set", demo_texts, copies=2, capitals=capitals)
    source = EvalSource(str(tmp_path / "set"), name="set", evaluator=InformationRetrieval())
    alone, seen_alone = run(source, tiny_encoder, tmp_path / "cache", MAX_TOKENS)
    answers = two_ranks(run, source, tiny_encoder, tmp_path / "cache", MAX_TOKENS)
    (first, seen_first), (second, seen_second) = answers
    assert isinstance(alone, dict)
    assert first == second == pytest.approx(alone, abs=1e-6)
    assert 0.1 < alone["eval/set/cosine_ndcg@10"] < 1.0
    assert len(seen_first) == len(seen_second) > 2
    embedded = sorted(text for forward in seen_first + seen_second for text in forward)
    assert embedded == sorted(text for forward in seen_alone for text in forward)
    assert len(embedded) == 30 + 12


def test_equal_scores_rank_in_the_order_of_the_corpus() -> None:
    """A text that comes once more further down has that place, not the one beside its first."""
    spans = TokenSpans(np.arange(2, dtype=np.int32), np.arange(2), np.ones(2, dtype=np.int64))
    queries, documents = TokenizedTexts(spans, torch.tensor([0])), TokenizedTexts(spans, torch.tensor([0, 1, 0, 1]))
    found = Neighbours(torch.tensor([[0.5, 0.5]]), torch.tensor([[0, 1]]))
    assert of_all_texts(found, queries, documents, k=3).ids_Qk.tolist() == [[0, 1, 2]]
    nearer = Neighbours(torch.tensor([[0.6, 0.5]]), torch.tensor([[1, 0]]))
    assert of_all_texts(nearer, queries, documents, k=3).ids_Qk.tolist() == [[1, 3, 0]]


def test_metrics_equal_those_of_sentence_transformers_on_a_folder(
    tiny_encoder: Path, demo_texts: list[str], tmp_path: Path
) -> None:
    """Through rounds, shards and merging no document changes its name: theirs encode the same folder by themselves."""
    write_set(tmp_path / "set", demo_texts, copies=1)
    source = EvalSource(str(tmp_path / "set"), name="set", evaluator=InformationRetrieval())
    alone, _ = run(source, tiny_encoder, tmp_path / "cache", MAX_TOKENS)
    assert isinstance(alone, dict)
    (one,) = open_validation(source, None, tmp_path / "cache")  # type: ignore[arg-type]
    names = one.rows.document_ids
    peer = InformationRetrievalEvaluator(
        dict(zip(one.rows.query_ids, one.rows.queries, strict=True)),
        dict(zip(names, one.rows.documents, strict=True)),
        {q: {names[d] for d in judged} for q, judged in zip(one.rows.query_ids, one.rows.relevance_Q, strict=True)},
        write_csv=False,
    )
    theirs = peer(SentenceTransformer(str(tiny_encoder), device="cpu"))
    for name in ("cosine_accuracy@10", "cosine_recall@5", "cosine_mrr@10", "cosine_map@100"):
        assert alone[f"eval/set/{name}"] == pytest.approx(theirs[name], abs=1e-6), name


def test_all_ranks_raise_what_is_not_finite(
    two_ranks: TwoRanks, tiny_encoder: Path, demo_texts: list[str], tmp_path: Path
) -> None:
    write_set(tmp_path / "set", demo_texts, copies=1)
    source = EvalSource(str(tmp_path / "set"), name="set", evaluator=InformationRetrieval())
    answers = two_ranks(run, source, tiny_encoder, tmp_path / "cache", MAX_TOKENS, float("nan"))
    assert answers[0][0] == answers[1][0]
    assert "embeddings are not finite" in answers[0][0]


def cranfield(data_dir: Path, **fields: Any) -> EvalSource:
    folder = data_dir / "retrieval"
    return EvalSource(
        str(folder / "cranfield.queries.jsonl.gz"),
        name="cranfield",
        corpus=str(folder / "cranfield.corpus.jsonl.gz"),
        qrels=str(folder / "cranfield.qrels.jsonl.gz"),
        on_bad_row="skip",  # two documents have no text
        evaluator=InformationRetrieval(),
        **fields,
    )


def test_cranfield_equals_pytrec_eval_on_two_ranks(
    data_dir: Path, minilm: Path, two_ranks: TwoRanks, tmp_path: Path
) -> None:
    """A part of a real set with a real encoder: sentence-transformers embeds and pytrec-eval scores the same texts."""
    source = cranfield(data_dir, max_rows=4, corpus_size=50)
    (one,) = open_validation(source, None, tmp_path / "cache")  # type: ignore[arg-type]
    found, names = one.rows, one.rows.document_ids
    model = SentenceTransformer(str(minilm), device="cpu")
    scores = model.encode(found.queries) @ model.encode(found.documents).T
    relevance = zip(found.query_ids, found.relevance_Q, strict=True)
    judge = pytrec_eval.RelevanceEvaluator(
        {query: {names[d]: grade for d, grade in judged.items()} for query, judged in relevance}, {"ndcg_cut.10"}
    )
    rows = zip(found.query_ids, scores.tolist(), strict=True)
    theirs = judge.evaluate({query: dict(zip(names, row, strict=True)) for query, row in rows})
    expected = float(np.mean([theirs[query]["ndcg_cut_10"] for query in found.query_ids]))
    for metrics, _ in two_ranks(run, source, minilm, tmp_path / "cache", 4096, timeout_s=240):
        assert metrics["eval/cranfield/cosine_ndcg@10"] == pytest.approx(expected, abs=1e-6)
    assert 0.3 < expected < 0.95
