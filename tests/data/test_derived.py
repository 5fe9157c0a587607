"""What a source makes of the rows it reads: against pandas, and against what the words promise."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.derived import draw, held_out, triplets
from trainer.data.evalsource import EvalSource
from trainer.data.loading import fingerprint, load
from trainer.data.module import PairData
from trainer.data.sources import Source
from trainer.encoder import EncoderSpec

NLI = {"anchor": "premise", "positive": "hypothesis", "label": "label"}


def write(path: Path, frame: pd.DataFrame) -> str:
    frame.to_json(path, orient="records", lines=True)
    return str(path)


def nli(folder: Path) -> str:
    rows = [
        ("a man eats", "someone eats", "entailment"),
        ("a dog runs", "an animal runs", "entailment"),
        ("a man eats", "nobody eats", "contradiction"),
        ("a man eats", "he is hungry", "neutral"),
        ("a man eats", "a person has a meal", "entailment"),
        ("a dog runs", "the dog sleeps", "contradiction"),
        ("a dog runs", "the dog lies still", "contradiction"),
        ("a cat sits", "an animal sits", "entailment"),
    ]
    return write(folder / "nli.jsonl", pd.DataFrame(rows, columns=["premise", "hypothesis", "label"]))


def test_triplets_of_labelled_pairs(tmp_path: Path) -> None:
    """Every positive once, with its anchor's negatives in turn; an anchor without a negative is left out."""
    rows = load(Source(nli(tmp_path), NLI, triplets=("entailment", "contradiction")), tmp_path / "cache")
    assert rows.column_names == ["anchor", "positive", "negative"]
    assert [tuple(row.values()) for row in rows] == [
        ("a man eats", "someone eats", "nobody eats"),
        ("a dog runs", "an animal runs", "the dog sleeps"),
        ("a man eats", "a person has a meal", "nobody eats"),
    ]


def test_rows_that_are_picked_from_many_batches(tmp_path: Path) -> None:
    """12,000 positives, then the negative of each, backwards: 24,000 rows, which are written by 10,000."""
    number = 12_000
    rows = [(f"a{i}", f"p{i}", "entailment") for i in range(number)]
    rows += [(f"a{i}", f"n{i}", "contradiction") for i in reversed(range(number))]
    path = write(tmp_path / "nli.jsonl", pd.DataFrame(rows, columns=["premise", "hypothesis", "label"]))
    source = Source(path, NLI, triplets=("entailment", "contradiction"), prompts={"anchor": "q: "}, max_rows=11_000)
    found = load(source, tmp_path / "cache").to_pandas()
    drawn = found["positive"].str[1:].astype(int)
    assert len(found) == 11_000
    assert drawn.is_monotonic_increasing
    assert drawn.is_unique
    assert (found["anchor"] == "q: a" + drawn.astype(str)).all()
    assert (found["negative"] == "n" + drawn.astype(str)).all()


def test_negatives_of_triplets_take_prompt_and_length_of_the_positives(tmp_path: Path) -> None:
    """Both are texts of one column of the data; a prompt of their own, an empty one too, still counts."""
    kinds, both = ("entailment", "contradiction"), {"anchor": "q: ", "positive": "p: "}
    for own, negative in (({}, "p: "), ({"negative": ""}, ""), ({"negative": "n: "}, "n: ")):
        source = Source(nli(tmp_path), NLI, triplets=kinds, prompts=both | own, max_lengths={"positive": 9})
        first = load(source, tmp_path / "cache")[0]
        wanted = {"anchor": "q: a man eats", "positive": "p: someone eats", "negative": negative + "nobody eats"}
        assert first == wanted
        assert source.max_length_of("negative") == 9


def test_triplets_of_columns_by_position(tmp_path: Path) -> None:
    """As a file without column names is read."""
    pd.read_json(nli(tmp_path), lines=True).to_csv(tmp_path / "nli.tsv", sep="\t", index=False)
    kinds = ("entailment", "contradiction")
    columns = {"anchor": 0, "positive": 1, "label": 2}
    positions = load(Source(str(tmp_path / "nli.tsv"), columns, triplets=kinds), tmp_path / "cache")
    names = load(Source(nli(tmp_path), NLI, triplets=kinds), tmp_path / "cache")
    assert positions.to_list() == names.to_list()


