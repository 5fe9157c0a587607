"""A token table holds what the tokenizer gives for every row, whoever built it and whoever reads it."""

import multiprocessing
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainer.data import loading, tokens
from trainer.data.cache import entries
from trainer.data.sources import Source
from trainer.data.table import TokenTable
from trainer.data.tokens import tokenize
from trainer.encoder.text import TextPreparation

ROOT = Path(__file__).parents[2]
WORDS = [f"word{n}" for n in range(300)]
COLUMNS = {"anchor": "a", "positive": "b", "score": "s", "label": "y"}
NUM_ROWS = 5000


def make_text(max_length: int = 12, prompt: str = "") -> TextPreparation:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    raw = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return TextPreparation(PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]"), max_length, prompt)


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, (2, NUM_ROWS))
    texts = [[" ".join(rng.choice(WORDS[:250], n)) for n in column] for column in lengths]
    return pd.DataFrame({"a": texts[0], "b": texts[1], "s": rng.random(NUM_ROWS), "y": rng.integers(0, 3, NUM_ROWS)})


@pytest.fixture(scope="module")
def source(frame: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("tokens") / "rows.jsonl"
    frame.to_json(path, orient="records", lines=True, double_precision=15)
    return Source(str(path), COLUMNS)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def table(source: Source, cache_dir: Path) -> TokenTable:
    return tokenize(source, make_text(), cache_dir)


def test_ids_are_those_of_the_tokenizer(table: TokenTable, frame: pd.DataFrame) -> None:
    text = make_text()
    rows = np.random.default_rng(1).permutation(NUM_ROWS)
    assert table.columns == ("anchor", "positive")
    assert table.num_rows == NUM_ROWS
    for column, name in (("anchor", "a"), ("positive", "b")):
        expected = text(frame[name].tolist())
        found = table.ids(column, rows)
        assert [ids.tolist() for ids in found] == [expected[row] for row in rows]
        assert {ids.dtype for ids in found} == {np.dtype(np.int32)}
        assert table.lengths(column).tolist() == [len(ids) for ids in expected]
        assert table.lengths(column).dtype == np.int32


def test_targets_are_those_of_the_rows(table: TokenTable, frame: pd.DataFrame) -> None:
    assert table.labels is not None
    assert table.scores is not None
    assert (table.labels.dtype, table.scores.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(table.labels, frame.y)
    np.testing.assert_array_equal(table.scores, frame.s.astype(np.float32))


def test_used_ids_are_exactly_those_that_occur(table: TokenTable, frame: pd.DataFrame) -> None:
    ids = {i for name in "ab" for text in make_text()(frame[name].tolist()) for i in text}
    assert table.used_ids().tolist() == sorted(ids)
    assert table.used_ids().dtype == np.int64
    assert len(ids) < len(make_text().tokenizer), "an unused piece is needed to tell the difference"


def test_truncated_texts_are_counted_exactly(table: TokenTable, frame: pd.DataFrame) -> None:
    untruncated = make_text(max_length=10_000)
    for column, name in (("anchor", "a"), ("positive", "b")):
        lengths = np.array([len(ids) for ids in untruncated(frame[name].tolist())])
        assert (lengths == 12).any(), "texts that just fit are the hard case"
        assert table.num_truncated(column) == (lengths > 12).sum() > 0
        assert table.lengths(column).max() == 12


def test_columns_of_different_lengths(source: Source, table: TokenTable, frame: pd.DataFrame, cache_dir: Path) -> None:
    """Each column as the tokenizer cuts it at that length; lengths that are the encoder's change nothing."""
    shorter = replace(make_text(), max_lengths={"anchor": 5})
    assert len({make_text().fingerprint, shorter.fingerprint, make_text(max_length=5).fingerprint}) == 3
    other = tokenize(source, shorter, cache_dir)
    assert other.folder != table.folder
    rows = np.arange(NUM_ROWS)
    for column, name, length in (("anchor", "a", 5), ("positive", "b", 12)):
        expected = make_text(length)(frame[name].tolist())
        assert [ids.tolist() for ids in other.ids(column, rows)] == expected
        whole = make_text(10_000)(frame[name].tolist())
        assert other.num_truncated(column) == sum(len(ids) > length for ids in whole) > 0
    np.testing.assert_array_equal(other.labels, table.labels)
    same = tokenize(source, replace(make_text(), max_lengths={"anchor": 12}), cache_dir)
    assert (same.folder / "ids.int32").read_bytes() == (table.folder / "ids.int32").read_bytes()


def test_processes_build_the_same_table_as_one(
    source: Source, table: TokenTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_TEXTS_PER_PROCESS", 100)
    monkeypatch.setattr(tokens, "_SPAN", 300)
    monkeypatch.setattr(tokens, "num_cores", lambda: 2)
    other = tokenize(source, make_text(), tmp_path)
    assert other.folder.parent != table.folder.parent
    files = {path.name for path in table.folder.iterdir()}
    texts = {"ids.int32", "offsets.int64", "hashes.int64", "anchor.int64", "positive.int64"}
    assert files == texts | {"label.int64", "score.float32", "used_ids.npy", "report.json"}
    for name in files:
        assert (other.folder / name).read_bytes() == (table.folder / name).read_bytes()


def test_a_table_is_read_in_place(table: TokenTable) -> None:
    before = pa.total_allocated_bytes()
    again = TokenTable(table.folder)
    ids = again.ids("anchor", np.arange(NUM_ROWS))
    assert pa.total_allocated_bytes() == before, "the ids were copied"
    assert all(not i.flags.owndata and not i.flags.writeable for i in ids)
    assert all(np.shares_memory(i, again._values) for i in ids)


def test_sixteen_rows_take_less_than_a_tenth_of_a_millisecond(table: TokenTable) -> None:
    rows = np.random.default_rng(2).integers(0, NUM_ROWS, (500, 16))
    seconds = []
    for batch in rows:
        start = time.perf_counter()
        table.ids("anchor", batch)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 100e-6


def test_the_second_call_only_opens(source: Source, table: TokenTable, cache_dir: Path) -> None:
    stamp = (table.folder / "ids.int32").stat().st_mtime_ns
    assert tokenize(source, make_text(), cache_dir).folder == table.folder
    assert (table.folder / "ids.int32").stat().st_mtime_ns == stamp


def test_a_text_that_repeats_is_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any column, inside a segment of rows; the rows read the same as ever."""
    anchors = [f"word{n // 3}" for n in range(60)]
    positives = [f"word{n % 7} word1" for n in range(59)] + ["word0"]  # the last one is an anchor of the first row
    pd.DataFrame({"a": anchors, "b": positives}).to_csv(tmp_path / "x.csv", index=False)
    source, text = Source(str(tmp_path / "x.csv"), {"anchor": "a", "positive": "b"}), make_text()
    different = {*anchors, *positives}
    monkeypatch.setattr(loading, "_BATCH_ROWS", 10)
    for segment_rows in (1 << 20, 20):
        monkeypatch.setattr(tokens, "_SEGMENT_ROWS", segment_rows)
        table = tokenize(source, text, tmp_path / str(segment_rows))
        for column, texts in (("anchor", anchors), ("positive", positives)):
            assert [ids.tolist() for ids in table.ids(column, np.arange(60))] == text(texts)
            assert table.lengths(column).tolist() == [len(ids) for ids in text(texts)]
        numbers = [*table.text_ids("anchor").tolist(), *table.text_ids("positive").tolist()]
        of_number = dict(zip(numbers, anchors + positives, strict=True))
        assert [of_number[number] for number in numbers] == anchors + positives, "two texts have one number"
        stored = (table.folder / "ids.int32").stat().st_size
        if segment_rows > 60:
            assert len(set(numbers)) == len(different) < len(numbers)
            assert stored == 4 * sum(map(len, text(sorted(different))))
        else:
            assert len(different) < len(set(numbers)) < len(numbers)


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", ["ids.int32", "report.json"])
def test_a_damaged_table_is_named_and_made_again(
    fault: str, name: str, source: Source, table: TokenTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tokenize(source, make_text(), tmp_path).folder
    whole = (folder / name).read_bytes()
    if fault == "missing":
        (folder / name).unlink()
        said = f"{name} is missing"
    elif fault == "truncated":
        (folder / name).write_bytes(whole[:-100])
        said = f"{name} has {len(whole) - 100:,} bytes of {len(whole):,}"
    else:
        (folder / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        said = f"{name} is damaged (its sha256 is another)"
    again = tokenize(source, make_text(), tmp_path, verify=True)
    said = "report.json is missing or damaged" if name == "report.json" else said
    assert [record.getMessage() for record in caplog.records] == [f"{folder}: {said}; it is made again"]
    assert (folder / name).read_bytes() == whole
    np.testing.assert_array_equal(again.ids("anchor", np.array([9]))[0], table.ids("anchor", np.array([9]))[0])
    caplog.clear()
    tokenize(source, make_text(), tmp_path, verify=True)
    assert not caplog.records, "a whole table is left alone"


BUILD = """
import sys
from pathlib import Path
from tests.data.test_tokens import make_text
from trainer.data import tokens
from trainer.data.sources import Source
tokens._SPAN = 5
real = tokens._tokenize_span
def tokenize_span(*args):
    print("a span", flush=True)
    sys.stdin.readline()
    return real(*args)
tokens._tokenize_span = tokenize_span
tokens.tokenize(Source(sys.argv[1], {"anchor": "a", "positive": "b"}), make_text(), Path(sys.argv[2]))
"""


def test_a_build_that_is_killed_leaves_nothing_that_passes_for_whole(source: Source, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", BUILD, source.path, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        for _ in range(3):  # at the third one, two are done
            assert process.stdout.readline() == "a span\n"
            process.stdin.write("go on\n")
            process.stdin.flush()
        (unfinished,) = (tmp_path / "tokens").glob("*.unfinished")
        assert (unfinished / "ids.int32").exists()
        process.kill()
    assert {entry.finished for entry in entries(tmp_path) if entry.kind == "tokens"} == {False}
    table = tokenize(Source(source.path, {"anchor": "a", "positive": "b"}), make_text(), tmp_path)
    assert table.num_rows == NUM_ROWS
    assert not unfinished.exists()


def test_another_length_prompt_or_spec_is_another_table(source: Source, cache_dir: Path) -> None:
    other_spec = Source(source.path, COLUMNS, score_range=(0, 1))
    tables = [
        tokenize(source, make_text(), cache_dir),
        tokenize(source, make_text(max_length=11), cache_dir),
        tokenize(source, make_text(prompt="word1 "), cache_dir),
        tokenize(other_spec, make_text(), cache_dir),
    ]
    assert len({t.folder for t in tables}) == 4
    prompted = tables[2].ids("anchor", np.array([0]))[0]
    np.testing.assert_array_equal(prompted[:2], make_text()(["word1"])[0][:2])


def test_a_table_travels_to_another_process(table: TokenTable) -> None:
    assert len(pickle.dumps(table)) < 1000
    with multiprocessing.get_context("fork").Pool(1) as pool:
        ids = pool.apply(table.ids, ("positive", np.array([7, 3])))
    for found, expected in zip(ids, table.ids("positive", np.array([7, 3])), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_targets_may_be_absent_and_skipped_rows_are_known(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('t\nword1\n""\nword2\n')
    table = tokenize(Source(str(path), {"text": "t"}, on_bad_row="skip"), make_text(), tmp_path / "c")
    assert (table.columns, table.num_rows, table.num_skipped) == (("text",), 2, 1)
    assert table.labels is None
    assert table.scores is None


def test_a_text_without_a_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("t\nword1\n\ufffd\n", encoding="utf-8")
    text = make_text()
    text.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$0")
    with pytest.raises(ValueError, match="column 'text', row 2: the text has no token"):
        tokenize(Source(str(path), {"text": "t"}), text, tmp_path / "c")
    assert not list((tmp_path / "c" / "tokens").glob("*.unfinished"))


def test_real_data_with_a_real_tokenizer(data_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = TextPreparation(AutoTokenizer.from_pretrained(str(data_dir / "tokenizers" / "mbert")), 32)
    path = data_dir / "sts" / "korsts.dev.jsonl.gz"
    table = tokenize(Source(str(path), {"anchor": "sentence1", "positive": "sentence2"}), text, tmp_path)
    texts = pd.read_json(path, lines=True).sentence2.tolist()
    found = [ids.tolist() for ids in table.ids("positive", np.arange(table.num_rows))]
    assert found == text(texts)
