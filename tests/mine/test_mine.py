"""`trainer mine` against sentence-transformers' mine_hard_negatives and against brute force."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from tests.two_ranks import TwoRanks
from trainer.cli import main
from trainer.data.loading import load
from trainer.data.sources import Source
from trainer.encoder import EncoderSpec
from trainer.encoder.towers import load_encoder
from trainer.mine import search as searching
from trainer.mine.pairs import Pairs, number_pairs
from trainer.mine.search import Vectors, read_chunks, search
from trainer.mine.select import Rules
from trainer.predict.shards import Shards, start_shards

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_texts: list[str]) -> Path:
    """Pairs of which some share their anchor, one comes twice, and a corpus that repeats itself and some positives."""
    path = tmp_path_factory.mktemp("mining")
    texts = list(dict.fromkeys(demo_texts))
    # Random weights know words alone: a positive that repeats them is more similar than other texts.
    pairs = [{"q": f"what of {texts[i]}", "a": f"{texts[i]} indeed"} for i in range(80)]
    pairs += [{"q": pairs[i]["q"], "a": texts[i + 200]} for i in range(0, 30, 3)]
    pairs += [pairs[5], {"q": pairs[0]["q"], "a": texts[299]}]
    write(path / "pairs.jsonl", pairs)
    write(path / "corpus.jsonl", [{"body": text} for text in [*texts[290:350], *texts[200:210], texts[290]]])
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    lines = (gzip.decompress(content) if path.suffix == ".gz" else content).decode().splitlines()
    return [json.loads(line) for line in lines]


def run(folder: Path, out: Path, *flags: str) -> int:
    columns = ["--data", str(folder / "pairs.jsonl"), "--anchor", "q", "--positive", "a"]
    return main(["mine", *columns, "--out", str(out), "--accelerator", "cpu", *flags])


@pytest.mark.parametrize(
    ("options", "with_corpus"),
    [
        ({"num_negatives": 3, "output_format": "triplet"}, False),
        ({"num_negatives": 4, "range_min": 2, "relative_margin": 0.01, "output_format": "triplet"}, True),
        ({"num_negatives": 2, "absolute_margin": 0.01, "max_score": 0.98, "min_score": 0.3, "range_max": 12}, False),
        ({"num_negatives": 5, "range_min": 1, "range_max": 30}, True),
    ],
)
def test_negatives_are_those_of_sentence_transformers(
    options: dict[str, Any], with_corpus: bool, folder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    options = {"output_format": "n-tuple", **options}
    names = {"absolute_margin": "margin"}
    flags = [x for key, value in options.items() for x in ("--" + names.get(key, key).replace("_", "-"), str(value))]
    flags += ["--corpus", str(folder / "corpus.jsonl"), "--text", "body"] if with_corpus else []
    assert run(folder, tmp_path / "out.jsonl.gz", "--model", str(tiny_encoder), "--output-scores", *flags) == 0
    ours = read(tmp_path / "out.jsonl.gz")

    pairs = read(folder / "pairs.jsonl")
    expected = mine_hard_negatives(
        Dataset.from_dict(
            {key: [row[column] for row in pairs] for key, column in (("anchor", "q"), ("positive", "a"))}
        ),
        SentenceTransformer(str(tiny_encoder), device="cpu"),
        corpus=[row["body"] for row in read(folder / "corpus.jsonl")] if with_corpus else None,
        output_scores=True,
        verbose=False,
        **options,
    )
    assert len(ours) == len(expected) > 20
    for row, peer in zip(ours, expected.to_list(), strict=True):
        np.testing.assert_allclose(row.pop("scores"), peer.pop("scores"), atol=1e-5)
        assert row == peer


def test_every_format_is_a_training_source(
    folder: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns: dict[str, dict[str, int | str]] = {
        "triplet": {"negative": "negative"},
        "n-tuple": {"negative_1": "negative_1", "negative_2": "negative_2"},
        "list": {"negative_1": "negatives.0", "negative_2": "negatives.1"},
    }
    rows = {}
    for kind, negatives in columns.items():
        out = tmp_path / f"{kind}.jsonl.gz"
        flags = ["--model", str(tiny_encoder), "--num-negatives", "2", "--output-format", kind]
        assert run(folder, out, *flags) == 0
        source = Source(str(out), {"anchor": "anchor", "positive": "positive", **negatives})
        rows[kind] = load(source, tmp_path / "cache").to_list()
        assert not out.with_name(out.name + ".work").exists()
    assert rows["list"] == rows["n-tuple"]
    assert rows["triplet"] == [
        {"anchor": row["anchor"], "positive": row["positive"], "negative": row[name]}
        for row in rows["n-tuple"]
        for name in ("negative_1", "negative_2")
    ]
    said = capsys.readouterr().out
    assert "anchors by their negatives: 80 with 2\n" in said
    assert "list.jsonl.gz: 91 rows; 80 of 80 anchors have negatives, out of 91 documents\n" in said
    assert (
        "similarity      positive    negative  difference\ncount                 91         182         182\n" in said
    )


# -- brute force on random vectors ------------------------------------------------------------------------


def random_task(folder: Path, num_pairs: int, num_corpus: int) -> tuple[Pairs, Vectors, dict[str, Any]]:
    """Texts that repeat in every way there is, and a random vector for each distinct one."""
    rng = random.Random(5)
    anchors = [f"t{rng.randrange(num_pairs)}" for _ in range(num_pairs)]
    positives = [f"t{rng.randrange(2 * num_pairs)}" for _ in range(num_pairs)]
    corpus = [f"t{rng.randrange(3 * num_corpus)}" for _ in range(num_corpus)]
    vector = np.random.default_rng(0).normal(size=(3 * num_corpus + 2 * num_pairs, 16)).astype(np.float32)

    def save(name: str, texts: list[str]) -> Shards:
        shards = Shards(folder / name, "parquet" if name == "corpus" else "npy", len(texts), 300, 16, "float32", False)
        if not shards.folder.exists():
            start_shards(shards, {})
            for number in range(shards.num_shards):
                rows = [int(text[1:]) for text in texts[shards.rows_of(number)]]
                shards.write(number, vector[rows], None)
        return shards

    vectors = Vectors(save("anchors", anchors), save("positives", positives), save("corpus", corpus))
    columns = [pa.chunked_array([pa.array(texts, pa.large_string())]) for texts in (anchors, positives, corpus)]
    texts = {"anchors": anchors, "positives": positives, "corpus": corpus, "vector": vector}
    return number_pairs(*columns), vectors, texts


def brute_force(texts: dict[str, Any], rules: Rules) -> dict[str, list[str]]:
    """Negatives by the whole matrix of similarities, sorted, in terms of texts alone."""
    unit = texts["vector"] / np.linalg.norm(texts["vector"], axis=1, keepdims=True)
    documents = list(dict.fromkeys([*texts["corpus"], *texts["positives"]]))
    document_rows = [int(text[1:]) for text in documents]
    positives: dict[str, set[str]] = {}
    for anchor, positive in zip(texts["anchors"], texts["positives"], strict=True):
        positives.setdefault(anchor, set()).add(positive)
    negatives = {}
    for anchor, own in positives.items():
        scores = unit[document_rows] @ unit[int(anchor[1:])]
        lowest = min(float(unit[int(text[1:])] @ unit[int(anchor[1:])]) for text in own)
        limit = np.inf if rules.margin is None else lowest - rules.margin
        order = np.argsort(-scores, kind="stable")
        kept = [documents[i] for i in order if documents[i] not in own | {anchor} and scores[i] <= limit]
        negatives[anchor] = kept[rules.range_min :][: rules.num_negatives]
    return negatives


def mined(pairs: Pairs, texts: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    """Anchor -> negatives, as texts."""
    places = [*texts["corpus"], *texts["positives"]]
    found = {}
    for chunk in read_chunks(pairs, folder):
        numbers = range(chunk.anchors.start, chunk.anchors.stop)
        for anchor, scores, ids in zip(numbers, chunk.negatives.scores_Qn, chunk.negatives.ids_Qn, strict=True):
            kept = ids[np.isfinite(scores)]
            found[texts["anchors"][pairs.rows_Q[anchor]]] = [places[i] for i in pairs.places_M[kept]]
    return found


@pytest.mark.parametrize("rules", [Rules(4, range_min=3), Rules(3, margin=0.3, range_max=5000)])
def test_equal_to_brute_force(rules: Rules, tmp_path: Path) -> None:
    """Anchors that are documents, positives that several anchors share, texts that come several times."""
    pairs, vectors, texts = random_task(tmp_path, 400, 600)
    search(pairs, vectors, rules, tmp_path / "parts", CPU)
    expected = brute_force(texts, rules)
    assert mined(pairs, texts, tmp_path / "parts") == expected
    assert (pairs.own_Q >= 0).any()
    assert pairs.most_positives > 2
    if rules.margin:
        assert {0, 3} <= {len(found) for found in expected.values()}


def drawn(seed: int, folder: Path) -> NDArray[np.int64]:
    pairs, vectors, _ = random_task(folder, 400, 600)
    search(pairs, vectors, Rules(3, range_max=20, sampling="random", seed=seed), folder / f"random-{seed}", CPU)
    return np.concatenate([chunk.negatives.ids_Qn for chunk in read_chunks(pairs, folder / f"random-{seed}")])


def test_a_draw_is_a_function_of_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunks; out of all candidates of the window, none oftener than others."""
    whole = drawn(1, tmp_path)
    assert (whole != drawn(2, tmp_path)).any()
    for path in (tmp_path / "random-1").iterdir():
        path.unlink()
    monkeypatch.setattr(searching, "CHUNK_ANCHORS", 37)
    assert (drawn(1, tmp_path) == whole).all()
    pairs, vectors, _ = random_task(tmp_path, 400, 600)
    search(pairs, vectors, Rules(20, range_max=20), tmp_path / "window", CPU)
    window = np.concatenate([chunk.negatives.ids_Qn for chunk in read_chunks(pairs, tmp_path / "window")])
    ranks = np.concatenate([np.flatnonzero(np.isin(row, ids)) for row, ids in zip(window, whole, strict=True)])
    assert len(ranks) == whole.size
    counts = np.bincount(ranks, minlength=20)
    expected = whole.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50, "chi-squared of 19 degrees: 43.8 is one in a thousand"


