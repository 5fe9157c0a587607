"""CSV and TSV by blocks: the rows, the skipped rows and the messages of reading record by record."""

from __future__ import annotations

import csv
import gzip
import io
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from trainer.data import delimited, rows
from trainer.data.loading import load, num_skipped
from trainer.data.sources import Source

SCORED = {"anchor": "a", "positive": "b", "score": "s"}
# Whole lines, some with a record that goes on behind them; the last one opens a quote that nothing closes.
ODD = [
    'x,"in, quotes",1\n',
    'x,"a ""word"" in quotes",1\n',
    '"",empty,1\n',
    'x,"over\ntwo lines, and\nthree",1\n',
    'x,a "bare" quote,1\n',
    'x,"closed" too early,1\n',
    "x,one cell more,1,\n",
    "x,one cell less\n",
    "\n",
    "   \n",
    "x,carriage return\r\n",
    "x,two cells and a return,1\r\n",
    "x,inner \r return,1\n",
    "x,nul \0 byte,1\n",
    " ,blank,1\n",
    "x,no number,one\n",
    "x,spaces around, 1.5 \n",
    "x,underscore,1_0\n",
    "x,not finite,nan\n",
    "x,over the range,7\n",
    "x,\udcff\udcfe no utf-8,1\n",
    "x,\u00e9\u4e2d\u6587,1e0\n",
    'x,"never closed,1\n',
]


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    return str(path)


def mixed_file(delimiter: str) -> str:
    second = ["number {}", '"number, {}"', "number {}"]
    good = [f"text {n},{second[n % 3].format(n)},{n % 6}\n" for n in range(2500)]
    for place, odd in enumerate(ODD):
        good.insert(200 + 90 * place, odd)
    text = "a,b,s\n" + "".join(good)
    return text if delimiter == "," else text.replace(",", "\t")


