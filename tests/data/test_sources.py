"""Whatever the format, the same rows come out; whatever is wrong with a row is named with its place."""

import gzip
import io
import json
import multiprocessing
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from trainer.data import blocks, json_lines, loading, rows
from trainer.data.evalsource import EvalSource
from trainer.data.files import data_files
from trainer.data.layouts import find_parts
from trainer.data.loading import fingerprint, load, num_skipped
from trainer.data.rowgroups import file_urls, group_files
from trainer.data.sources import Source
from trainer.data.values import BadValueError, check_text
from trainer.evaluation.informationretrieval import InformationRetrieval

PAIR = {"anchor": "a", "positive": "b"}
TEXTS = [
    "plain",
    "comma, and tab\there",
    'a "quoted" word',
    "חתול ישן",
    "a b",
    "two\nlines",
    "'s",
    "x" * 5000,
]
FRAME = pd.DataFrame({"a": TEXTS, "b": TEXTS[::-1], "score": np.linspace(0, 5, len(TEXTS)), "other": range(8)})
SCORED = PAIR | {"score": "score"}


def write_lines(path: Path, *rows: object) -> str:
    """JSON lines; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.writelines(lines)
    return str(path)


def good(number: int = 0) -> dict[str, object]:
    return {"a": f"left {number}", "b": f"right {number}", "score": 2.5}


def failure(source: Source, cache_dir: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load(source, cache_dir)
    assert not [p for p in cache_dir.rglob("*") if p.suffix not in ("", ".lock")], "a refused set left a cache"
    return str(caught.value)


def save_as(frame: pd.DataFrame, folder: Path, kind: str) -> str:
    path = folder / f"rows{kind}"
    if kind.startswith((".jsonl", ".ndjson", ".json")):
        frame.to_json(path, orient="records", lines=True)
    elif kind.startswith((".csv", ".tsv")):
        frame.to_csv(path, sep="\t" if "tsv" in kind else ",", index=False)
    elif kind == ".parquet":
        frame.to_parquet(path)
    elif kind == ".parquet.gz":
        frame.to_parquet(folder / "rows.parquet")
        path.write_bytes(gzip.compress((folder / "rows.parquet").read_bytes()))
    elif kind == ".arrow":
        frame.to_feather(path)  # the Arrow file format
    elif kind == "-saved":
        Dataset.from_pandas(frame).save_to_disk(str(path), num_shards=min(3, len(frame)))
    elif kind == "-splits":
        dev = Dataset.from_pandas(frame.head(1))
        DatasetDict({"train": Dataset.from_pandas(frame), "dev": dev}).save_to_disk(str(path))
    return str(path)


TEXT_KINDS = [".jsonl", ".jsonl.gz", ".ndjson", ".json", ".csv", ".csv.gz", ".tsv"]
TABLE_KINDS = [".parquet", ".parquet.gz", ".arrow", "-saved", "-splits"]


@pytest.mark.parametrize("kind", TEXT_KINDS + TABLE_KINDS)
def test_formats_agree_with_what_pandas_and_datasets_wrote(kind: str, tmp_path: Path) -> None:
    frame = FRAME
    if kind == ".tsv":  # cells of a TSV never span lines
        frame = FRAME[[not any("\n" in text for text in pair) for pair in zip(FRAME.a, FRAME.b, strict=True)]]
    rows = load(Source(save_as(frame, tmp_path, kind), SCORED, score_range=(0, 5)), tmp_path / "cache")
    assert rows.column_names == ["anchor", "positive", "score"]
    assert rows["anchor"][:] == frame.a.tolist()
    assert rows["positive"][:] == frame.b.tolist()
    assert rows.data.column("score").to_numpy().dtype == np.float32
    np.testing.assert_allclose(rows["score"][:], frame.score / 5, rtol=1e-6)


def test_tsv_with_bare_quotes_keeps_lines_apart(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text('a\tb\n"He said\tno\nyes\tthe end"\n"all ""quoted"""\t"x"\n')
    rows = load(Source(str(tmp_path / "x.tsv"), PAIR), tmp_path / "cache")
    assert rows["anchor"][:] == ['"He said', "yes", 'all "quoted"']
    assert rows["positive"][:] == ["no", 'the end"', "x"]


def test_globs_and_folders_join_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for part in (2, 0, 1):
        write_lines(tmp_path / f"part-{part}.jsonl", good(part))
    (tmp_path / "README.md").write_text("not data")
    for path in (tmp_path, tmp_path / "part-*.jsonl", tmp_path / "**" / "*.jsonl"):
        assert load(Source(str(path), PAIR), tmp_path / "c")["anchor"][:] == ["left 0", "left 1", "left 2"]


def test_a_folder_with_train_and_dev_files_gives_only_the_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "x.train.jsonl", good(1))
    write_lines(tmp_path / "x.dev.jsonl", good(2))
    assert load(Source(str(tmp_path), PAIR), tmp_path / "c")["anchor"][:] == ["left 1"]
    assert load(Source(str(tmp_path), PAIR, split="validation"), tmp_path / "c")["anchor"][:] == ["left 2"]
    with pytest.raises(ValueError, match=r"no file of split 'test'; the file names say train, validation"):
        load(Source(str(tmp_path), PAIR, split="test"), tmp_path / "c")


@pytest.mark.parametrize(
    ("names", "split", "wanted"),
    [
        (["pairs", "test"], "train", ["pairs"]),
        (["pairs", "test"], "test", ["test"]),
        (["train-0", "train-1"], "train", ["train-0", "train-1"]),
        (["train-0", "train-1"], "test", None),
        (["more", "train-0"], "train", ["more", "train-0"]),
        (["more", "train-0"], "tset", None),
        (["all", "dev", "train"], "train", ["train"]),
        (["more", "dev", "test"], "train", ["more"]),
        (["more", "dev", "test"], "dev", ["dev"]),
        (["dev", "test"], "train", None),
        (["test"], "train", ["test"]),
        (["part-0", "part-1"], "test", ["part-0", "part-1"]),
    ],
)
def test_files_of_a_folder_by_their_split(
    names: list[str], split: str, wanted: list[str] | None, tmp_path: Path
) -> None:
    """Of a folder on this machine as of one at an address: no run trains on what lies there to be tested on."""
    for name in names:
        write_lines(tmp_path / f"{name}.jsonl", good(1))
    far = Source(f"file://{tmp_path}", PAIR, split=split, streaming=True)
    for found in (lambda: data_files(str(tmp_path), split), lambda: file_urls(far)):
        if wanted is None:
            with pytest.raises(ValueError, match=f"no file of split '{split}'; .*: set split to one of them, or name "):
                found()
        else:
            assert [Path(file).stem for file in found()] == wanted


