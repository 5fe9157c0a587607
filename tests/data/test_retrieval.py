"""Retrieval sets as they lie about: BEIR, NanoBEIR, TREC, three files; and what is wrong with them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.stub_hub import stub_hub
from trainer.data.evalsource import EvalSource
from trainer.data.leaks import leak_facts
from trainer.data.retrieval import load_collections
from trainer.data.sources import Source
from trainer.evaluation import InformationRetrieval
from trainer.evaluation.search import Collection

ROOT = Path(__file__).parents[2]
QUERIES = [{"_id": f"q{i}", "text": f"what is thing {i} ?"} for i in range(4)]
CORPUS = [{"_id": f"d{i}", "title": f"Thing {i}" if i % 2 else "", "text": f"all about thing {i}"} for i in range(8)]
JUDGED = [("q0", "d0", 2), ("q0", "d1", 1), ("q1", "d3", 1), ("q2", "d4", 0), ("q3", "d7", 3)]
EXPECTED = Collection(
    query_ids=["q0", "q1", "q3"],  # q2 has no relevant document
    queries=["what is thing 0 ?", "what is thing 1 ?", "what is thing 3 ?"],
    document_ids=[f"d{i}" for i in range(8)],
    documents=[f"Thing {i} all about thing {i}" if i % 2 else f"all about thing {i}" for i in range(8)],
    relevance_Q=[{0: 2, 1: 1}, {3: 1}, {7: 3}],
)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_beir(folder: Path, judged: Sequence[tuple[str, str, int]] = JUDGED) -> Path:
    write_lines(folder / "queries.jsonl", QUERIES)
    write_lines(folder / "corpus.jsonl", CORPUS)
    (folder / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{d}\t{grade}" for q, d, grade in judged)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_three(folder: Path, qrels: str, content: str, **columns: str) -> dict[str, Any]:
    """A source's fields: queries, corpus and judgements with other names of columns."""
    queries = [{"id": int(row["_id"][1:]), "question": row["text"]} for row in QUERIES]
    corpus = [{"docno": row["_id"], "title": row["title"], "body": row["text"]} for row in CORPUS]
    (folder / qrels).write_text(content)
    return {
        "path": str(write_lines(folder / "topics.jsonl.gz", queries)),
        "corpus": str(write_lines(folder / "documents.jsonl", corpus)),
        "qrels": str(folder / qrels),
        "columns": {"query": "question", "document_id": "docno", "document": "body", **columns},
    }


def load_one(tmp_path: Path, **fields: Any) -> Collection:
    source = EvalSource(name="set", evaluator=InformationRetrieval(), **fields)
    (one,) = load_collections(source, tmp_path / "cache").values()
    return one


def test_a_folder_of_beir_loads_as_it_is(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "scifact")
    assert load_one(tmp_path, path=str(folder)) == EXPECTED
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td2\t1\n")
    assert load_one(tmp_path, path=str(folder)) == EXPECTED  # no split is named: test
    assert load_one(tmp_path, path=str(folder), split="test") == EXPECTED
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td2\t1\n")
    assert load_one(tmp_path, path=str(folder), split="dev").relevance_Q == [{2: 1}]
    with pytest.raises(ValueError, match="no judgements of split 'tset'; found: dev, test, train"):
        load_one(tmp_path, path=str(folder), split="tset")


