"""Facts of a source and of a validation set beside it, against plain Python over the same rows."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pandas as pd
import pytest
import torch

from trainer.data import facts as facts_module
from trainer.data.evalsource import EvalSource
from trainer.data.facts import SourceFacts, source_facts
from trainer.data.leaks import LeakFacts, leak_facts
from trainer.data.sources import Source
from trainer.data.streaming import StreamedTable
from trainer.data.table import TokenTable
from trainer.data.tokens import tokenize
from trainer.encoder import EncoderSpec
from trainer.encoder.folder import normalizes
from trainer.encoder.size import backbone_size
from trainer.encoder.text import TextPreparation, load_text_preparation
from trainer.evaluation import Reranking

COLUMNS = {"anchor": "a", "positive": "b", "score": "s", "label": "k"}
WORDS = ["the", "cat", "bought", "a", "ring", "in", "garden", "고양이", "漢字", "שלום"]


@pytest.fixture(scope="module")
def text(tiny_encoder: Path) -> TextPreparation:
    return load_text_preparation(EncoderSpec(str(tiny_encoder), max_length=12))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    """Few words and few scores, so that texts, pairs and whole rows repeat."""
    rng = random.Random(3)

    def phrase() -> str:
        return " ".join(rng.choices(WORDS, k=rng.choice([1, 1, 2, 9])))

    return [{"a": phrase(), "b": phrase(), "s": rng.choice([0.0, 0.5]), "k": rng.randrange(3)} for _ in range(180)]


def write(path: Path, rows: list[dict[str, object]]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path), COLUMNS)


@pytest.fixture(scope="module")
def counted(
    rows: list[dict[str, object]], text: TextPreparation, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SourceFacts, TokenTable, Source, Path]:
    folder = tmp_path_factory.mktemp("facts")
    source = write(folder / "train.jsonl", rows)
    table = tokenize(source, text, folder)
    return source_facts(source, table, text, folder), table, source, folder


def test_rows_and_targets(counted: tuple[SourceFacts, TokenTable, Source, Path], rows) -> None:
    facts = counted[0]
    assert (facts.num_rows, facts.num_looked_at, facts.num_skipped) == (180, 180, 0)
    assert facts.num_duplicates == 180 - len({json.dumps(row) for row in rows}) > 0
    clashes = sum(one["a"] == other["a"] or one["b"] == other["b"] for one, other in permutations(rows, 2))
    assert facts.clash_share == pytest.approx(clashes / (180 * 179))
    assert facts.scores is not None
    assert facts.scores.counts == {f"{v:g}": n for v, n in Counter(row["s"] for row in rows).items()}
    assert (facts.scores.min, facts.scores.max, facts.scores.num_distinct) == (0.0, 0.5, 2)
    assert facts.labels is not None
    sizes = Counter(row["k"] for row in rows)
    assert facts.labels.counts == {str(k): n for k, n in sizes.items()}
    assert (facts.labels.smallest, facts.labels.largest) == (min(sizes.values()), max(sizes.values()))


@pytest.mark.parametrize("given", ["scores", "margins", "one margin"])
def test_margins_of_a_teacher(given: str, text: TextPreparation, tmp_path: Path) -> None:
    rng = random.Random(4)
    negatives = ["n"] if given == "one margin" else ["n", "m"]
    rows = [
        {
            "a": f"cat {i}",
            "b": f"ring {i}",
            "n": f"garden {i}",
            "m": f"the {i}",
            "t": [rng.uniform(-9, 9) for _ in "123"],
        }
        for i in range(50)
    ]
    columns = {"anchor": "a", "positive": "b", **{f"negative_{i + 1}": name for i, name in enumerate(negatives)}}
    if given == "one margin":
        columns["score"] = "t.0"
        expected = [row["t"][0] for row in rows]
    else:
        columns |= {f"score_{i + 1}": f"t.{i}" for i in range(3 if given == "scores" else 2)}
        expected = [
            margin
            for s, t, u in (row["t"] for row in rows)
            for margin in ([s - t, s - u] if given == "scores" else [s, t])
        ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for max_rows in (None, 1):
        source = Source(str(path), columns)
        found.append(source_facts(source, tokenize(source, text, tmp_path), text, tmp_path, max_rows).margins)
    assert found[0] is not None
    assert found[1] is not None
    assert (found[0].min, found[0].max) == pytest.approx((min(expected), max(expected)), abs=1e-5)
    assert (found[0].is_constant, found[1].is_constant) == (False, True)
    again = source_facts(source, tokenize(source, text, tmp_path), text, tmp_path)
    assert again.margins == found[0]


def test_rows_that_differ_in_the_scores_of_a_teacher_are_no_duplicates(text: TextPreparation, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"a": "cat", "b": "ring", "n": "garden", "t": [score, 0.5]} for score in (1.0, 2.0, 2.0)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"anchor": "a", "positive": "b", "negative_1": "n", "score_1": "t.0", "score_2": "t.1"}
    source = Source(str(path), columns)
    assert source_facts(source, tokenize(source, text, tmp_path), text, tmp_path).num_duplicates == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_other_groups_that_say_the_same_are_duplicates(
    streaming: bool, text: TextPreparation, tmp_path: Path
) -> None:
    rows = [("cat", "ring", 1), ("cat", "ring", 2), ("cat", "garden", 1)]
    pd.DataFrame(rows, columns=["a", "b", "g"]).to_parquet(tmp_path / "x.parquet")
    columns = {"anchor": "a", "positive": "b", "group": "g"}
    source = Source(str(tmp_path / "x.parquet"), columns, streaming=streaming)
    table = StreamedTable(source, text, tmp_path) if streaming else tokenize(source, text, tmp_path)
    assert source_facts(source, table, text, tmp_path).num_duplicates == 1


def test_negatives_that_are_right_are_counted_once_a_row(text: TextPreparation, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"a": "cat", "b": "ring", "n": ["ring", "garden"]},
        {"a": "cat", "b": "ring", "n": ["garden", "cat"]},
        {"a": "cat", "b": "ring", "n": ["cat", "ring"]},
        {"a": "cat", "b": "ring", "n": ["garden"]},
        {"a": "cat", "b": "ring", "n": ["Ring", "garden"]},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(str(path), {"anchor": "a", "positive": "b", "negatives": "n"})
    assert source_facts(source, tokenize(source, text, tmp_path), text, tmp_path).num_right_negatives == 3


def test_they_are_counted_once(
    counted: tuple[SourceFacts, TokenTable, Source, Path], text: TextPreparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, table, source, folder = counted
    monkeypatch.setattr(facts_module, "_count", None)
    assert source_facts(source, table, text, folder) == facts


def test_a_damaged_file_is_counted_again(
    counted: tuple[SourceFacts, TokenTable, Source, Path], text: TextPreparation
) -> None:
    facts, table, source, folder = counted
    files = [file for file in folder.glob("facts/*/facts.json")]
    for file in files:
        file.write_text("")
    assert source_facts(source, table, text, folder) == facts
    assert any(file.stat().st_size for file in files)


def test_fewer_rows(
    counted: tuple[SourceFacts, TokenTable, Source, Path], rows, text: TextPreparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """max_rows takes the first ones; of a set that is too large evenly spread ones are looked at."""
    _, table, source, folder = counted
    first = source_facts(source, table, text, folder, max_rows=10)
    assert first.num_rows == first.num_looked_at == 10
    assert first.columns[0].num_distinct == len({row["a"] for row in rows[:10]})
    monkeypatch.setattr(facts_module, "MAX_ROWS", 50)
    spread = source_facts(source, table, text, folder)
    assert (spread.num_rows, spread.num_looked_at) == (180, 45)
    assert spread.columns[0].num_distinct == len({row["a"] for row in rows[::4]})


def test_leaks(rows: list[dict[str, object]], tmp_path: Path) -> None:
    train = [write(tmp_path / "one.jsonl", rows[:60]), write(tmp_path / "two.jsonl", rows[60:120])]
    new = [{"a": "wholly new", "b": str(rows[0]["b"]), "s": 0.5, "k": 1}, {"a": "x y", "b": "y x", "s": 0.5, "k": 1}]
    inside = [rows[3], rows[70], rows[70]]
    path = tmp_path / "dev.jsonl"
    write(path, [*inside, *new])
    dev = EvalSource(str(path), COLUMNS, name="dev")
    texts = {str(row[key]) for row in [*inside, *new] for key in "ab"}
    facts = leak_facts(dev, train, tmp_path)
    assert facts == LeakFacts("dev", num_rows=5, num_texts=len(texts), num_known_rows=3, num_known_texts=len(texts) - 3)
    assert leak_facts(dev, train[:1], tmp_path).num_known_rows == 1
    assert leak_facts(dev, train[1:], tmp_path, max_rows=5).num_known_rows == 0


def test_leaks_behind_prompts_and_in_swapped_columns(rows: list[dict[str, object]], tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    plain = write(path, rows)
    swapped = {**COLUMNS, "anchor": "b", "positive": "a"}
    prompts = {"anchor": "query: ", "positive": "passage: "}
    train = [plain, replace(plain, prompts=prompts), replace(plain, columns=swapped)]
    num_texts = len({str(row[key]) for row in rows for key in "ab"})
    for more in ({}, {"prompts": prompts}, {"columns": swapped}):
        dev = EvalSource(**{"path": str(path), "columns": COLUMNS, "name": "dev", **more})
        for source in train:
            assert leak_facts(dev, [source], tmp_path) == LeakFacts("dev", 180, num_texts, 180, num_texts)


def test_leaks_count_every_negative_of_a_validation_set(tmp_path: Path) -> None:
    records = [{"a": f"q{i}", "b": [f"r{i}"], "n": [f"other {i} {j}" for j in range(i)]} for i in range(1, 31)]
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    columns: dict[str, int | str] = {"anchor": "a", "positives": "b", "negatives": "n"}
    dev = EvalSource(str(path), columns, name="dev", evaluator=Reranking())
    num_others = sum(range(1, 31))
    facts = leak_facts(dev, [Source(str(path), columns)], tmp_path)
    assert facts == LeakFacts("dev", 30, 60 + num_others, 30, 60 + sum(min(i, 7) for i in range(1, 31)))


@pytest.mark.parametrize("kind", ["bert", "mpnet", "distilbert", "modernbert", "qwen3"])
def test_size_without_weights(tiny_encoders: dict[str, Path], kind: str) -> None:
    """The sizes of the tensors in the weight file are the truth."""
    from safetensors import safe_open

    spec = EncoderSpec(str(tiny_encoders[kind]))
    size = backbone_size(spec)
    with safe_open(next(tiny_encoders[kind].rglob("*.safetensors")), "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    assert size.num_parameters == sum(torch.Size(shape).numel() for shape in shapes.values())
    pooler = sum(torch.Size(shape).numel() for name, shape in shapes.items() if "pooler" in name)
    assert size.num_trained == size.num_parameters - pooler
    embedding = ("word_embeddings", "tok_embeddings", "embed_tokens")
    words = next(shape for name, shape in shapes.items() if any(part in name for part in embedding))
    assert [size.num_pieces, size.hidden] == words
    assert not normalizes(spec)
    assert normalizes(EncoderSpec(str(tiny_encoders[kind]), normalize=True))


def test_a_folder_that_normalizes(minilm: Path) -> None:
    assert normalizes(EncoderSpec(str(minilm)))
    assert not normalizes(EncoderSpec(str(minilm), normalize=False))