@pytest.mark.parametrize("path", ["", "*.jsonl", "two.jsonl"])
def test_a_link_to_nothing_is_no_file_less(path: str, tmp_path: Path) -> None:
    """git-annex and DVC keep links to files that are not fetched yet."""
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "one.jsonl", good(1))
    (tmp_path / "set" / "two.jsonl").symlink_to("../blobs/1a2b")
    told = failure(Source(f"{tmp_path}/set/{path}", PAIR), tmp_path / "c")
    assert told == f"{tmp_path}/set/two.jsonl: is a link to ../blobs/1a2b, where nothing is; fetch that file first"
    (tmp_path / "blobs").mkdir()
    write_lines(tmp_path / "blobs" / "1a2b", good(2))
    assert load(Source(f"{tmp_path}/set/{path}", PAIR), tmp_path / "c")["anchor"][-1] == "left 2"


def test_folders_in_a_far_folder_say_a_split_too(tmp_path: Path) -> None:
    for name in ("train", "test", ".trash"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "0.jsonl", good(1))
    far = Source(f"file://{tmp_path}", PAIR, streaming=True)
    assert file_urls(far) == [f"file://{tmp_path}/train/0.jsonl"]


def test_text_columns_come_in_canonical_order(tmp_path: Path) -> None:
    row = {"p": "P", "n10": "N10", "n": "N", "n2": "N2", "a": "A", "y": 3}
    columns = {
        "negative_10": "n10",
        "label": "y",
        "positive": "p",
        "negative_2": "n2",
        "negative": "n",
        "anchor": "a",
    }
    rows = load(Source(write_lines(tmp_path / "x.jsonl", row), columns), tmp_path / "c")
    assert rows.column_names == ["anchor", "positive", "negative", "negative_2", "negative_10", "label"]
    assert list(rows[0].values()) == ["A", "P", "N", "N2", "N10", 3]


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_ids_are_text_whatever_they_were(kind: str, tmp_path: Path) -> None:
    """JSON lines may give numbers; blocks of many rows are read by Arrow, if all are text."""
    named = Source(save_as(pd.DataFrame({"a": ["x", "y"], "key": [7, 12]}), tmp_path, kind), {"text": "a", "id": "key"})
    assert load(named, tmp_path / "cache").to_dict() == {"text": ["x", "y"], "id": ["7", "12"]}
    path = write_lines(tmp_path / "text.jsonl", *({"a": f"t {i}", "key": f"k{i}"} for i in range(200)))
    source = Source(path, {"id": "key", "text": "a"})
    assert load(source, tmp_path / "cache")["id"] == [f"k{i}" for i in range(200)]
    fraction = write_lines(tmp_path / "fraction.jsonl", {"a": "x", "key": 0.5})
    assert "fraction.jsonl:1: column 'key' holds a number (0.5), not text" in failure(
        Source(fraction, {"text": "a", "id": "key"}), tmp_path / "none"
    )


def test_bom_crlf_and_blank_lines_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": "1", "b": "2"}\r\n\r\n{"a": "3", "b": "4"}\r\n\n')
    (tmp_path / "x.csv").write_bytes(b'\xef\xbb\xbfa,b\r\n1,2\r\n\r\n"3",4\r\n')
    (tmp_path / "x.tsv").write_bytes(b"\xef\xbb\xbfa\tb\r\n1\t2\r\n3\t4\r\n")
    for suffix in ("jsonl", "csv", "tsv"):
        rows = load(Source(str(tmp_path / f"x.{suffix}"), PAIR), tmp_path / "c")
        assert rows[:] == {"anchor": ["1", "3"], "positive": ["2", "4"]}