@pytest.mark.parametrize("reverse", [False, True])
def test_a_document_may_have_no_title(reverse: bool, tmp_path: Path) -> None:
    """Whichever documents come first: as a title that is null, and as BEIR's own loader reads it."""
    folder = write_beir(tmp_path / "scifact")
    titled = [{"_id": f"t{i}", "title": f"Title {i}", "text": "a text"} for i in range(120)]
    bare = [{"_id": row["_id"], "text": row["text"]} for row in CORPUS]
    bare += [{"_id": f"b{i}", "text": "bare"} for i in range(120)]
    write_lines(folder / "corpus.jsonl", [*titled, *bare] if reverse else [*bare, *titled])
    found = load_one(tmp_path, path=str(folder))
    documents = dict(zip(found.document_ids, found.documents, strict=True))
    assert (documents["t119"], documents["d0"], documents["b0"]) == ("Title 119 a text", CORPUS[0]["text"], "bare")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("judged.trec", "0 0 d0 2\n0 0 d1 1\n1 0 d3 1\n\n2 0 d4 0\n3 0 d7 3\n"),
        ("judged.txt", "0\tQ0\td0\t2\n0\tQ0\td1\t1\n1\tQ0\td3\t1\n3\tQ0\td7\t3\n"),
        ("judged.csv", "qid,doc,rel\n0,d0,2\n0,d1,1\n1,d3,1\n3,d7,3\n"),
    ],
)
def test_three_files_with_columns_of_their_own(tmp_path: Path, name: str, content: str) -> None:
    found = load_one(tmp_path, **write_three(tmp_path, name, content))
    assert found.query_ids == ["0", "1", "3"]
    assert (found.documents, found.relevance_Q) == (EXPECTED.documents, EXPECTED.relevance_Q)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_first_row_is_not_lost_as_a_header(suffix: str, tmp_path: Path) -> None:
    """Files without a header, read by positions; judgements of TREC have none and need none."""
    separator = "," if suffix == ".csv" else "\t"
    rows = {
        "queries": ["qid,text", "q1,one", "q2,two"],
        "corpus": ["pid,text", "d1,uno", "d2,dos", "d3,tres"],
        "qrels": ["qid,pid", "q1,d3", "q2,d2"],
    }
    columns = {"query_id": 0, "query": 1, "document_id": 0, "document": 1, "judged_query": 0, "judged_document": 1}
    paths = {name: tmp_path / f"{name}{suffix}" for name in rows}

    def found(lacks_header: str = "", qrels: Path = paths["qrels"]) -> Collection:
        for name, lines in rows.items():
            text = "\n".join(lines[name == lacks_header :]).replace(",", separator)
            paths[name].write_text(text)
        path, corpus = str(paths["queries"]), str(paths["corpus"])
        return load_one(tmp_path, path=path, corpus=corpus, qrels=str(qrels), columns=columns)

    assert (found().queries, found().relevance_Q) == (["one", "two"], [{2: 1}, {1: 1}])
    for name, first in (("queries", "'q1', 'one'"), ("corpus", "'d1', 'uno'"), ("qrels", "'q1', 'd3'")):
        with pytest.raises(
            ValueError, match=f"{name}{suffix}: its first line should name its columns, but holds {first}"
        ):
            found(lacks_header=name)
    (tmp_path / "judged.trec").write_text("q1 0 d3 1\nq2 0 d2 1\n")
    assert found(qrels=tmp_path / "judged.trec") == found()
    rows["queries"][0] = "nummer,frage"  # a header of names that nobody knows
    with pytest.raises(ValueError, match=r"say its names instead of positions: columns: .query_id: nummer, "):
        found()
    columns.update({"query_id": "nummer", "query": "frage"})  # type: ignore[dict-item]
    assert found().queries == ["one", "two"]


