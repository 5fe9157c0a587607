"""Rows with lists of texts, as FlagEmbedding and Tevatron write them: several positives, any number of negatives."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.batch import PackedBatch
from trainer.cli import main
from trainer.data.evalsource import EvalSource
from trainer.data.facts import source_facts
from trainer.data.hashes import NO_TEXT, hash_tokens
from trainer.data.loading import fingerprint, load
from trainer.data.module import PairData
from trainer.data.sources import Source
from trainer.data.streaming import StreamedTable
from trainer.data.tokens import tokenize
from trainer.distributed import gather
from trainer.encoder import EncoderSpec
from trainer.encoder.text import load_text_preparation

LISTS = {"anchor": "query", "positives": "pos", "negatives": "neg"}
MOST = 3


def records(texts: list[str]) -> list[dict[str, Any]]:
    """40 queries with 1 to 3 positives and 0 to 4 negatives; some texts stand in several of them."""
    return [
        {
            "query": f"{texts[i % 30]}",
            "pos": [texts[40 + (7 * i + k) % 50] for k in range(1 + i % 3)],
            "neg": [texts[100 + (3 * i + k) % 20] for k in range(i % 5)],
        }
        for i in range(40)
    ]


def expanded(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What the records mean: a row for each positive, with as many negatives as there are, at most three."""
    padded = [(r, [*r["neg"][:MOST], *[None] * (MOST - len(r["neg"]))]) for r in rows]
    return [(r["query"], positive, *negatives) for r, negatives in padded for positive in r["pos"]]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def lists(tmp_path: Path, demo_texts: list[str]) -> Source:
    texts = list(dict.fromkeys(demo_texts))
    return Source(write(tmp_path / "flag.jsonl", records(texts)), LISTS, max_negatives=MOST)


def batches_of(source: Source, encoder: str, cache: str, batch_size: int) -> list[PackedBatch]:
    """This rank's batches of an epoch, through the loader of a run."""
    data = PairData([source], EncoderSpec(encoder, max_length=32), batch_size=batch_size, cache_dir=cache)
    data.prepare_data()
    data.setup("fit")
    data.trainer = SimpleNamespace(global_step=0, limit_train_batches=1.0)  # type: ignore[assignment]
    return list(data.train_dataloader())


def texts_of(batch: PackedBatch) -> list[list[int]]:
    """Token ids, column by column."""
    segments = batch.input_ids_T.split(list(batch.lengths))
    return [segments[place].tolist() for place in batch.order_S.tolist()]


def test_a_loader_gives_what_the_records_mean(lists: Source, tmp_path: Path, tiny_encoder: Path) -> None:
    """Token ids, equal texts, groups and absent texts of every row against the records themselves."""
    text = load_text_preparation(EncoderSpec(str(tiny_encoder), max_length=32))
    rows = expanded([json.loads(line) for line in Path(lists.path).read_text().splitlines()])
    number_of: dict[str, int] = {}
    group_of: dict[str, int] = {}
    seen = []
    for batch in batches_of(lists, str(tiny_encoder), str(tmp_path / "cache"), 16):
        targets, ids = batch.targets, texts_of(batch)
        assert targets.texts_BC is not None
        assert targets.groups_B is not None
        assert targets.present_BC is not None
        assert batch.num_columns == 2 + MOST
        for place, row in enumerate(targets.row_ids_B.tolist()):
            seen.append(row)
            here = rows[row]
            assert targets.present_BC[place].tolist() == [one is not None for one in here]
            for column, one in enumerate(here):
                found = ids[column * batch.num_rows + place]
                assert found == (text([one])[0] if one else text.no_text)
                number = int(targets.texts_BC[place, column])
                assert number == (number_of.setdefault(one, number) if one else NO_TEXT)
            assert group_of.setdefault(here[0], int(targets.groups_B[place])) == int(targets.groups_B[place])
    assert sorted(seen) == list(range(len(rows)))
    assert len(set(number_of.values())) == len(number_of), "different texts have different numbers"
    assert len(set(group_of.values())) == len(group_of) < 40


def fields_on_rank(source: Source, encoder: str, cache: str) -> list[list[list[int]]]:
    fields = []
    for batch in batches_of(source, encoder, cache, 15):
        targets = batch.targets
        assert targets.groups_B is not None
        whole = (targets.row_ids_B, targets.groups_B, targets.texts_BC, targets.present_BC)
        gathered = [gather.gather_rows(t, targets.rows_per_rank) for t in whole]  # type: ignore[arg-type]
        by_row = gathered[0].argsort()  # ranks take the rows of a step in an order of their own
        fields.append([t[by_row].tolist() for t in gathered])
    return fields