# Every bad row stands on line 2 between good ones.
BAD_LINES = {
    "null": (b'{"a": null, "b": "y", "score": 1}\n', "column 'a' is null"),
    "missing": (b'{"b": "y", "score": 1}\n', "column 'a' is missing"),
    "empty": (b'{"a": "", "b": "y", "score": 1}\n', "column 'a' is empty"),
    "blank": (b'{"a": "x", "b": " \\t\\u00a0", "score": 1}\n', "column 'b' is blank"),
    "number": (b'{"a": 3.5, "b": "y", "score": 1}\n', "column 'a' holds a number (3.5), not text"),
    "list": (b'{"a": ["x"], "b": "y", "score": 1}\n', "column 'a' holds a list"),
    "latin-1": (b'{"a": "caf\xe9", "b": "y", "score": 1}\n', "column 'a' is not valid UTF-8"),
    "lone surrogate": (b'{"a": "\\ud83d", "b": "y", "score": 1}\n', "column 'a' is not valid UTF-8"),
    "megabyte": (
        b'{"a": "' + b"x" * 1_000_001 + b'", "b": "y", "score": 1}\n',
        "has 1,000,001 characters, 1,000,000",
    ),
    "json": (b'{"a": "x", "b": "y" "score": 1}\n', "invalid JSON: Expecting ',' delimiter at column 21"),
    "array": (b"[1, 2]\n", "a JSON object is expected, not list"),
    "range": (b'{"a": "x", "b": "y", "score": 5.1}\n', "column 'score' is 5.1, outside score_range 0..5"),
    "nan": (b'{"a": "x", "b": "y", "score": NaN}\n', "column 'score' is nan, not a finite number"),
    "no number": (b'{"a": "x", "b": "y", "score": "high"}\n', "column 'score' is 'high', not a number"),
    "deep": (b"[" * 100_000 + b"\n", "invalid JSON"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_bad_line_is_named_or_skipped(kind: str, suffix: str, tmp_path: Path) -> None:
    line, cause = BAD_LINES[kind]
    path = write_lines(tmp_path / f"x{suffix}", good(1), line, good(2))
    message = failure(Source(path, SCORED, score_range=(0, 5)), tmp_path / "c")
    assert message.startswith(f"{path}:2: ")
    assert cause in message
    assert f"{path}: 1 bad row; mend them, or set on_bad_row: skip" in message
    skipping = Source(path, SCORED, score_range=(0, 5), on_bad_row="skip", max_bad_rows=1)
    assert load(skipping, tmp_path / "c")["anchor"][:] == ["left 1", "left 2"]
    assert num_skipped(skipping, tmp_path / "c") == 1


@pytest.mark.parametrize(
    ("text", "line", "cause", "kept"),
    [
        ('a,b\n1,2\n3,"4\n5,6\n7,"8"\n', 3, "a quote is not closed", ["1", "5", "7"]),
        ('a,b\n1,2\n3,"4\n5,6\n', 3, "a quote is not closed", ["1", "5"]),
        ('a,b\n"1\n2",2\n3,4,5\n6,7\n', 4, "3 cells, the header has 2", ["1\n2", "6"]),
        ("a,b\n1,2\n3\n6,7\n", 3, "1 cells, the header has 2\n", ["1", "6"]),
        ("a,b\n1,2\n3,4\r5\n6,7\n", 3, "a carriage return stands outside quotes", ["1", "6"]),
        ('a,b\n1,2\n3,"4\\"5"\n6,7\n', 3, "one inside quotes is not doubled", ["1", "6"]),
        ("a,b\n1,2\n3,\n6,7\n", 3, "column 'b' is empty", ["1", "6"]),
        (f"a,b\n1,2\n3,{'x' * 1_000_001}\n6,7\n", 3, "a text is over 1,000,000 characters", ["1", "6"]),
        ("a,b\n1,2\n3,caf\udce9\n6,7\n", 3, "column 'b' is not valid UTF-8", ["1", "6"]),
    ],
)
def test_a_bad_csv_row_costs_no_other_row(text: str, line: int, cause: str, kept: list[str], tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    message = failure(Source(str(path), PAIR), tmp_path / "c")
    assert message.startswith(f"{path}:{line}: ")
    assert cause in message
    assert "1 bad row;" in message
    assert load(Source(str(path), PAIR, on_bad_row="skip"), tmp_path / "c")["anchor"][:] == kept


def test_a_line_break_in_a_tsv_is_named_with_its_remedy(tmp_path: Path) -> None:
    pd.DataFrame({"a": ["1", "2"], "b": ["over\ntwo lines", "y"]}).to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    message = failure(Source(str(tmp_path / "x.tsv"), PAIR), tmp_path / "c")
    assert "x.tsv:3: 1 cells, the header has 2; a row of a TSV is one line: write texts with line breaks as" in message


def test_a_time_that_python_lacks_is_a_bad_row(tmp_path: Path) -> None:
    """A column by its place: all columns are read."""
    times = pa.array([0, 1 << 62, None], pa.timestamp("us"))
    pq.write_table(pa.table({"a": ["1", "2", "3"], "b": ["x", "y", "z"], "t": times}), tmp_path / "x.parquet")
    source = Source(str(tmp_path / "x.parquet"), {"anchor": 0, "positive": 1})
    assert "x.parquet: row 2: holds a value that can't be read (date value out" in failure(source, tmp_path / "c")
    assert load(replace(source, on_bad_row="skip"), tmp_path / "c")["anchor"][:] == ["1", "3"]


def test_a_bad_parquet_row_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pd.DataFrame({"a": ["x"] * 1500 + [None], "b": "y"}).to_parquet(path)
    assert failure(Source(str(path), PAIR), tmp_path / "c").startswith(f"{path}: row 1501: column 'a' is null")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
def test_a_table_with_two_columns_of_one_name_is_refused(kind: str, streaming: bool, tmp_path: Path) -> None:
    """As CSV is; columns that nobody asks for may be called what they like."""
    table = pa.Table.from_arrays([pa.array([text]) for text in "wxyzz"], names=["a", "b", "p", "p", "q"])
    path = tmp_path / f"x{kind}"
    if kind == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    source = Source(str(path), {"anchor": "a", "positive": "p"}, streaming=streaming)
    by_place = Source(str(path), {"anchor": 0, "positive": 2}, streaming=streaming)
    for one in (source, by_place):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: the schema names column 'p' twice; give each"):
            group_files(one) if streaming else load(one, tmp_path / "c")
    if not streaming:
        assert load(Source(str(path), PAIR), tmp_path / "c")[0] == {"anchor": "w", "positive": "x"}


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".parquet.gz"])
def test_a_table_with_damage_behind_its_first_rows_is_named(kind: str, tmp_path: Path) -> None:
    """Arrow opens the file, for the schema is whole; the rows of its first part are read."""
    frame = pd.DataFrame({"a": [f"left {number}" for number in range(4000)], "b": "y"})
    path = tmp_path / f"x{kind}"
    if kind == ".arrow":
        with pa.ipc.new_stream(str(path), pa.Table.from_pandas(frame).schema) as writer:
            writer.write_table(pa.Table.from_pandas(frame), max_chunksize=2000)
        path.write_bytes(path.read_bytes()[:-20_000])
        where, cause = "cannot be read as arrow behind row 2,000: ", "bytes"
    elif kind == ".parquet":
        frame.to_parquet(path, row_group_size=2000)
        place = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
        content = bytearray(path.read_bytes())
        content[place + 40 : place + 4000] = b"\xff" * 3960
        path.write_bytes(content)
        where, cause = "cannot be read as parquet behind row 2,000: ", "snappy"
    else:
        path = Path(save_as(frame, tmp_path, kind))
        path.write_bytes(path.read_bytes()[:-100])
        where, cause = "gzip data cut short or damaged (", "end-of-stream"
    message = failure(Source(str(path), PAIR, on_bad_row="skip"), tmp_path / "c")
    assert message.startswith(f"{path}: {where}")
    assert message.endswith("; fetch the file again")
    assert cause in message
    assert "\n" not in message


def test_skipping_ends_at_the_budget(tmp_path: Path) -> None:
    bad = [{"a": "", "b": "y"}] * 7
    path = write_lines(tmp_path / "x.jsonl", good(), *bad, good())
    message = failure(Source(path, PAIR, on_bad_row="skip", max_bad_rows=6), tmp_path / "c")
    assert message.splitlines()[:5] == [f"{path}:{n}: column 'a' is empty" for n in range(2, 7)]
    assert message.splitlines()[5] == f"{path}: 7 bad rows, over max_bad_rows 6; mend them"
    within = Source(path, PAIR, on_bad_row="skip", max_bad_rows=7)
    assert len(load(within, tmp_path / "c")) == 2
    assert num_skipped(within, tmp_path / "c") == 7
    # The cache of a lenient run must not let a strict one pass.
    with pytest.raises(ValueError, match="7 bad rows"):
        load(Source(path, PAIR), tmp_path / "c")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("mode", ["fail", "skip"])
def test_scores_on_another_scale_lead_to_score_range(suffix: str, mode: Any, tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [f"x {n}" for n in range(300)], "b": "y", "score": [n % 11 / 2 for n in range(300)]})
    path = save_as(frame, tmp_path, suffix)
    message = failure(Source(path, SCORED, score_range=(0, 1), on_bad_row=mode), tmp_path / "c")
    assert re.search(
        rf"{re.escape(path)}: 216 bad rows[;,] .*If the scores go from 0 to 5, set score_range: \[0, 5\]$", message
    )
    load(Source(path, SCORED, score_range=(0, 5)), tmp_path / "c")