def test_triplets_of_class_numbers_and_class_names(tmp_path: Path) -> None:
    frame = pd.read_json(nli(tmp_path), lines=True)
    names = ["entailment", "neutral", "contradiction"]
    frame["label"] = frame["label"].map(names.index)
    numbers = Source(write(tmp_path / "numbers.jsonl", frame), NLI, triplets=(0, 2))
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=names)})
    Dataset.from_pandas(frame, features=features).save_to_disk(str(tmp_path / "named"))
    named = Source(str(tmp_path / "named"), NLI, triplets=("entailment", "contradiction"))
    words = Source(nli(tmp_path), NLI, triplets=("entailment", "contradiction"))
    expected = load(words, tmp_path / "cache").to_list()
    assert load(numbers, tmp_path / "cache").to_list() == load(named, tmp_path / "cache").to_list() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=40))
def test_triplets_against_pandas(rows: list[tuple[int, bool]]) -> None:
    anchors = pa.chunked_array([[f"premise {number}" for number, _ in rows]], type=pa.large_string())
    frame = pd.DataFrame({"anchor": [a for a, _ in rows], "positive": [p for _, p in rows]}, dtype=int)
    positives, negatives = triplets(anchors, frame["positive"].to_numpy())
    expected = []
    for _, group in frame.groupby("anchor"):
        kinds = {kind: list(part.index) for kind, part in group.groupby("positive")}
        if 0 in kinds:
            expected += [(p, kinds[0][turn % len(kinds[0])]) for turn, p in enumerate(kinds.get(1, []))]
    assert list(zip(positives, negatives, strict=True)) == sorted(expected)


def test_no_anchor_with_both_labels(tmp_path: Path) -> None:
    frame = pd.read_json(nli(tmp_path), lines=True)
    path = write(tmp_path / "few.jsonl", frame[(frame["premise"] != "a man eats") | (frame["label"] == "neutral")])
    source = Source(path, NLI, triplets=("neutral", "contradiction"))
    with pytest.raises(ValueError, match=r"no anchor has both a 'neutral' and a 'contradiction'.*3 rows"):
        load(source, tmp_path / "cache")


def test_holdout_keeps_equal_texts_on_one_side(tmp_path: Path) -> None:
    frame = pd.DataFrame({"q": [f"question {i // 3}" for i in range(3000)], "a": [f"answer {i}" for i in range(3000)]})
    spec = {"path": write(tmp_path / "qa.jsonl", frame), "columns": {"anchor": "q", "positive": "a"}, "holdout": 0.2}
    kinds = (Source(**spec), EvalSource(name="dev", **spec))
    train, held = (load(kind, tmp_path / "cache").to_pandas() for kind in kinds)
    assert not set(train["anchor"]) & set(held["anchor"])
    assert sorted([*train["positive"], *held["positive"]]) == sorted(frame["a"])
    assert 150 < held["anchor"].nunique() < 250, "a share of 0.2 of 1,000 questions"
    by_answer = Source(**spec, holdout_by="positive")
    assert 400 < 3000 - len(load(by_answer, tmp_path / "cache")) < 800
    assert len({fingerprint(s) for s in (*kinds, by_answer)}) == 3


def test_the_file_of_a_holdout_is_read_once(tmp_path: Path) -> None:
    frame = pd.DataFrame({"q": [f"question {i}" for i in range(100)], "a": ["same"] * 100})
    spec = {"path": write(tmp_path / "qa.jsonl", frame), "columns": {"anchor": "q", "positive": "a"}, "holdout": 0.5}
    load(Source(**spec), tmp_path / "cache")
    before = set((tmp_path / "cache" / "rows").iterdir())
    load(EvalSource(name="dev", **spec), tmp_path / "cache")
    assert len({p for p in (tmp_path / "cache" / "rows").iterdir() if p.is_dir()} - before) == 1