def test_two_ranks_hold_together_what_one_holds(lists: Source, tmp_path: Path, tiny_encoder: Path, two_ranks) -> None:
    arguments = (lists, str(tiny_encoder), str(tmp_path / "cache"))
    assert two_ranks(fields_on_rank, *arguments) == [fields_on_rank(*arguments)] * 2


def test_a_streamed_table_knows_the_same(lists: Source, tmp_path: Path, tiny_encoder: Path) -> None:
    """Hashes, groups, absent texts and token ids of Parquet read as a stream against the same rows read first."""
    text = load_text_preparation(EncoderSpec(str(tiny_encoder), max_length=32))
    frame = pd.read_json(lists.path, lines=True)
    frame["pos"] = frame["pos"].str[0]
    frame.to_parquet(tmp_path / "x.parquet", row_group_size=17)
    columns = {"anchor": "query", "positive": "pos", "negatives": "neg", "group": "query"}
    more: dict[str, Any] = {"max_negatives": MOST, "prompts": {"negatives": "passage: "}}
    table = tokenize(Source(str(tmp_path / "x.parquet"), columns, **more), text, tmp_path)
    source = Source(str(tmp_path / "x.parquet"), columns, streaming=True, **more)
    streamed = StreamedTable(source, text, tmp_path)
    rows = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(streamed.hashes(rows), table.hashes(rows))
    np.testing.assert_array_equal(streamed.targets(rows)["group"], table.targets(rows)["group"])
    assert (table.hashes(rows)[:, 2:] == NO_TEXT).sum() == sum(MOST - min(MOST, len(neg)) for neg in frame["neg"])
    for column in table.columns:
        for ours, theirs in zip(streamed.ids(column, rows), table.ids(column, rows), strict=True):
            assert ours.tolist() == theirs.tolist()
    facts = source_facts(source, streamed, text, tmp_path)
    assert [column.num_texts for column in facts.columns] == [40, 40, 32, 24, 16]


def test_a_run_checks_trains_and_exports(lists: Source, tmp_path: Path, tiny_encoder: Path) -> None:
    """Two epochs over lists, without repeated texts; the card shows the columns that every row has."""
    source = json.dumps([{"path": lists.path, "columns": LISTS, "max_negatives": MOST}])
    args = ["--model.encoder.backbone", str(tiny_encoder), "--model.loss", "InfoNCE", "--data.train", source]
    args += ["--data.batch_size", "16", "--data.no_duplicates", "true", "--data.cache_dir", str(tmp_path / "cache")]
    args += ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.default_root_dir"]
    assert main(["fit", *args, str(tmp_path / "run")]) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in log if "train/loss" in line) == 10  # 79 rows, 5 steps an epoch
    report = json.loads((tmp_path / "run" / "check.json").read_text())
    assert report["plan"]["false_negatives"] == [0.0]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "<code>anchor</code> and <code>positive</code>" in card


def test_absent_texts_are_not_counted(lists: Source, tmp_path: Path, tiny_encoder: Path) -> None:
    text = load_text_preparation(EncoderSpec(str(tiny_encoder), max_length=32))
    table = tokenize(lists, text, tmp_path)
    rows = expanded([json.loads(line) for line in Path(lists.path).read_text().splitlines()])
    facts = source_facts(lists, table, text, tmp_path)
    for place, column in enumerate(facts.columns):
        texts = [row[place] for row in rows if row[place] is not None]
        lengths = [len(ids) for ids in text(texts)]
        assert (column.num_texts, column.min, column.num_distinct) == (len(texts), min(lengths), len(set(texts)))
    # The placeholder is embedded, so its pieces are in use.
    assert set(text.no_text) <= set(table.used_ids().tolist())


def test_passages_of_objects_and_groups_of_any_value(tmp_path: Path) -> None:
    """Tevatron's positive_passages and negative_passages hold objects; a group may be a number or a word."""
    passages = [{"docid": "1", "text": "a"}, {"docid": "2", "text": "b"}]
    lines = [
        {"query": "q", "positive_passages": passages[:1], "negative_passages": passages, "g": "5"},
        {"query": "r", "positive_passages": passages, "negative_passages": None, "g": 5},
        {"query": "r", "positive_passages": passages[1:], "negative_passages": [], "g": "x"},
    ]
    columns = {"anchor": "query", "positives": "positive_passages.text", "negatives": "negative_passages.text"}
    path = write(tmp_path / "x.jsonl", lines)
    rows = load(Source(path, {**columns, "group": "g"}, max_negatives=2), tmp_path / "c")
    assert rows["positive"][:] == ["a", "a", "b", "b"]
    assert rows["negative_2"][:] == ["b", None, None, None]
    first, second, third, fourth = rows["group"][:]
    assert first == second == third != fourth
    assert fingerprint(Source(path, columns)) != fingerprint(Source(path, columns, max_negatives=2))