def test_truncated_gzip_is_refused_even_when_skipping(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    rng = np.random.default_rng(0)
    write_lines(path, *({"a": str(rng.integers(1 << 62)), "b": "y"} for _ in range(2000)))
    path.write_bytes(path.read_bytes()[:-2000])
    for mode in ("fail", "skip"):
        message = failure(Source(str(path), PAIR, on_bad_row=mode), tmp_path / "c")
        assert message.startswith(f"{path}:")
        # The first line that zlib alone does not give back whole.
        known = zlib.decompressobj(wbits=31).decompress(path.read_bytes()).count(b"\n")
        assert int(message.split(":")[1]) in (known + 1, known + 2), message
        assert "gzip data cut short or damaged" in message


@pytest.mark.parametrize("kind", [".jsonl.gz", ".csv.gz", ".parquet.gz"])
def test_a_file_that_is_only_called_gz_says_so(kind: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": ["x"], "b": ["y"]})
    plain = Path(save_as(frame, tmp_path, kind.removesuffix(".gz")))
    path = plain.rename(tmp_path / f"called{kind}")
    message = failure(Source(str(path), PAIR, on_bad_row="skip"), tmp_path / "c")
    assert message.startswith(f"{path}: its name ends in .gz, but gzip did not write it (Not a gzipped file (b")
    assert "take .gz off its name if it is not compressed" in message
    load(Source(str(path.rename(plain)), PAIR), tmp_path / "c")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("score", [1e39, -1e39])
@pytest.mark.parametrize("bad_row", [1, 20_000])  # read row by row, and in a block
def test_a_score_that_float32_cannot_hold_is_a_bad_row(suffix: str, score: float, bad_row: int, tmp_path: Path) -> None:
    scores = [float(np.finfo(np.float32).max)] * (bad_row + 1)
    frame = pd.DataFrame({"a": "x", "b": "y", "score": scores})
    assert np.isfinite(load(Source(save_as(frame, tmp_path, suffix), SCORED), tmp_path / "c")["score"][:]).all()
    frame.loc[bad_row, "score"] = score
    path = save_as(frame, tmp_path, suffix)
    message = failure(Source(path, SCORED), tmp_path / "refused")
    assert f"column 'score' is {score:g}, but scores are float32, at most 3.40282e+38; set score_range" in message
    assert "1 bad row" in message
    assert load(Source(path, SCORED, score_range=(-1e39, 1e39)), tmp_path / "c")["score"][-1] in (0, 1)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".parquet", ".arrow", "-saved"])
def test_a_missing_column_names_the_found_ones_and_the_nearest(kind: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"sentence1": ["x"], "sentence2": ["y"], "score": [1.0]})
    source = Source(save_as(frame, tmp_path, kind), {"anchor": "sentence1", "positive": "sentense2"})
    message = failure(source, tmp_path / "c")
    assert message.startswith(str(tmp_path / "rows"))
    assert "no column 'sentense2' (columns.positive); found: sentence1, sentence2, score." in message
    assert message.endswith("Did you mean 'sentence2'?")