def failure(source: Source, cache: Path) -> str:
    with pytest.raises(ValueError, match=":") as error:
        load(source, cache)
    return str(error.value)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_blocks_give_the_rows_and_the_places_that_records_give(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good blocks, blocks with quotes, bad rows and records over blocks take turns."""
    path = write(tmp_path / f"x{suffix}", mixed_file("," if suffix == ".csv" else "\t"))
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 1500)
    accepted: Counter[bool] = Counter()
    parse = delimited._parse

    def counted(*args: Any) -> Any:
        batch = parse(*args)
        accepted[batch is not None] += 1
        return batch

    monkeypatch.setattr(delimited, "_parse", counted)
    source = Source(path, SCORED, score_range=(0, 6), on_bad_row="skip")
    by_blocks = load(source, tmp_path / "blocks")
    assert accepted[True] > 15, "Arrow read next to nothing"
    assert accepted[False] > 10, "no block was left to the general way"
    strict = Source(path, SCORED, score_range=(0, 6))
    message = failure(strict, tmp_path / "strict blocks")
    monkeypatch.setattr(delimited, "_parse", lambda *args: None)
    by_records = load(source, tmp_path / "records")
    assert by_blocks[:] == by_records[:]
    assert num_skipped(source, tmp_path / "blocks") == num_skipped(source, tmp_path / "records") > 8
    assert message == failure(strict, tmp_path / "strict records")
    assert 2480 < len(by_blocks) < 2500 + len(ODD)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_blocks_of_blank_lines_hold_no_row(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 1500)
    lines = [f"text {n},other {n}\n" for n in range(300)]
    text = "".join(["a,b\n", *lines[:200], "\n" * 4000, *lines[200:], "\n" * 4000])
    path = write(tmp_path / f"x{suffix}", text if suffix == ".csv" else text.replace(",", "\t"))
    found = load(Source(path, {"anchor": "a", "positive": "b"}), tmp_path / "c")
    assert found["anchor"][:] == [f"text {n}" for n in range(300)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_ends_of_lines_inside_quotes_stay_as_they_are(end: str, tmp_path: Path) -> None:
    """Whatever ends the records, and over the end of a block."""
    texts = ["a\r\nb", "\r\n", "a\nb", "a\rb", 'a\r\n"b"\r\n', "a,\r\r\nb"] * 20
    frame = pd.DataFrame({"a": [f"{n}{text}." for n, text in enumerate(texts)], "b": [f"row {n}" for n in range(120)]})
    frame.to_csv(tmp_path / "x.csv", index=False, lineterminator=end, quoting=csv.QUOTE_ALL)
    found = load(Source(str(tmp_path / "x.csv"), {"anchor": "a", "positive": "b"}), tmp_path / "c")
    assert found["anchor"][:] == pd.read_csv(tmp_path / "x.csv")["a"].tolist() == frame["a"].tolist()
    assert found["positive"][:] == frame["b"].tolist()


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv"])
def test_what_pandas_writes_is_read_by_arrow_alone(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quoted cells with delimiters and quotes in them, mapped words, a column by position, one not asked for."""
    rng = random.Random(0)
    words = ["plain", "with, comma", 'a "quoted" word', "tab\there", "\u00fcber", "x" * 50, "'single'"]
    frame = pd.DataFrame(
        {
            "more": range(900),
            "a": [f"{rng.choice(words)} {rng.choice(words)} {n}" for n in range(900)],
            "b": [f"{n} {rng.choice(words)}" for n in range(900)],
            "y": [rng.choice(["yes", "no"]) for _ in range(900)],
        }
    )
    frame.to_csv(tmp_path / f"x{suffix}", sep="\t" if suffix == ".tsv" else ",", index=False, quoting=csv.QUOTE_MINIMAL)
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 4000)
    parse = delimited._parse

    def always(*args: Any) -> Any:
        batch = parse(*args)
        assert batch is not None
        return batch

    monkeypatch.setattr(delimited, "_parse", always)
    source = Source(
        str(tmp_path / f"x{suffix}"), {"anchor": 1, "positive": "b", "label": "y"}, label_map={"no": 0, "yes": 1}
    )
    found = load(source, tmp_path / "c")
    assert found["anchor"][:] == frame.a.tolist()
    assert found["positive"][:] == frame.b.tolist()
    assert found["label"][:] == (frame.y == "yes").astype(int).tolist()