@pytest.mark.parametrize(
    ("row", "columns", "cause"),
    [
        ({"pos": ["x"]}, {"positive": "pos"}, r"holds a list \(\['x'\]\), not text; map a list as positives or"),
        ({"pos": []}, {"positives": "pos"}, "is an empty list"),
        ({"pos": "x"}, {"positives": "pos"}, r"holds a text \(x\), not a list"),
        ({"pos": ["x", " "]}, {"positives": "pos"}, "in place 1 is blank"),
        ({"pos": ["x"], "neg": ["y", 3]}, {"positives": "pos", "negatives": "neg"}, "in place 1 holds a number"),
        ({"pos": ["x"], "g": None}, {"positives": "pos", "group": "g"}, "'g' is null"),
        ({"pos": "x", "g": ""}, {"positive": "pos", "group": "g"}, "'g' is empty; a row that belongs to no group"),
        ({"pos": "x", "g": " "}, {"positive": "pos", "group": "g"}, "'g' is blank; a row that"),
        ({"pos": "x", "g": float("nan")}, {"positive": "pos", "group": "g"}, "'g' is not a number; a row that"),
        ({"pos": ["x"]}, {"positives": "pos", "negatives": "pos.text"}, "'pos.text' is missing"),
        (
            {"pos": ["x"], "neg": [{"body": "y"}]},
            {"positives": "pos", "negatives": "neg.text"},
            "'neg.text' is missing",
        ),
    ],
)
def test_lists_that_cannot_be_used_are_bad_rows(
    row: dict[str, Any], columns: dict[str, int | str], cause: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", [{"q": "good", **row}])
    with pytest.raises(ValueError, match=f"x.jsonl:1: column .*{cause}"):
        load(Source(path, {"anchor": "q", **columns}), tmp_path / "c")


def test_a_record_without_the_key_of_its_negatives_has_none(tmp_path: Path) -> None:
    """As one whose list is null, which is what pandas makes of it; where no record has the key, it is a typo."""
    lines = [{"query": "q", "pos": ["a"], "neg": ["b"]}, {"query": "r", "pos": ["c"]}]
    path = write(tmp_path / "x.jsonl", lines)
    columns: dict[str, int | str] = {"anchor": "query", "positives": "pos", "negatives": "neg"}
    rows = load(Source(path, columns, max_negatives=1), tmp_path / "c")
    pd.read_json(path, lines=True).to_parquet(tmp_path / "x.parquet")
    peer = load(Source(str(tmp_path / "x.parquet"), columns, max_negatives=1), tmp_path / "c")
    assert rows["negative_1"][:] == peer["negative_1"][:] == ["b", None]
    with pytest.raises(ValueError, match="no column 'negs'"):
        load(Source(path, {**columns, "negatives": "negs"}), tmp_path / "c")


def test_specs_of_lists_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match="columns has negatives and negative_1; name one of the two"):
        Source("x.jsonl", {**LISTS, "negative_1": "n"})
    with pytest.raises(ValueError, match="max_negatives is 0; it must be 1 or more"):
        Source("x.jsonl", LISTS, max_negatives=0)
    for name in ("negative_1", "negatives"):
        with pytest.raises(ValueError, match=f"'{name}', which a row with few negatives lacks; there are anchor, pos"):
            Source("x.jsonl", LISTS, holdout=0.1, holdout_by=name)
    with pytest.raises(ValueError, match="positives does not go with streaming: true"):
        Source("x.jsonl", LISTS, streaming=True)
    with pytest.raises(ValueError, match=r"negatives is for data\.train"):
        EvalSource("x.jsonl", {"anchor": "q", "positive": "p", "negatives": "n"}, name="dev")


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=40))
def test_hashes_are_equal_where_the_pieces_are(texts: list[list[int]]) -> None:
    hashes = hash_tokens(np.array([i for text in texts for i in text], np.int32), np.array([len(t) for t in texts]))
    assert hashes.min() >= 0
    assert len(set(hashes.tolist())) == len({tuple(text) for text in texts})
    alone = [int(hash_tokens(np.array(text, np.int32), np.array([len(text)]))[0]) for text in texts]
    assert hashes.tolist() == alone


def test_no_two_of_a_million_texts_share_a_hash() -> None:
    """Texts that differ in one piece or in the order of two, which a weak hash would mix up."""
    ids = np.arange(1000)
    texts = np.stack([np.repeat(ids, 1000), np.tile(ids, 1000)], axis=1)
    hashes = hash_tokens(texts.ravel(), np.full(1_000_000, 2))
    assert len(np.unique(hashes)) == 1_000_000
    ones = torch.from_numpy(hashes) >> torch.arange(63)[:, None] & 1
    assert ones.double().mean(dim=1).sub(0.5).abs().max() < 0.003, "a bit that is not even"