def test_a_missing_column_of_json_lines_is_told_from_the_first_rows(tmp_path: Path) -> None:
    """Of a file that is whole only that far: nobody waits for the rest of it to be unpacked."""
    path = tmp_path / "x.jsonl.gz"
    packed = gzip.compress(
        b"".join(json.dumps({"left": f"{i} {i**9}", "right": "y"}).encode() + b"\n" for i in range(50_000))
    )
    path.write_bytes(packed[: len(packed) // 2])
    columns: dict[str, int | str] = {"anchor": "lefft", "positive": "right"}
    assert "no column 'lefft' (columns.anchor); found: left, right" in failure(
        Source(str(path), columns), tmp_path / "c"
    )
    for reason in ({"on_bad_row": "skip"}, {"where": {"left": "0 0"}}):  # a later row may have it
        assert "cut short" in failure(Source(str(path), columns, **reason), tmp_path / "c")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "separator", "columns", "remedy"),
    [
        ("x.csv", ";", PAIR, "found: a;b;c. The file seems to be separated by ';'; save it with commas, or as JSON"),
        ("x.csv", ";", {"anchor": 0, "positive": 1}, "there are 1, 0 to 0: a;b;c. The file seems to be separated"),
        ("x.tsv", ";", PAIR, "separated by ';'; save it with tabs"),
        ("x.csv", "\t", PAIR, "separated by tabs; give it the suffix .tsv"),
        ("x.csv.gz", "\t", PAIR | {"group": "c"}, "separated by tabs; give it the suffix .tsv"),
        ("x.tsv", ",", PAIR, "separated by commas; give it the suffix .csv"),
    ],
)
def test_another_separator_is_named_with_its_remedy(
    name: str, separator: str, columns: dict, remedy: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    text = f"a{separator}b{separator}c\nx{separator}y{separator}z\n".encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    message = failure(Source(str(path), columns), tmp_path / "c")
    assert message.startswith(f"{path}: no column ")
    assert remedy in message
    assert "Did you mean" not in message


def test_missing_files_and_formats_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "train.jsonl.gz", good())
    cache = tmp_path / "c"
    path = tmp_path / "trian.jsonl.gz"
    assert failure(Source(str(path), PAIR), cache) == f"{path}: no such file or folder. Did you mean 'train.jsonl.gz'?"
    path = tmp_path / "nowhere" / "deep" / "x.jsonl"
    assert failure(Source(str(path), PAIR), cache) == f"{path}: there is no folder {tmp_path / 'nowhere'}."
    assert "no file matches this pattern" in failure(Source(str(tmp_path / "*.csv"), PAIR), cache)
    assert failure(Source("", PAIR), cache) == "path is empty; name a file, a glob, a folder or a data set of the hub"
    monkeypatch.chdir(tmp_path)  # a path of nothing would be this folder
    search = {"columns": {}, "name": "s", "evaluator": InformationRetrieval()}
    for key, paths in {"path": {"path": " "}, "qrels": {"path": "q", "corpus": "c", "qrels": ""}}.items():
        with pytest.raises(ValueError, match=f"^s: {key} is empty; name a file, a glob, a folder or a data set of"):
            find_parts(EvalSource(**search, **paths))
    for path in ("s3://bucket/pairs.parquet", "gs://bucket/*.jsonl.gz"):
        said = failure(Source(path, PAIR), cache)
        assert said.startswith(f"{path}: an address is read by a source of data.train with streaming: true alone; set")
    (tmp_path / "x.txt").touch()
    assert "unknown format '.txt'; known are .jsonl" in failure(Source(str(tmp_path / "x.txt"), PAIR), cache)
    (tmp_path / "none").mkdir()
    assert "the folder holds no data file" in failure(Source(str(tmp_path / "none"), PAIR), cache)
    (tmp_path / "x.parquet").write_bytes(b"PAR0")
    assert "x.parquet: cannot be read as parquet" in failure(Source(str(tmp_path / "x.parquet"), PAIR), cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    message = failure(Source("nobody/nothing-2f", PAIR), cache)
    assert "nobody/nothing-2f: neither a file or folder here nor a hub data set that can be read" in message


@pytest.mark.parametrize("content", ['{"_data_fil', "", "{}", "[]", '{"_data_files": null, "splits": null}'])
@pytest.mark.parametrize(("kind", "name"), [("-saved", "state.json"), ("-splits", "dataset_dict.json")])
def test_a_damaged_list_of_files_is_named_with_its_remedy(kind: str, name: str, content: str, tmp_path: Path) -> None:
    folder = Path(save_as(FRAME, tmp_path, kind))
    (folder / name).write_text(content)
    message = failure(Source(str(folder), SCORED, score_range=(0, 5)), tmp_path / "c")
    assert message.startswith(f"{folder / name} is not what save_to_disk writes (")
    assert message.endswith("): save the data set again, or name its .arrow files in path")
    files = folder / ("train" if kind == "-splits" else "") / "*.arrow"
    rows = load(Source(str(files), SCORED, score_range=(0, 5)), tmp_path / "c")
    assert rows["anchor"][:] == FRAME.a.tolist()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b"\n\n"),
        ("x.jsonl.gz", b""),
        ("x.csv", b"a,b\n"),
        ("x.csv", b""),
        ("x.tsv", b""),
        ("x.csv.gz", b""),
        ("x.parquet", None),
    ],
)
def test_a_set_without_rows_is_refused(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is None:
        FRAME.head(0).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    assert failure(Source(str(path), PAIR), tmp_path / "c") == f"{path}: there is no row"


def test_a_set_of_bad_rows_only_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"a": "", "b": "y"})
    message = failure(Source(path, PAIR, on_bad_row="skip"), tmp_path / "c")
    assert "there is no row left after 1 bad ones were skipped" in message


def test_a_line_without_end_is_refused_before_memory_is_full(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl.gz", good(), b"x" * (20 << 20))
    assert failure(Source(path, PAIR), tmp_path / "c").startswith(f"{path}:2: a line over 16,777,216 bytes")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_file_that_is_no_text_of_lines_is_named_with_its_remedy(suffix: str, tmp_path: Path) -> None:
    separator = "\t" if suffix == ".tsv" else ","
    text = '{"a": "x", "b": "y"}\n' * 2 if suffix == ".jsonl" else f"a{separator}b\nx{separator}y\n"
    packed = io.BytesIO()
    pd.DataFrame({"a": ["x"], "b": ["y"]}).to_parquet(packed)
    for content, cause in (
        (text.encode("utf-16"), "is UTF-16, not UTF-8; convert it with `iconv -f UTF-16 -t UTF-8`"),
        (text.encode("utf-16-le"), "is UTF-16, not UTF-8; convert it with `iconv -f UTF-16LE -t UTF-8`"),
        (text.encode("utf-16-be"), "is UTF-16, not UTF-8; convert it with `iconv -f UTF-16BE -t UTF-8`"),
        (
            text.replace("\n", "\r").encode(),
            r"its lines end with a carriage return alone; convert it with `tr '\r' '\n'`",
        ),
        (gzip.compress(text.encode()), "holds what a .gz file holds; rename it so that its name ends in .gz"),
        (packed.getvalue(), "holds what a .parquet file holds; rename it so that its name ends in .parquet"),
    ):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(content)
        assert failure(Source(str(path), PAIR, on_bad_row="skip"), tmp_path / "c") == f"{path}: {cause}"


def test_other_shapes_of_json_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(good(), indent=1) + "\n" + json.dumps(good(), indent=1))
    message = failure(Source(str(tmp_path / "x.jsonl"), PAIR), tmp_path / "c")
    assert "x.jsonl: has a JSON object over many lines, not one per line; convert it with `jq -c .`, or" in message
    for text in (
        json.dumps([good(), good()], indent=1),
        json.dumps([good(), good()]),
        json.dumps([good() | {"a": "x" * 900_000}] * 20),  # a line over what is read as one
    ):
        (tmp_path / "y.json").write_text(text)
        message = failure(Source(str(tmp_path / "y.json"), PAIR, on_bad_row="skip"), tmp_path / "c")
        assert message.endswith("y.json: is one JSON document, not one object per line; convert it with `jq -c '.[]'`")
    (tmp_path / "z.jsonl").write_text('["x", "y"]\n{"a": "x", "b": "y"}\n')
    message = failure(Source(str(tmp_path / "z.jsonl"), PAIR), tmp_path / "c")
    assert "z.jsonl:1: a JSON object is expected, not list" in message