def test_suites(tmp_path: Path) -> None:
    """Folders in a folder, and NanoBEIR's folders of tables, one for each set; there judgements have no grades."""
    for name in ("first", "second"):
        write_beir(tmp_path / "beir" / name, JUDGED if name == "first" else JUDGED[:2])
    source = EvalSource(str(tmp_path / "beir"), name="beir", evaluator=InformationRetrieval())
    found = load_collections(source, tmp_path / "cache")
    assert list(found) == ["beir/first", "beir/second"]
    assert found["beir/first"] == EXPECTED
    assert found["beir/second"].query_ids == ["q0"]

    pairs = [{"query-id": q, "corpus-id": d} for q, d, grade in JUDGED if grade]
    for kind, rows in (("queries", QUERIES), ("corpus", CORPUS), ("qrels", pairs)):
        (tmp_path / "nano" / kind).mkdir(parents=True)
        for name in ("NanoA", "NanoB"):
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "nano" / kind / f"{name}-00000-of-00001.parquet")
    nano = EvalSource(str(tmp_path / "nano"), name="nano", evaluator=InformationRetrieval())
    found = load_collections(nano, tmp_path / "cache")
    assert list(found) == ["nano/NanoA", "nano/NanoB"]
    assert found["nano/NanoA"].relevance_Q == [{0: 1, 1: 1}, {3: 1}, {7: 1}]
    (tmp_path / "nano" / "qrels" / "NanoB-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="qrels/ has no table of 'NanoB', which other folders have"):
        load_collections(nano, tmp_path / "cache")


HUB = """
import sys
from trainer.data.retrieval import load_collections
from trainer.data.evalsource import EvalSource
from trainer.evaluation import InformationRetrieval
found = load_collections(EvalSource("org/nano", name="nano", evaluator=InformationRetrieval()), sys.argv[1])
print({name: (one.query_ids, len(one.documents), one.relevance_Q) for name, one in found.items()})
"""


def test_a_suite_of_the_hub_and_without_a_network_afterwards(tmp_path: Path) -> None:
    """NanoBEIR's layout: three configurations, a split for each set. Processes of their own: whether there is a network
    is read at import."""
    parts = {"queries": QUERIES, "corpus": CORPUS, "qrels": [{"query-id": q, "corpus-id": d} for q, d, _ in JUDGED[:4]]}
    configs = []
    for kind, rows in parts.items():
        files = []
        for name in ("NanoA", "NanoB"):
            write_lines(tmp_path / "nano" / kind / f"{name}.jsonl", rows)
            files.append({"split": name, "path": f"{kind}/{name}.jsonl"})
        configs.append({"config_name": kind, "data_files": files})
    (tmp_path / "nano" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")

    def load(**environ: str) -> str:
        home = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", **environ}
        command = [sys.executable, "-c", HUB, str(tmp_path / f"cache-{environ['HF_HUB_OFFLINE']}")]
        done = subprocess.run(
            command, env={**os.environ, **home}, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()[-1]

    with stub_hub({}, {"org/nano": tmp_path / "nano"}) as hub:
        online = load(HF_ENDPOINT=hub, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    one = (["q0", "q1", "q2"], 8, [{0: 1, 1: 1}, {3: 1}, {4: 1}])
    assert online == str({"nano/NanoA": one, "nano/NanoB": one})
    assert load(HF_HUB_OFFLINE="1") == online


def test_prompts_and_parts_of_a_set(tmp_path: Path) -> None:
    """Fewer queries and documents: the judged documents of the queries that are left stay, with their numbers."""
    folder = str(write_beir(tmp_path / "set"))
    found = load_one(tmp_path, path=folder, prompts={"query": "query: ", "document": "passage: "}, max_rows=2)
    assert len(found.queries) == 2
    assert all(text.startswith("query: what") for text in found.queries)
    assert all(text.startswith("passage: ") for text in found.documents)
    small = load_one(tmp_path, path=folder, corpus_size=5)
    assert len(small.documents) == 5
    names = [{small.document_ids[d]: g for d, g in judged.items()} for judged in small.relevance_Q]
    assert names == [{"d0": 2, "d1": 1}, {"d3": 1}, {"d7": 3}]
    assert small == load_one(tmp_path, path=folder, corpus_size=5)


def test_missing_documents_and_ids_that_stand_twice_are_listed(tmp_path: Path) -> None:
    """Fault 12: the first five, with file and line; skip leaves them out."""
    folder = write_beir(tmp_path / "set", [*JUDGED, *(("q0", f"x{i}", 1) for i in range(7)), ("q9", "d0", 1)])
    blank, unnamed = {"_id": "blank", "title": "", "text": " "}, {"_id": 1.5, "title": "", "text": "a text"}
    write_lines(folder / "corpus.jsonl", [*CORPUS, CORPUS[2], blank, unnamed])
    with pytest.raises(ValueError, match="11 bad rows; mend them, or set on_bad_row: skip") as refusal:
        load_one(tmp_path, path=str(folder))
    lines = str(refusal.value).splitlines()
    assert len(lines) == 6
    assert lines[0].endswith(f"corpus.jsonl:9: the id 'd2' stands at {folder}/corpus.jsonl:3 too")
    assert lines[1].endswith("corpus.jsonl:10: is blank") or lines[1].endswith("corpus.jsonl:10: is empty")
    assert lines[2].endswith("corpus.jsonl:11: column '_id' holds a number (1.5), not text")
    assert lines[3].endswith("test.tsv:7: judges document 'x0', not in the corpus")
    assert load_one(tmp_path, path=str(folder), on_bad_row="skip") == EXPECTED
    with pytest.raises(ValueError, match="11 bad rows, over max_bad_rows 9"):
        load_one(tmp_path, path=str(folder), on_bad_row="skip", max_bad_rows=9)


@pytest.mark.parametrize(
    ("grade", "told"),
    [
        ("", "is empty"),
        ("nan", "is nan, not a finite number"),
        ("2.5", "is 2.5, not a whole number"),
        ("1e39", r"is 1e\+39, not a whole number"),
    ],
)
def test_a_grade_that_is_none_is_named_with_its_column(grade: str, told: str, tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "set", JUDGED)
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write(f"q0\td2\t{grade}\n")
    with pytest.raises(ValueError, match=f"test.tsv:7: column 'score' {told}"):
        load_one(tmp_path, path=str(folder))


def test_judgements_that_contradict_each_other_are_listed(tmp_path: Path) -> None:
    """The same grade twice is no harm; with skip the first grade stays."""
    folder = write_beir(tmp_path / "set", [*JUDGED, ("q0", "d0", 2), ("q0", "d1", 0)])
    with pytest.raises(ValueError, match="1 bad row; mend them, or set on_bad_row: skip") as refusal:
        load_one(tmp_path, path=str(folder))
    line = str(refusal.value).splitlines()[0]
    assert line.endswith("test.tsv:8: judges document 'd1' for query 'q0' with 0, and a row before it with 1")
    assert load_one(tmp_path, path=str(folder), on_bad_row="skip") == EXPECTED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"querry": "x"}}, r"columns has 'querry', .* Did you mean 'query'\?"),
        ({"columns": {"query": "body"}}, r"no column 'body' \(columns.query\); found: _id, text"),
        ({"corpus": "x.jsonl"}, "qrels is missing; name queries"),
        ({"where": {"a": 1}}, "where does not go with an evaluator that searches"),
        ({"max_negatives": 7}, "max_negatives does not go with an evaluator that searches; leave it out"),
        ({"corpus_size": 0}, "corpus_size is 0; it must be 1 or more"),
        ({"prompts": {"anchor": "query: "}}, "prompts names 'anchor'; there are query, document"),
    ],
)
def test_wrong_fields(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_beir(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        load_one(tmp_path, path=str(folder), **change)


def test_what_is_no_set_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a set"):
        load_one(tmp_path, path=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="corpus and qrels are missing; name them beside path"):
        load_one(tmp_path, path=str(write_lines(tmp_path / "q.jsonl", QUERIES)))
    with pytest.raises(ValueError, match="none of 4 queries has a relevant document"):
        load_one(tmp_path, path=str(write_beir(tmp_path / "none", [("q0", "d0", 0)])))
    for number, name in enumerate(("queries.jsonl", "corpus.jsonl", "qrels/test.tsv")):
        folder = write_beir(tmp_path / f"without {number}")
        (folder / name).write_text("\n")
        with pytest.raises(ValueError, match=f"{name}: there is no row$"):
            load_one(tmp_path, path=str(folder))


def test_queries_that_stand_in_training_are_leaks(tmp_path: Path) -> None:
    """Two of three queries and one document; that a document is trained on is no leak of a query."""
    source = EvalSource(str(write_beir(tmp_path / "set")), name="set", evaluator=InformationRetrieval())
    texts = [("what is thing 0 ?", "something"), ("other", "what is thing 3 ?"), ("all about thing 4", "more")]
    train = Source(
        str(write_lines(tmp_path / "train.jsonl", [{"a": a, "b": b} for a, b in texts])),
        {"anchor": "a", "positive": "b"},
    )
    for one in (source, replace(source, prompts={"query": "query: ", "document": "passage: "})):
        facts = leak_facts(one, [train], tmp_path / "cache")
        assert (facts.num_rows, facts.num_known_rows, facts.unit) == (3, 2, "queries")
        assert (facts.num_texts, facts.num_known_texts) == (11, 3)