def search_here(folder: str) -> None:
    pairs, vectors, _ = random_task(Path(folder), 400, 600)
    searching.CHUNK_ANCHORS = 50
    search(pairs, vectors, Rules(4), Path(folder) / "two", CPU)


def test_two_ranks_find_what_one_finds(two_ranks: TwoRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, vectors, texts = random_task(tmp_path, 400, 600)
    two_ranks(search_here, str(tmp_path))
    monkeypatch.setattr(searching, "CHUNK_ANCHORS", 50)
    search(pairs, vectors, Rules(4), tmp_path / "one", CPU)
    assert len(list((tmp_path / "two").iterdir())) == searching.num_chunks(pairs) > 4
    assert mined(pairs, texts, tmp_path / "two") == mined(pairs, texts, tmp_path / "one")


# -- going on, and refusals -------------------------------------------------------------------------------


def test_a_second_start_goes_on_where_the_first_was_stopped(
    folder: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "CHUNK_ANCHORS", 20)
    flags = ["--model", str(tiny_encoder)]
    assert run(folder, tmp_path / "straight.jsonl.gz", *flags) == 0
    out = tmp_path / "out.jsonl.gz"
    whole = searching._write

    def disk_full(path: Path, chunk: searching.Chunk) -> None:
        if path.name == "negatives-00002.npz":
            raise ValueError("no room")
        whole(path, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(searching, "_write", disk_full)
        assert run(folder, out, *flags) == 1
    assert not out.exists()
    work = tmp_path / "out.jsonl.gz.work"
    there = {path: path.stat().st_mtime_ns for path in work.rglob("*.np[yz]")}
    assert {path.name for path in there} == {"shard-00000.npy", "negatives-00000.npz", "negatives-00001.npz"}

    written: list[Path] = []
    monkeypatch.setattr(searching, "_write", lambda path, chunk: (written.append(path), whole(path, chunk)))
    assert run(folder, out, *flags) == 0
    assert [path.name for path in written] == ["negatives-00002.npz", "negatives-00003.npz"]
    assert out.read_bytes() == (tmp_path / "straight.jsonl.gz").read_bytes()
    assert not work.exists()


def test_embeddings_that_predict_wrote_need_no_model(
    folder: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for column in ("q", "a"):
        where = ["--data", str(folder / "pairs.jsonl"), "--text", column, "--out", str(tmp_path / column)]
        assert main(["predict", "--model", str(tiny_encoder), "--accelerator", "cpu", *where]) == 0
    given = ["--anchor-embeddings", str(tmp_path / "q"), "--positive-embeddings", str(tmp_path / "a")]
    assert run(folder, tmp_path / "given.jsonl", *given) == 0
    assert run(folder, tmp_path / "made.jsonl", "--model", str(tiny_encoder)) == 0
    assert (tmp_path / "given.jsonl").read_text() == (tmp_path / "made.jsonl").read_text()

    given[3] = str(tmp_path / "q")
    assert run(folder, tmp_path / "wrong.jsonl", *given) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'q'} holds 92 embeddings of other texts than column 'a' of {folder / 'pairs.jsonl'}" in error
    (tmp_path / "a" / "shard-00000.parquet").unlink()
    given[3] = str(tmp_path / "a")
    assert run(folder, tmp_path / "missing.jsonl", *given) == 1
    assert "1 of 1 shards are missing, the first is shard-00000.parquet" in capsys.readouterr().err


def test_rows_that_are_bad_in_the_other_column(
    folder: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The remedy that is named is one: with --model the rows are found that embeddings of single columns lack."""
    rows: list[dict[str, Any]] = [*read(folder / "pairs.jsonl")[:40]]
    rows[3] = {"q": rows[3]["q"], "a": None}
    write(tmp_path / "pairs.jsonl", rows)
    skip = ["--on-bad-row", "skip"]
    for column in ("q", "a"):
        where = ["--data", str(tmp_path / "pairs.jsonl"), "--text", column, "--out", str(tmp_path / column)]
        assert main(["predict", "--model", str(tiny_encoder), "--accelerator", "cpu", *where, *skip]) == 0
    given = ["--anchor-embeddings", str(tmp_path / "q"), "--positive-embeddings", str(tmp_path / "a"), *skip]
    capsys.readouterr()
    assert run(tmp_path, tmp_path / "given.jsonl", *given) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'q'} holds 40 embeddings of column 'q' of {tmp_path / 'pairs.jsonl'}, but mining" in error
    assert "takes 39 rows" in error
    assert "mine with --model" in error
    assert run(tmp_path, tmp_path / "made.jsonl", "--model", str(tiny_encoder), *skip) == 0


def test_a_model_that_compares_by_a_distance_is_said(
    folder: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = SentenceTransformer(str(tiny_encoder), device="cpu", similarity_fn_name="manhattan")
    peer.save_pretrained(str(tmp_path / "model"))
    assert run(folder, tmp_path / "mined.jsonl", "--model", str(tmp_path / "model")) == 0
    assert "compares by manhattan distance (similarity_fn_name of config_sent" in capsys.readouterr().out
    assert run(folder, tmp_path / "plain.jsonl", "--model", str(tiny_encoder)) == 0
    assert "distance" not in capsys.readouterr().out
    assert read(tmp_path / "mined.jsonl") == read(tmp_path / "plain.jsonl")


def test_short_queries_and_long_documents_are_of_one_model(
    folder: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = SentenceTransformer(str(tiny_encoder), device="cpu")
    texts = list(dict.fromkeys(row["a"] for row in read(folder / "pairs.jsonl")))
    documents = dict(zip(texts, peer.encode(texts, normalize_embeddings=True), strict=True))
    peer.max_seq_length = 6
    for column, flags in (("q", ["--max-length", "6"]), ("a", [])):
        where = ["--data", str(folder / "pairs.jsonl"), "--text", column, "--out", str(tmp_path / column)]
        assert main(["predict", "--model", str(tiny_encoder), "--accelerator", "cpu", *where, *flags]) == 0
    given = ["--anchor-embeddings", str(tmp_path / "q"), "--positive-embeddings", str(tmp_path / "a")]
    assert run(folder, tmp_path / "given.jsonl", *given, "--output-scores") == 0
    for row in read(tmp_path / "given.jsonl")[::10]:
        query = peer.encode([row["anchor"]], normalize_embeddings=True)[0]
        found = [float(query @ documents[text]) for text in (row["positive"], *row["negatives"])]
        np.testing.assert_allclose(row["scores"], found, atol=1e-5)

    capsys.readouterr()
    where = ["--data", str(folder / "pairs.jsonl"), "--text", "q", "--out", str(tmp_path / "q"), "--max-length", "7"]
    assert main(["predict", "--model", str(tiny_encoder), "--accelerator", "cpu", *where]) == 1
    assert "holds the embeddings of another run: max_length was 6, now 7;" in capsys.readouterr().err


def test_anchors_and_documents_by_their_towers(
    folder: Path, tiny_encoders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two encoders of a Router are one model, whoever embedded; none may take the other's place."""
    specs = [EncoderSpec(str(tiny_encoders[kind])) for kind in ("bert", "mpnet")]
    with load_encoder(specs[0], specs[1], 1000).as_sentence_transformer() as saved:
        saved.save_pretrained(str(tmp_path / "towers"))
    assert run(folder, tmp_path / "made.jsonl", "--model", str(tmp_path / "towers"), "--output-scores") == 0
    peer = SentenceTransformer(str(tmp_path / "towers"), device="cpu")
    texts = list(dict.fromkeys(row["a"] for row in read(folder / "pairs.jsonl")))
    documents = dict(zip(texts, peer.encode_document(texts, normalize_embeddings=True), strict=True))
    for row in read(tmp_path / "made.jsonl")[::10]:
        query = peer.encode_query([row["anchor"]], normalize_embeddings=True)[0]
        found = [float(query @ documents[text]) for text in (row["positive"], *row["negatives"])]
        np.testing.assert_allclose(row["scores"], found, atol=1e-5)

    for column, task in (("q", "query"), ("a", "document")):
        where = ["--data", str(folder / "pairs.jsonl"), "--text", column, "--out", str(tmp_path / column)]
        flags = ["--model", str(tmp_path / "towers"), "--task", task, "--accelerator", "cpu"]
        assert main(["predict", *flags, *where]) == 0
    given = ["--anchor-embeddings", str(tmp_path / "q"), "--positive-embeddings", str(tmp_path / "a")]
    assert run(folder, tmp_path / "given.jsonl", *given, "--output-scores") == 0
    assert (tmp_path / "given.jsonl").read_text() == (tmp_path / "made.jsonl").read_text()
    manifest = tmp_path / "a" / "_manifest.json"
    manifest.write_text(manifest.read_text().replace('"document"', '"query"'))
    assert run(folder, tmp_path / "wrong.jsonl", *given) == 1
    said = capsys.readouterr().err
    assert (
        f"{tmp_path / 'a'} holds embeddings of the query encoder, but this column takes that of document: trainer"
        in said
    )


def test_rules_that_leave_nothing_are_an_error(
    folder: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embeddings stay for the next try, and what was mined before."""
    (tmp_path / "out.jsonl").write_text("before")
    assert run(folder, tmp_path / "out.jsonl", "--model", str(tiny_encoder), "--max-score", "-0.9") == 1
    said = capsys.readouterr()
    assert "no anchor has got enough negatives" in said.err
    assert "--max-score removed " in said.out
    assert (tmp_path / "out.jsonl").read_text() == "before"
    work = tmp_path / "out.jsonl.work"
    assert (work / "anchor" / "shard-00000.npy").exists()

    write(tmp_path / "pairs.jsonl", read(folder / "pairs.jsonl")[:40])
    assert run(tmp_path, tmp_path / "out.jsonl", "--model", str(tiny_encoder)) == 1
    error = capsys.readouterr().err
    assert f"{work / 'anchor'} holds the embeddings of another run: data was " in error
    assert error.endswith(f"; remove {work}, or give another --out\n")
    assert run(tmp_path, tmp_path / "other.jsonl", "--model", str(tiny_encoder)) == 0


def test_too_few_documents_are_not_the_rules_fault(
    tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"q": "what is one", "a": "one"}, {"q": "what is two", "a": "two"}]
    write(tmp_path / "pairs.jsonl", rows)
    assert run(tmp_path, tmp_path / "out.jsonl", "--model", str(tiny_encoder)) == 0
    assert "--num-negatives 3: give more documents: --corpus FILE --text COLUMN\n" in capsys.readouterr().out
    write(tmp_path / "pairs.jsonl", rows[:1])
    assert run(tmp_path, tmp_path / "none.jsonl", "--model", str(tiny_encoder)) == 1
    assert "none.jsonl is not written; give more documents: --corpus FILE --text COLUMN\n" in capsys.readouterr().err
    assert run(tmp_path, tmp_path / "none.jsonl", "--model", str(tiny_encoder), "--margin", "0.1") == 1
    assert "none.jsonl is not written; raise --range-max, or loosen margins and scores\n" in capsys.readouterr().err


def test_damaged_rows_of_the_cache_are_read_again(
    folder: Path, tiny_encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A letter of the pairs and one of the corpus is another."""
    flags = ["--model", str(tiny_encoder), "--cache-dir", str(tmp_path / "cache")]
    flags += ["--corpus", str(folder / "corpus.jsonl"), "--text", "body"]
    assert run(folder, tmp_path / "whole.jsonl", *flags) == 0
    for path in (tmp_path / "cache").glob("rows/*/rows.arrow"):
        content = path.read_bytes()
        text = read(folder / "corpus.jsonl")[60]["body"].encode()  # a positive too
        path.write_bytes(content.replace(text, text[:-1] + b"!", 1))
    assert run(folder, tmp_path / "again.jsonl", *flags) == 0
    assert caplog.text.count("rows.arrow is damaged (its sha256 is another); it is made again") == 2
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ([], 2, "trainer mine also needs --model, or --anchor-embeddings; see trainer mine --help"),
        (["--model", "m", "--min-score", "0.9", "--max-score", "0.1"], 2, "--min-score is 0.9, above --max-score, 0.1"),
        (["--model", "m", "--corpus", "c.jsonl"], 2, "--corpus and --text go together: a file, and the column"),
        (["--model", "m", "--out", "mined.csv"], 2, "--out is mined.csv; its name must end in .jsonl or .jsonl.gz"),
        (["--model", "m", "--num-negative", "3"], 2, "is no flag of trainer mine. Did you mean '--num-negatives'?"),
        (["--model", "m", "--margin", "nan"], 2, "--margin: is 'nan'; it must be a number"),
        (["--model", "m", "--positive", "aa"], 1, "no column 'aa' (columns.positive); found: q, a."),
        (["--model", "m"], 1, "--model 'm' is neither a model folder nor a reachable hub id"),
        (["--model", "TINY", "--out", f"{__file__}/x.jsonl"], 1, "x.jsonl.work: Not a directory; name another place"),
        (["--model", "TINY", "--range-min", "9", "--range-max", "10"], 2, "ranks 9 to 10 hold 1 candidates; raise"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(
    flags: list[str],
    code: int,
    said: str,
    folder: Path,
    tiny_encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [str(tiny_encoder) if flag == "TINY" else flag for flag in flags]
    assert run(folder, tmp_path / "out.jsonl", *flags) == code
    error = capsys.readouterr().err
    assert said in error, error
    assert error.count("\n") <= 2
    assert not list(tmp_path.iterdir()), "the output, or a work folder"