def test_names_of_the_data_as_keys_of_columns() -> None:
    """The other way round than they are meant; what is far from every key of ours is not guessed."""
    with pytest.raises(ValueError, match=r"values are columns of the data: write anchor: Question$"):
        Source("x", {"Question": "Question", "positive": "b"})
    with pytest.raises(ValueError, match=r"values are columns of the data: write positive: sentence2$"):
        Source("x", {"anchor": "sentence1", "sentence2": "sentence2"})
    for far in ("sentence_1", "context", "output", "is_duplicate"):
        with pytest.raises(ValueError, match=r"score_1, \.\.\., group, id\.$"):
            Source("x", {far: "a", "positive": "b"})


LABELLED = {"text": "t", "label": "y"}


def test_words_as_labels_show_the_label_map_to_write(tmp_path: Path) -> None:
    rows = [{"t": "x", "y": word} for word in ["neutral", "entailment", "no", "entailment"]]
    path = write_lines(tmp_path / "x.jsonl", *rows)
    message = failure(Source(path, LABELLED, on_bad_row="skip"), tmp_path / "c")
    assert "column 'y' holds words: entailment, neutral, no." in message
    # The shown map works as it stands: 'no' is quoted, for YAML would read a truth value.
    assert message.endswith("label_map: {entailment: 0, neutral: 1, 'no': 2}")
    label_map = {"entailment": 0.0, "neutral": 1.0, "no": 2.0}
    labels = load(Source(path, LABELLED, label_map=label_map), tmp_path / "c").data.column("label").to_numpy()
    assert labels.dtype == np.int64
    assert labels.tolist() == [1, 0, 2, 0]
    message = failure(Source(path, {"text": "t", "score": "y"}), tmp_path / "c2")
    assert "Map them to scores, with numbers of your own: label_map: {entailment: 0.0" in message


def test_many_words_as_labels_show_their_whole_label_map(tmp_path: Path) -> None:
    """Intents are often some hundreds; what is shown is YAML, and is taken as it stands."""
    rows = [{"t": "x", "y": f"intent {number:03}"} for number in range(300)]
    path = write_lines(tmp_path / "x.jsonl", *rows)
    message = failure(Source(path, LABELLED), tmp_path / "c")
    assert "column 'y' holds 300 different words. Map them to class numbers: label_map: {intent 000: 0, " in message
    shown = yaml.safe_load(message.partition("numbers: ")[2])["label_map"]
    labels = load(Source(path, LABELLED, label_map=shown), tmp_path / "c").data.column("label").to_numpy()
    assert labels.tolist() == list(range(300))
    path = write_lines(tmp_path / "y.jsonl", *({"t": "x", "y": f"word{number:04}"} for number in range(600)))
    message = failure(Source(path, LABELLED), tmp_path / "c2")
    assert "holds 600 different words" in message
    assert message.endswith("label_map: {word0000: 0, word0001: 1, word0002: 2, word0003: 3, word0004: 4, ...}")


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("score", [0.5, 0.25], "holds a list, not a number; if it has one of each candidate, write score_1: y.0, "),
        ("score", "1,5", "is '1,5' with a decimal comma; write 1.5"),
        ("label", "1,5", "is '1,5' with a decimal comma; write 1.5"),
        ("label", 0.5, "is 0.5, not a whole class number; if it is a degree, name the column score"),
    ],
)
def test_a_target_of_another_kind_says_what_to_write(key: str, value: object, cause: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"t": "x", "y": value}, {"t": "z", "y": value})
    assert failure(Source(path, {"text": "t", key: "y"}), tmp_path / "c").startswith(f"{path}:1: column 'y' {cause}")


def test_a_value_outside_the_label_map_is_a_bad_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"t": "x", "y": "yes"}, {"t": "x", "y": "maybe"})
    message = failure(Source(path, LABELLED, label_map={"yes": 1, "no": 0}), tmp_path / "c")
    assert message.startswith(f"{path}:2: column 'y' is 'maybe', which is not in label_map (yes, no)")


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (1.5, "is 1.5, not a whole class number"),
        (-1, "is -1, classes are numbered"),
        ("?", "is '?', not a number"),
        ("1_2", "is '1_2', not a number"),  # no twelve, whatever a literal of Python means
    ],
)
def test_labels_that_are_no_class_are_bad_rows(value: object, cause: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"t": "x", "y": 0}, {"t": "x", "y": 1}, {"t": "x", "y": value})
    message = failure(Source(path, LABELLED), tmp_path / "c")
    assert message.startswith(f"{path}:3: column 'y' {cause}")