def test_any_text_of_cells_is_read_as_the_csv_module_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines drawn from commas, quotes and letters: what Arrow takes, it takes as the module does."""
    rng = random.Random(1)
    lines = ["".join(rng.choices('",ab', weights=[3, 2, 4, 4], k=rng.randint(1, 9))) for _ in range(20_000)]
    source = Source("x.csv", {"anchor": "a", "positive": "b"})
    taken = 0
    for line in lines:
        batch = delimited._parse(line.encode() + b"\n", source, ["a", "b"], {"anchor": "a", "positive": "b"}, ",")
        if batch is not None:
            taken += 1
            assert [list(row.values()) for row in batch.to_pylist()] == list(csv.reader(io.StringIO(line), strict=True))
    assert taken > 500


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_columns_without_a_name_are_let_be(suffix: str, tmp_path: Path) -> None:
    """As Excel writes them. By their places they can be read; a name that stands twice is still refused."""

    def source(content: str, *columns: str | int, **more: bool) -> Source:
        path = write(tmp_path / f"x{suffix}", content.replace(",", "," if suffix == ".csv" else "\t"))
        return Source(path, dict(zip(("anchor", "positive"), columns, strict=True)), **more)

    for count in (1, 300):
        lines = "".join(f"one {i},two {i},1,u{i},v{i}\n" for i in range(count))
        for columns, first, second in ((("a", "b"), "one", "two"), (("a", 3), "one", "u"), ((4, "b"), "v", "two")):
            rows = load(source(f"a,b,score,,\n{lines}", *columns), tmp_path / "c")
            assert [name.replace(" ", "") for name in rows["anchor"]] == [f"{first}{i}" for i in range(count)]
            assert [name.replace(" ", "") for name in rows["positive"]] == [f"{second}{i}" for i in range(count)]
    records = list(delimited.stream_delimited(source("a,b,,\nx,y,z,w\n", "a", "b").path).records)
    assert records == [(2, {"a": "x", "b": "y", "2": "z", "3": "w"})]
    assert ":1: the header names column 'a' twice" in failure(source("a,a,,\nx,y,,\n", "a", 1), tmp_path / "c2")
    assert ":1: the header names column '' twice" in failure(source(",,\na,b,c\n", 0, 1), tmp_path / "c2")


@pytest.mark.parametrize("again", ["a,b", "b, a", '"b","a"', '\ufeff"a","b"'])
@pytest.mark.parametrize("num_rows", [1, 50_000])
def test_a_second_header_is_refused(num_rows: int, again: str, tmp_path: Path) -> None:
    """Of files that were joined: it is no row, and its columns may stand in another order."""
    parts = ["a,b\n" + "x,y\n" * num_rows, f"{again}\nz,w\n"]
    path = tmp_path / "x.csv.gz"
    path.write_bytes(b"".join(gzip.compress(part.encode()) for part in parts))
    said = re.escape(f"{path}:{num_rows + 2}: a second header, ")
    with pytest.raises(ValueError, match=said):
        load(Source(str(path), {"anchor": "a", "positive": "b"}, on_bad_row="skip"), tmp_path / "c")
    with pytest.raises(ValueError, match=said):
        list(delimited.stream_delimited(str(path)).records)


def test_a_name_of_a_column_may_be_a_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n" + "x,y\n" * 50_000 + "a,y\nb,b\n")
    (tmp_path / "y.csv").write_text("word\nnoun\nword\n")
    pairs = load(Source(str(tmp_path / "x.csv"), {"anchor": "a", "positive": "b"}), tmp_path / "c")
    assert pairs[-2:] == {"anchor": ["a", "b"], "positive": ["y", "b"]}
    assert load(Source(str(tmp_path / "y.csv"), {"text": "word"}), tmp_path / "c")["text"][:] == ["noun", "word"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".tsv.gz"])
def test_a_first_line_that_may_be_a_row_is_said(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once for each file, and only where no name of the config shows that the line is a header."""
    separator = "," if suffix == ".csv" else "\t"
    content = "".join(f"{one}{separator}{two}\n" for one, two in [("one", "uno"), ("two", "dos"), ("three", "tres")])
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(content.encode()) if suffix == ".tsv.gz" else content.encode())
    said = (
        f"{path}: its first line is taken for the names of its columns: 'one', 'uno'; if it is a row, write a header "
        "above it"
    )
    assert len(load(Source(str(path), {"anchor": 0, "positive": 1}, holdout=0.01), tmp_path / "c")) == 2
    assert [record.getMessage() for record in caplog.records] == [said]
    caplog.clear()
    header = delimited.stream_delimited(str(path)).columns
    delimited.warn_of_header(Source(str(path), {"anchor": 0, "positive": 1}, streaming=True), str(path), header)
    assert [record.getMessage() for record in caplog.records] == [said]
    caplog.clear()
    load(Source(str(path), {"anchor": "0", "positive": "1"}, where={"1": ["dos", "tres"]}), tmp_path / "c")
    assert [record.getMessage() for record in caplog.records] == [said]
    caplog.clear()
    load(Source(str(path), {"anchor": "one", "positive": 1}), tmp_path / "c")
    load(Source(str(path), {"anchor": 0, "positive": 1}, where={"uno": "dos"}), tmp_path / "c")
    assert not caplog.records
    numbered = tmp_path / f"numbered{suffix.removesuffix('.gz')}"
    numbered.write_text(f"0{separator}1\nx{separator}y\n")
    load(Source(str(numbered), {"anchor": 0, "positive": 1}), tmp_path / "c")
    assert not caplog.records