@given(st.floats(0.01, 0.99))
@settings(max_examples=20, deadline=None)
def test_a_larger_holdout_holds_the_smaller_one(share: float) -> None:
    texts = pa.chunked_array([[f"text {i}" for i in range(500)], [f"text {i}" for i in range(500, 1000)]])
    small, large = held_out(texts, share / 2), held_out(texts, share)
    assert not (small & ~large).any()
    assert abs(large.mean() - share) < 0.08  # 5 standard deviations of 1,000 draws


def test_holdout_that_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", pd.DataFrame({"q": ["one"], "a": ["two"]}))
    spec = {"path": path, "columns": {"anchor": "q", "positive": "a"}}
    kept = bool(held_out(pa.chunked_array([["one"]]), 0.5)[0])
    source = Source(**spec, holdout=0.5) if kept else EvalSource(name="dev", **spec, holdout=0.5)
    expected = "a holdout of 0.5 by 'anchor' leaves none of 1 rows to "
    expected += "train on; lower holdout" if kept else "validate on; raise holdout"
    with pytest.raises(ValueError, match=f"{expected}, for training and validation alike, or bring more rows$"):
        load(source, tmp_path / "cache")


def test_cap_draws_evenly(tmp_path: Path) -> None:
    drawn = draw(10_000, 1_000)
    assert len(np.unique(drawn)) == 1_000
    assert (np.diff(drawn) > 0).all()
    counts = np.histogram(drawn, bins=10, range=(0, 10_000))[0]
    assert counts.min() > 60, "as many from every tenth, give or take 4 standard deviations"
    assert counts.max() < 140
    frame = pd.DataFrame({"q": [str(i) for i in range(50)], "a": [str(i) for i in range(50)]})
    source = Source(write(tmp_path / "r.jsonl", frame), {"anchor": "q", "positive": "a"}, max_rows=7)
    assert [int(row["anchor"]) for row in load(source, tmp_path / "cache")] == draw(50, 7).tolist()
    assert draw(5, 9).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"lang": "en"}, [0, 2]),
        ({"lang": ["en", "he"]}, [0, 1, 2]),
        ({"lang": "!= en"}, [1, 3]),
        ({"n": ">= 2"}, [2, 3]),
        ({"n": "<2"}, [0, 1]),
        ({"n": 3}, [3]),
        ({"n": "!= 3"}, [0, 1, 2]),
        ({"good": True}, [0, 3]),
        ({"meta.kind": "x", "n": "> 0"}, [2]),
    ],
)
def test_where(tmp_path: Path, where: dict[str, object], kept: list[int]) -> None:
    rows = [
        {"a": "r0", "b": "s", "lang": "en", "n": 0, "good": True, "meta": {"kind": "x"}},
        {"a": "r1", "b": "s", "lang": "he", "n": 1, "good": False, "meta": {"kind": "y"}},
        {"a": "r2", "b": "s", "lang": "en", "n": 2, "good": False, "meta": {"kind": "x"}},
        {"a": "r3", "b": "s", "lang": "ja", "n": 3, "good": True, "meta": {"kind": "y"}},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for name in (str(path), _as_parquet(rows, tmp_path)):
        source = Source(name, {"anchor": "a", "positive": "b"}, where=where)  # type: ignore[arg-type]
        assert [int(row["anchor"][1:]) for row in load(source, tmp_path / "cache")] == kept


NONE_LEFT = [
    ({"triplets": ("entailment", "contradiction")}, "of 3 that were read: column 'label' holds '0.0', '2.0'; "
     "asked for 'entailment' or 'contradiction'"),
    ({"triplets": (0, 2)}, "of 3 that were read: column 'label' holds '0.0', '2.0'; asked for '0' or '2'"),
    ({"where": {"3": "fr"}}, "of 3 that were read: column 'lang' holds 'en', 'he'; asked for 'fr'"),
    ({"where": {"lang": "en", "ok": True}},
     "of 3 that were read: column 'ok' holds 'False', 'no'; asked for 'true'. "
     "column 'lang' holds 'he'; asked for 'en'"),
    ({"where": {"lang": "fr"}, "on_bad_row": "skip"}, "of 3 that were read: column 'lang' holds"),
    ({"where": {"label": ">= 3"}}, "of 3 that were read: column 'label' holds '0.0', '2.0'; asked for '>= 3'"),
    ({"where": {"id": "x"}}, "of 3 that were read: column 'id' holds '1', '2', '3'; asked for 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), NONE_LEFT)
def test_what_the_data_hold_where_nothing_is_left(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("a,b,label,lang,ok,id\np,h1,0.0,en,False,1\np,h2,2.0,he,True,2\nq,h3,2.0,en,no,3\n")
    source = Source(str(path), {"anchor": "a", "positive": "b", "label": 2}, **options)
    with pytest.raises(ValueError, match=re.escape(f"{path}: there is no row left {said}")):
        load(source, tmp_path / "cache")


def test_bad_rows_and_many_values_where_nothing_is_left(tmp_path: Path) -> None:
    rows = [{"a": f"r{i}", "b": "s", "lang": ["en"] * (i > 9) or None, "n": i} for i in range(20)]
    path = write(tmp_path / "r.jsonl", pd.DataFrame([*rows, {"a": "", "b": "s", "n": 99}]))
    columns = {"anchor": "a", "positive": "b"}
    with pytest.raises(ValueError, match=r"left of 21 that were read: column 'n' holds '0', '1', '2', '3', '4', ...; "):
        load(Source(path, columns, where={"n": "> 99"}), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"holds null, '\['en'\]'; asked for 'en'"):
        load(Source(path, columns, where={"lang": "en"}), tmp_path / "cache")
    bad = (
        r"left after 1 bad ones were skipped; the first: .*:21: column 'a' is empty; and of 20 others: column 'n' holds"
    )
    with pytest.raises(ValueError, match=bad):
        load(Source(path, columns, where={"n": ">= 99"}, on_bad_row="skip"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        (True, ["true", "True", True]),
        (False, ["False"]),
        (1.0, ["1", "1.0", 1, 1.0]),
        (1, ["1", 1, 1.0]),
        ("1", ["1", 1, 1.0]),
        ([0.0, "x"], ["0.0", "x"]),
    ],
)
def test_where_meets_values_and_texts_that_read_alike(wanted: Any, kept: list[object], tmp_path: Path) -> None:
    """A whole number asked for is not a text like 1.0: a column of versions holds both."""
    cells = ["true", "True", True, "False", "1", "1.0", 1, 1.0, "1.1", "0.0", "x", None]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps({"a": f"r{i}", "b": "s", "v": cell}) for i, cell in enumerate(cells)))
    rows = load(Source(str(path), {"anchor": "a", "positive": "b"}, where={"v": wanted}), tmp_path / "cache")
    assert [repr(cells[int(row["anchor"][1:])]) for row in rows] == [repr(one) for one in kept]


def test_where_meets_what_pandas_writes_into_csv(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": list("pqrs"), "b": list("wxyz"), "ok": [True, False] * 2, "n": [0, 1, None, 2]})
    frame.to_csv(tmp_path / "r.csv", index=False)
    for where, kept in (({"ok": True}, "pr"), ({"ok": False}, "qs"), ({"n": 1.0}, "q"), ({"n": [0.0, 2.0]}, "ps")):
        source = Source(str(tmp_path / "r.csv"), {"anchor": "a", "positive": "b"}, where=where)  # type: ignore[arg-type]
        assert load(source, tmp_path / "cache")["anchor"][:] == list(kept)


def _as_parquet(rows: list[dict[str, object]], folder: Path) -> str:
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_fields_inside_columns(tmp_path: Path, kind: str) -> None:
    """A column whose own name has a dot wins over a field."""
    rows = [
        {"translation": {"en": f"word {i}", "ja": f"語 {i}"}, "neg": [f"no {i}", f"never {i}"], "dot.ted": f"dot {i}"}
        for i in range(3)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = {"anchor": "translation.en", "positive": "translation.ja", "negative": "neg.1", "negative_1": "dot.ted"}
    name = str(path) if kind == "jsonl" else _as_parquet(rows, tmp_path)  # type: ignore[arg-type]
    assert load(Source(name, columns), tmp_path / "cache")[2] == {
        "anchor": "word 2", "positive": "語 2", "negative": "never 2", "negative_1": "dot 2"
    }  # fmt: skip


def test_columns_by_position(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": [7, 8], "left": ["a", "b"], "right": ["c", "d"]})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    for file in ("rows.csv", "rows.parquet"):
        source = Source(str(tmp_path / file), {"anchor": 1, "positive": 2})
        assert load(source, tmp_path / "cache").to_list() == [
            {"anchor": "a", "positive": "c"},
            {"anchor": "b", "positive": "d"},
        ]
    frame.rename(columns={"left": "2"}).to_csv(tmp_path / "named.csv", index=False)
    named = Source(str(tmp_path / "named.csv"), {"anchor": 2, "positive": "right"})
    assert load(named, tmp_path / "cache")[0] == {"anchor": "a", "positive": "c"}, "a name goes before a position"
    with pytest.raises(ValueError, match=r"no column 5 \(columns.positive\); there are 3, 0 to 2: id, left, right"):
        load(Source(str(tmp_path / "rows.csv"), {"anchor": 1, "positive": 5}), tmp_path / "cache")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_position_that_means_another_column_in_a_later_file_is_refused(
    kind: str, streaming: bool, tiny_encoder: Path, tmp_path: Path
) -> None:
    """Else questions and answers would change places from there on."""
    frame = pd.DataFrame({"question": ["a", "b"], "answer": ["c", "d"]})
    files = [tmp_path / f"{number}.{kind}" for number in range(3)]

    def write(frame: pd.DataFrame, path: Path) -> None:
        if kind == "parquet":
            frame.to_parquet(path)
        else:
            text = frame.to_csv(index=False) if kind == "csv" else frame.to_json(orient="records", lines=True)
            path.write_text(text)

    def set_up(columns: dict[str, int | str]) -> None:
        source = Source(str(tmp_path / f"*.{kind}"), columns, streaming=streaming)
        data = PairData([source], EncoderSpec(str(tiny_encoder)), batch_size=2, cache_dir=str(tmp_path / "cache"))
        data.trainer = SimpleNamespace(global_step=0, max_steps=2, limit_train_batches=1.0)  # type: ignore[assignment]
        data.setup("fit")

    write(frame, files[0])
    write(frame.set_axis(["query", "reply"], axis=1), files[1])  # what positions are for
    set_up({"anchor": 0, "positive": 1})
    write(frame[["answer", "question"]], files[2])
    message = (
        f"{files[2]}: column 0 (columns.anchor) is 'answer', in {files[0]} 'question': its columns are answer, "
        "question, there question, answer; name them (columns.anchor: question) in place of positions"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        set_up({"anchor": 0, "positive": 1})
    files[1].unlink()
    set_up({"anchor": "question", "positive": "answer"})


def test_names_and_positions_side_by_side(tmp_path: Path) -> None:
    """In a file of YAML a key is text: there a position is quoted."""
    frame = pd.DataFrame(
        {
            "premise": ["p", "p", "q", "q"],
            "hypothesis": ["a", "b", "c", "d"],
            "label": [0, 2, 0, 2],
            "lang": ["en", "en", "he", "he"],
        }
    )
    frame.to_csv(tmp_path / "nli.csv", index=False)
    frame.to_parquet(tmp_path / "nli.parquet")
    triplet = {"anchor": "p", "positive": "a", "negative": "b"}
    for file in ("nli.csv", "nli.parquet"):
        path = str(tmp_path / file)
        for lang in ("lang", 3, "3"):
            columns = {"anchor": 0, "positive": 1, "label": 2}
            source = Source(path, columns, where={lang: "en"}, triplets=(0, 2))  # type: ignore[arg-type]
            assert load(source, tmp_path / "cache").to_list() == [triplet]
        quoted = Source(path, {"anchor": "0", "positive": "hypothesis"}, where={"3": "he"})
        assert load(quoted, tmp_path / "cache")["positive"][:] == ["c", "d"]
        with pytest.raises(ValueError, match=r"no column 4 \(where\); there are 4, 0 to 3: premise, hypothesis"):
            load(Source(path, {"anchor": "0", "positive": "1"}, where={"4": "he"}), tmp_path / "cache")
    frame.rename(columns={"lang": "0"}).to_parquet(tmp_path / "named.parquet")
    named = Source(str(tmp_path / "named.parquet"), {"anchor": "premise", "positive": "hypothesis"}, where={"0": "he"})
    assert load(named, tmp_path / "cache")["positive"][:] == ["c", "d"], "a name goes before a position"


@pytest.mark.parametrize("where", [{10: "k", 2: ["c"]}, {"k": "k", "b": "b"}, {"b": "b", 10: "k", 2: "c"}])
def test_the_order_of_where_is_none_of_the_key(where: dict[Any, Any], tmp_path: Path) -> None:
    """Rows that are there are found, however it is written."""
    path = tmp_path / "r.csv"
    path.write_text("a,b,c,d,e,f,g,h,i,j,k\nx,b,c,d,e,f,g,h,i,j,k\n")
    orders = where, dict(reversed(where.items()))
    sources = [Source(str(path), {"anchor": "a", "positive": "b"}, where=order) for order in orders]
    rows = [load(source, tmp_path / "cache").to_list() for source in sources]
    assert rows == [[{"anchor": "x", "positive": "b"}]] * 2
    assert len(list((tmp_path / "cache").rglob("rows.arrow"))) == 1


def test_a_field_that_some_rows_lack_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"t": {"en": "a", "ja": "b"}}\n{"t": {"en": "a"}}\n{"t": null}\n')
    source = Source(str(path), {"anchor": "t.en", "positive": "t.ja"})
    with pytest.raises(ValueError, match=r"(?s)rows.jsonl:2: column 't.ja' is missing.*rows.jsonl:3: column 't.en' is"):
        load(source, tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"triplets": ("a", "b")}, "triplets need columns anchor, positive and label, without label_map"),
        ({"holdout": 1.5}, "holdout is 1.5; it is a share of the rows, 0 to below 1"),
        ({"holdout_by": "text"}, "holdout_by names 'text', which is no text column; there are anchor, positive"),
        ({"holdout_by": "anchor"}, "holdout_by is set, but holdout is 0, so no row is left out: set holdout, or leave"),
        ({"prompts": {"query": "q: "}}, "prompts names 'query', which is no text column"),
        ({"max_rows": 0}, "max_rows is 0; it must be 1 or more"),
        ({"where": {"score": ">= high"}}, "compares with 'high', which is no number"),
        ({"where": {"score": ">="}}, "compares with nothing"),
    ],
)
def test_refusals(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Source("rows.jsonl", {"anchor": "a", "positive": "b"}, **options)  # type: ignore[arg-type]


def test_triplets_of_one_label_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="names 'x' as positive and as negative"):
        Source("rows.jsonl", NLI, triplets=("x", "x"))


def test_column_of_where_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", pd.DataFrame({"a": ["x"], "b": ["y"], "lang": ["en"]}))
    with pytest.raises(ValueError, match=r"no column 'language' \(where\); found: a, b, lang. Did you mean 'lang'"):
        load(Source(path, {"anchor": "a", "positive": "b"}, where={"language": "en"}), tmp_path / "cache")


def test_prompts_stand_before_the_texts_of_their_column(tmp_path: Path) -> None:
    """The part that is held out does not depend on them."""
    frame = pd.DataFrame({"q": [f"question {i}" for i in range(40)], "a": [f"answer {i}" for i in range(40)]})
    spec = {"path": write(tmp_path / "qa.jsonl", frame), "columns": {"anchor": "q", "positive": "a"}, "holdout": 0.5}
    plain, prompted = (
        load(Source(**spec, prompts=prompts), tmp_path / "cache").to_list() for prompts in (None, {"anchor": "query: "})
    )
    assert prompted == [{"anchor": "query: " + row["anchor"], "positive": row["positive"]} for row in plain]


@pytest.mark.parametrize(
    "options", [{"where": {"a": "x"}}, {"triplets": ("x", "y")}, {"holdout": 0.1}, {"max_rows": 5}]
)
def test_what_a_stream_can_not_do(options: dict[str, object]) -> None:
    columns = NLI if "triplets" in options else {"anchor": "a", "positive": "b"}
    with pytest.raises(
        ValueError, match=f"{next(iter(options))} does not go with streaming: true, for rows are numbered"
    ):
        Source("rows.parquet", columns, streaming=True, **options)  # type: ignore[arg-type]