def test_a_hub_data_set_is_read_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself cannot be reached in tests: what it would give is put in its place."""
    asked = []
    features = Features({"t": Value("string"), "y": ClassLabel(names=["bad", "good"]), "other": Value("int8")})
    rows = Dataset.from_dict({"t": ["x", "", "z"] * 800, "y": [1, 0, 1] * 800, "other": [0] * 2400}, features)

    def load_dataset(path: str, **where: object) -> Dataset:
        asked.append((path, where))
        return rows

    monkeypatch.setattr(loading, "load_dataset", load_dataset)
    source = Source("someone/something", LABELLED, label_map={"good": 7}, split="dev", subset="en", revision="v1")
    message = failure(source, tmp_path / "c")
    assert asked == [("someone/something", {"name": "en", "split": "dev", "revision": "v1"})]
    assert message.startswith("someone/something: row 2: column 't' is empty\n")
    source.on_bad_row, source.max_bad_rows, source.label_map = "skip", 800, {"good": 7.0, "bad": 8.0}
    assert load(source, tmp_path / "c")[:3] == {"text": ["x", "z", "x"], "label": [7, 7, 7]}


def test_label_map_takes_words_numbers_truth_values_and_class_names(tmp_path: Path) -> None:
    def scores(values: list[object], label_map: dict[str, float], **spec: object) -> list[float]:
        path = write_lines(tmp_path / "x.jsonl", *({"t": "x", "y": value} for value in values))
        source = Source(path, {"text": "t", "score": "y"}, label_map=label_map, **spec)
        return load(source, tmp_path / "c")["score"][:]

    assert scores(["e", "n"], {"e": 1.0, "n": 0.5}) == [1.0, 0.5]
    assert scores([2, 1.0, "2"], {"1": 0.25, "2": 0.75}) == [0.75, 0.25, 0.75]
    assert scores([True, False], {"true": 1, "false": 0}) == [1.0, 0.0]
    assert scores(["low", "high"], {"low": 1, "high": 5}, score_range=(1, 5)) == [0.0, 1.0]

    features = Features({"t": Value("string"), "y": ClassLabel(names=["entailment", "neutral"])})
    Dataset.from_dict({"t": ["x", "z"], "y": [1, 0]}, features).save_to_disk(str(tmp_path / "saved"))
    source = Source(str(tmp_path / "saved"), {"text": "t", "score": "y"}, label_map={"entailment": 1, "neutral": 0.5})
    assert load(source, tmp_path / "c")["score"][:] == [0.5, 1.0]
    assert load(Source(str(tmp_path / "saved"), LABELLED), tmp_path / "c")["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"columns": {"anchr": "a", "positive": "b"}}, r"columns has 'anchr'.*Did you mean 'anchor'\?"),
        ({"columns": {"anchor": "a"}}, "either text, or anchor and positive"),
        ({"columns": {"text": "t", "anchor": "a", "positive": "b"}}, "either text, or anchor and positive"),
        ({"columns": {"score": "s"}}, "it names score"),
        ({"columns": SCORED, "score_range": (5, 0)}, r"score_range is 5..0; write \[lowest, highest\]"),
        ({"columns": PAIR, "label_map": {"x": 1}}, "label_map needs entries, and a score or a label"),
        (
            {"columns": LABELLED, "label_map": {"x": 0.5}},
            "label_map gives 'x' the number 0.5; a label is a class",
        ),
        (
            {"columns": LABELLED, "label_map": {False: 0}},
            "label_map has the truth value false as a key.*quote it",
        ),
        ({"columns": PAIR, "max_bad_rows": -1}, "max_bad_rows is -1"),
        (
            {"columns": {"anchor": "q", "positives": "p", "negative": "n", "score_1": "s.0", "score_2": "t"}},
            "x.jsonl: score_1 does not go with positives.*write a row for each positive, with its score and",
        ),
        (
            {"columns": {"anchor": "q", "positives": "p", "label": "l"}},
            "x.jsonl: label does not go with positives, for that of a row would stand beside each.*its label and",
        ),
        ({"columns": {"anchor": "q", "positives": "p", "score": "s"}}, "score does not go with positives.*its score"),
        (
            {"columns": LABELLED, "score_range": (0, 5)},
            r"score_range maps the column score, which columns lacks; it has .*label: leave score_range out, or map sc",
        ),
        (
            {"columns": {**PAIR, "negative": "n", "score_1": "s.0", "score_2": "s.1"}, "score_range": (0, 5)},
            "which columns lacks, and score_1, ... are left on the teacher's scale; it has",
        ),
        (
            {"columns": {**PAIR, "negative_1": "n", "negative_2": "m"}, "max_negatives": 1},
            "max_negatives is 1, which counts texts of the list negatives, and columns has .*negative_2: leave it out",
        ),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source("x.jsonl", **spec)


def test_fingerprint_follows_content_and_spec_not_place(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = Source(write_lines(tmp_path / "x.jsonl", good()), SCORED)
    moved = Source(write_lines(tmp_path / "other" / "z.jsonl", good()), SCORED)
    assert fingerprint(first) == fingerprint(moved)
    assert fingerprint(first) == fingerprint(EvalSource(first.path, SCORED, name="dev"))
    variants = [
        Source(first.path, PAIR),
        Source(first.path, SCORED | {"anchor": "b"}),
        Source(first.path, SCORED, score_range=(0, 5)),
        Source(first.path, SCORED, on_bad_row="skip"),
        Source(write_lines(tmp_path / "y.jsonl", good(1)), SCORED),
        Source(write_lines(tmp_path / "y.csv", good()), SCORED),  # the same bytes read in another way
    ]
    assert len({fingerprint(source) for source in [first, *variants]}) == 1 + len(variants)
    before = fingerprint(first)
    write_lines(tmp_path / "x.jsonl", good(), good(1))
    assert fingerprint(first) != before, "the file changed"


def _count_rows(path: str, cache_dir: Path) -> int:
    return len(load(Source(path, PAIR), cache_dir))


def test_processes_that_start_together_build_one_cache(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", *(good(n) for n in range(3000)))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.starmap(_count_rows, [(path, tmp_path / "c")] * 4) == [3000] * 4
    assert len([p for p in (tmp_path / "c" / "rows").iterdir() if p.is_dir()]) == 1


def test_a_build_that_was_killed_is_done_again(tmp_path: Path) -> None:
    source = Source(write_lines(tmp_path / "x.jsonl", good()), PAIR)
    unfinished = tmp_path / "c" / "rows" / f"{fingerprint(source)}.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "rows.arrow").write_bytes(b"half")
    assert len(load(source, tmp_path / "c")) == 1
    assert not unfinished.exists()


def test_real_data_has_the_rows_pandas_reads(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "sts" / "korsts.dev.jsonl.gz"
    columns = {"anchor": "sentence1", "positive": "sentence2", "score": "score"}
    rows = load(Source(str(path), columns, score_range=(0, 5)), tmp_path)
    frame = pd.read_json(path, lines=True)
    assert rows["anchor"][:] == frame.sentence1.tolist()
    assert rows["positive"][:] == frame.sentence2.tolist()
    np.testing.assert_allclose(rows["score"][:], frame.score / 5, rtol=1e-6)


ODD_LINES = [
    *(line for line, _ in BAD_LINES.values()),
    b"\n",
    b'{"a": "two", "b": "in", "score": 1} {"a": "a", "b": "line", "score": 2}\n',
    b'{"a": "over",\n"b": "two lines", "score": 1}\n',
    b'{"a": "x", "a": "twice", "b": "y", "score": 1}\n',
    b'{"a": "cr", "b": "lf", "score": 1}\r\n',
    b'{"a": "2024-05-01 10:00:00", "b": "nul \\u0000 \\ud83d\\ude00 \\/", "score": 1e-3, "z": {"deep": [1, {}]}}\n',
    b'{"a": "x", "b": "y", "score": true}\n',
    b'{"a": "x", "b": "y", "score": "1.5"}\n',
    b'{"a": "x", "b": "y", "score": 1e999}\n',
    b'{"a": "x", "b": "y", "score": 00}\n',
    *(json.dumps({"a": chr(c), "b": "a space of its kind", "score": 1}).encode() + b"\n" for c in [0x1C, 0x85, 0x2003]),
    json.dumps({"a": "\u200b", "b": "no space", "score": 1}).encode() + b"\n",
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_blocks_give_the_rows_and_the_places_that_lines_give(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good blocks, blocks with a bad row and blank lines take turns; line by line reading is the outside truth."""
    lines = [json.dumps(good(n)).encode() + b"\n" for n in range(3000)]
    for i, odd in enumerate(ODD_LINES):
        lines.insert(150 + 97 * i, odd)
    path = write_lines(tmp_path / f"x{suffix}", *lines[:-1], lines[-1].rstrip())
    source = Source(path, SCORED, score_range=(0, 5), on_bad_row="skip")
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 2000)
    accepted: list[int] = []
    parse = json_lines._parse

    def counted(*args: Any) -> Any:
        batch = parse(*args)
        accepted.append(0 if batch is None else len(batch))
        return batch

    monkeypatch.setattr(json_lines, "_parse", counted)
    by_blocks = load(source, tmp_path / "blocks")
    assert sum(accepted) > 1500, "Arrow read next to nothing"
    assert accepted.count(0) > 10, "no block was left to the general way"
    monkeypatch.setattr(json_lines, "_types", lambda source, head: None)
    by_lines = load(source, tmp_path / "lines")
    assert by_blocks[:] == by_lines[:]
    assert num_skipped(source, tmp_path / "blocks") == num_skipped(source, tmp_path / "lines") > 15
    strict = Source(path, SCORED, score_range=(0, 5))
    messages = [failure(strict, tmp_path / "strict lines")]
    monkeypatch.undo()
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 2000)
    messages.append(failure(strict, tmp_path / "strict blocks"))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{path}:151: ")


def test_label_maps_and_class_numbers_are_read_in_blocks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 2000)
    data = [{"t": f"text {n}", "word": "ab"[n % 2], "number": n % 7, "half": n / 2} for n in range(900)]
    path = write_lines(tmp_path / "x.jsonl", *data)
    mapped = load(Source(path, {"text": "t", "score": "word"}, label_map={"a": 0.25, "b": 1}), tmp_path / "c")
    assert mapped["score"][:] == [0.25, 1.0] * 450
    assert load(Source(path, {"text": "t", "label": "number"}), tmp_path / "c")["label"][:] == [
        n % 7 for n in range(900)
    ]
    message = failure(Source(path, {"text": "t", "score": "word"}, label_map={"a": 1, "c": 2}), tmp_path / "d")
    assert message.startswith(f"{path}:2: column 'word' is 'b', which is not in label_map (a, c)")
    message = failure(Source(path, {"text": "t", "label": "half"}), tmp_path / "d")
    assert message.startswith(f"{path}:2: column 'half' is 0.5, not a whole class number")
    message = failure(Source(path, {"text": "t", "score": "half"}, score_range=(0, 400)), tmp_path / "d")
    assert message.startswith(f"{path}:802: column 'half' is 400.5, outside score_range 0..400")


def test_arrow_calls_blank_what_the_check_of_a_text_calls_blank() -> None:
    """Each character alone: all white space, and what Unicode says to ignore in display and to be no wider than 0."""
    texts = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    found = pc.match_substring_regex(pa.array(texts), blocks._BLANK).to_pylist()
    invisible = set("\u180e\u200b\u200c\u200d\u200e\u200f\u2060\ufeff")
    blank = [t for t in texts if t.isspace() or t in invisible]
    assert [t for t, is_blank in zip(texts, found, strict=True) if is_blank] == blank
    for text in blank:
        with pytest.raises(BadValueError, match="is blank"):
            check_text(text)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("num_before", [0, 200])
def test_a_text_that_no_one_sees_is_blank(num_before: int, suffix: str, tmp_path: Path) -> None:
    """In the first rows and in a block; a joiner inside a text is none of ours."""
    rows = [{"a": f"x{i}", "b": "नमस्\u200dते"} for i in range(num_before)] + [{"a": "x", "b": " \u200b\ufeff"}]
    path = save_as(pd.DataFrame(rows), tmp_path, suffix)
    line = num_before + (1 if suffix == ".jsonl" else 2)
    message = failure(Source(path, {"anchor": "a", "positive": "b"}), tmp_path / "c")
    assert f"{path}:{line}: column 'b' is blank: all its characters are zero-width" in message
    assert "1 bad row;" in message
