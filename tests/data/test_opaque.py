"""Streams without an index: every reader gets its own rows, and goes on exactly where a checkpoint says."""

from __future__ import annotations

import gzip
import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import fsspec
import pytest
from datasets import load_dataset

from trainer.data import opaque
from trainer.data import rows as files_of_rows
from trainer.data.hashes import NO_TEXT
from trainer.data.loading import fingerprint, load
from trainer.data.module import PairData
from trainer.data.opaque import OpaqueBatches, OpaqueStream, Reader
from trainer.data.rowgroups import StreamError
from trainer.data.sources import Source
from trainer.data.steps import StepLoader, StepSampler
from trainer.data.workers import worker_context
from trainer.encoder import EncoderSpec
from trainer.encoder.text import TextPreparation, load_text_preparation

COLUMNS = {"anchor": "a", "positive": "b", "score": "s"}
NUM_ROWS = 230


@pytest.fixture(scope="module")
def text(tiny_encoder: Path) -> TextPreparation:
    return load_text_preparation(EncoderSpec(str(tiny_encoder), max_length=32))


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opaque, "BUFFER_ROWS", 16)


def write(folder: Path, num_files: int = 1, kind: str = "jsonl.gz") -> Source:
    """The score of a row is its number."""
    folder.mkdir(exist_ok=True)
    for number in range(num_files):
        rows = range(number * NUM_ROWS // num_files, (number + 1) * NUM_ROWS // num_files)
        path = folder / f"part-{number}.{kind}"
        if kind == "jsonl.gz":
            with gzip.open(path, "wt") as file:
                file.writelines(
                    json.dumps({"a": f"row {i}", "b": "the cat " * (1 + i % 5), "s": i}) + "\n" for i in rows
                )
        else:
            tab = "\t" if kind == "tsv" else ","
            lines = [tab.join(("a", "b", "s")), *(tab.join((f"row {i}", "NA", str(i))) for i in rows)]
            path.write_text("\n".join(lines) + "\n")
    return Source(str(folder), COLUMNS, streaming=True)


@pytest.mark.parametrize(("num_files", "num_readers"), [(1, 1), (1, 3), (4, 2), (4, 3)])
def test_readers_share_out_the_rows_of_a_pass(
    num_files: int, num_readers: int, small_buffers: None, text: TextPreparation, tmp_path: Path
) -> None:
    """Each row once in a pass, by file where files divide, else by row; then in another order."""
    stream = OpaqueStream(write(tmp_path / "set", num_files), text, seed=3)
    passes: list[list[list[float]]] = [[], []]
    for number in range(num_readers):
        reader = Reader(stream, number, num_readers)
        own: list[list[float]] = [[], []]
        while reader.position["pass"] < 2:
            columns, targets, *_ = reader.take(1)
            if reader.position["pass"] < 2:
                own[reader.position["pass"]] += targets["score"].tolist()
                assert columns[0][0].tolist() == text([f"row {int(targets['score'][0])}"])[0]
        for seen, rows in zip(passes, own, strict=True):
            seen.append(rows)
        assert sorted(own[0]) == sorted(own[1])
        assert own[0] != own[1] != sorted(own[1]), "each pass has a shuffle of its own"
    for seen in passes:
        assert sorted(row for rows in seen for row in rows) == list(range(NUM_ROWS))


@pytest.mark.parametrize(("num_files", "num_readers"), [(1, 1), (1, 2), (4, 2), (3, 2)])
def test_a_position_gives_the_rows_of_a_reader_never_stopped(
    num_files: int, num_readers: int, small_buffers: None, text: TextPreparation, tmp_path: Path
) -> None:
    """From places in the first buffer, at its end, in the last one and in the second pass; positions are plain."""
    stream = OpaqueStream(write(tmp_path / "set", num_files), text, seed=3)
    whole = Reader(stream, num_readers - 1, num_readers)
    positions, rows = [], []
    for _ in range(60):
        positions.append(json.loads(json.dumps(whole.position)))
        rows.append(whole.take(7)[1]["score"].tolist())
    assert whole.position["pass"] >= 1
    for step in (0, 1, 2, 3, 13, 16, 17, 32, 33, 50):
        again = Reader(stream, num_readers - 1, num_readers, positions[step])
        assert [again.take(7)[1]["score"].tolist() for _ in range(4)] == rows[step : step + 4], step


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_tables_of_text(kind: str, text: TextPreparation, tmp_path: Path) -> None:
    """The word NA is a text."""
    columns, targets, _, numbers = Reader(OpaqueStream(write(tmp_path / "set", kind=kind), text, 0), 0, 1).take(
        NUM_ROWS
    )
    assert sorted(targets["score"]) == list(range(NUM_ROWS))
    assert numbers.tolist() == targets["score"].tolist()
    assert [ids.tolist() for ids in columns[1]] == text(["NA"] * NUM_ROWS)
    cut = OpaqueStream(write(tmp_path / "set", kind=kind), replace(text, max_lengths={"anchor": 3}), 0)
    short, whole = Reader(cut, 0, 1).take(NUM_ROWS)[0]
    assert {len(ids) for ids in short} == {3}
    assert min(len(ids) for ids in columns[0]) > 3
    assert [ids.tolist() for ids in whole] == [ids.tolist() for ids in columns[1]]


# What is written in a cell, and the text that it means: `datasets` joins lines, guesses types and skips columns here.
CELLS = {
    "csv": [
        ("007", "007"),
        ("1e3", "1e3"),
        ('"a comma, a\nline, a ""word"""', 'a comma, a\nline, a "word"'),
        ("NA", "NA"),
    ],
    "tsv": [('"it starts', '"it starts'), ("true", "true"), ('it ends"', 'it ends"'), ('"one\tcell"', "one\tcell")],
}


@pytest.mark.parametrize("kind", ["csv", "tsv", "tsv.gz"])
def test_a_stream_of_cells_has_the_rows_of_loading_it(kind: str, text: TextPreparation, tmp_path: Path) -> None:
    """Of two files, whose columns have other orders and whose lines other ends; the last line is empty."""
    (tmp_path / "set").mkdir()
    cells = CELLS[kind[:3]]
    separator = "," if kind == "csv" else "\t"
    for number, names in enumerate(["absy", "ysab"]):
        lines = [list(names)]
        for place, (written, _) in enumerate(cells):
            row = {"a": f"00{number}", "b": written, "s": f"{place}.50", "y": f"0{place}"}
            lines.append([row[name] for name in names])
        content = ("\r\n" if number else "\n").join([*map(separator.join, lines), "", ""]).encode()
        path = tmp_path / "set" / f"{number}.{kind}"
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    source = Source(str(tmp_path / "set"), {**COLUMNS, "label": "y"})
    loaded = load(source, tmp_path / "cache")
    assert loaded["positive"][:] == [meant for _, meant in cells] * 2

    reader = Reader(OpaqueStream(replace(source, streaming=True), text, 0), 0, 1)
    columns, targets, _, numbers = reader.take(len(loaded))
    assert reader.position["pass"] == 0
    reader.take(1)
    assert reader.position["pass"] == 1, "a pass has more rows"
    order = numbers.argsort()
    for ids, name in zip(columns, ("anchor", "positive"), strict=True):
        assert [ids[place].tolist() for place in order] == text(loaded[name][:])
    assert targets["score"][order].tolist() == loaded["score"][:] == [0.5, 1.5, 2.5, 3.5] * 2
    assert targets["label"][order].tolist() == loaded["label"][:] == [0, 1, 2, 3] * 2


def test_a_bad_cell_of_a_stream_is_named_by_its_line(text: TextPreparation, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('a,b\nx,"two\nlines"\nx,y,z\n')
    with pytest.raises(ValueError, match=r"x.csv:4: 3 cells, the header has 2\n.*1 bad row among those just read"):
        Reader(OpaqueStream(Source(str(path), {"anchor": "a", "positive": "b"}, streaming=True), text, 0), 0, 1)


@pytest.mark.parametrize("num_readers", [1, 2])
def test_bad_json_lines_of_a_stream_are_named_as_loading_names_them(
    num_readers: int, small_buffers: None, text: TextPreparation, tmp_path: Path
) -> None:
    good = b"".join(b'{"a": "row %d", "b": "y"}\n' % number for number in range(40))
    path = tmp_path / "x.jsonl"
    source = Source(str(path), {"anchor": "a", "positive": "b"}, streaming=True)
    for content in (
        good + b'{"a": "x\xff", "b": "y"}\n',
        good + b'{"a": "x", "b":\n',
        good + b'{"a": "x", "b": "y"}{"a": "z", "b": "y"}\n',  # two in a line
        b'[{"a": "x", "b": "y"}]',
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.jsonl(:41)?: .*") as loaded:
            load(replace(source, streaming=False), tmp_path / "cache")
        with pytest.raises(StreamError) as streamed:
            Reader(OpaqueStream(source, text, 0), 0, num_readers).take(48 // num_readers)
        assert str(streamed.value).splitlines()[0] == str(loaded.value).splitlines()[0]


def test_negatives_that_begin_late_in_a_stream_are_read_at_one_opening(
    text: TextPreparation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the rows that say what columns there are, and behind the first blocks."""
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"a": f"row {i}", "b": "the cat " * 500}) + "\n" for i in range(1100)]
    path.write_text("".join(lines) + '{"a": "x", "b": "y", "negs": ["dog"]}\n')
    opened: list[Path | str] = []
    once = files_of_rows._opened

    def noted(path: Path | str) -> AbstractContextManager[BinaryIO]:
        opened.append(path)
        return once(path)

    monkeypatch.setattr(files_of_rows, "_opened", noted)
    columns = {"anchor": "a", "positive": "b", "negatives": "negs"}
    source = Source(str(path), columns, max_negatives=1, streaming=True)
    ids, _, hashes, numbers = Reader(OpaqueStream(source, text, 0), 0, 1).take(1101)
    assert len(opened) == 1
    assert numbers[hashes[:, 2] != NO_TEXT].tolist() == [1100]
    assert ids[2][int(numbers.argmax())].tolist() == text(["dog"])[0]


def test_a_misspelt_column_of_a_stream_is_told_before_the_whole_of_it_is_read(
    text: TextPreparation, tmp_path: Path
) -> None:
    """The end of the file is damaged: who reads so far says that."""
    path = tmp_path / "x.jsonl.gz"
    row = json.dumps({"a": "x", "b": "the cat " * 12_000, "negatives": ["dog"]}) + "\n"
    path.write_bytes(gzip.compress(row.encode() * 600)[:-9])
    far = r"in the first 32 MiB, \d+ lines; found: a, b, negatives. Did you mean 'negatives'\? If later rows have it"
    for keys, told in (
        ({"negatives": "negative"}, rf"no column 'negative' \(columns.negatives\) {far}"),
        ({"positive": "bb"}, r"no column 'bb' \(columns.positive\); found: a, b, negatives. Did you mean 'b'\?"),
    ):
        source = Source(str(path), {"anchor": "a", "positive": "b", **keys}, streaming=True)
        with pytest.raises(ValueError, match=f"x.jsonl.gz: {told}"):
            OpaqueStream(source, text, 0).look()


def test_the_first_rows_of_a_stream_are_checked_when_the_data_are_set_up(tiny_encoder: Path, tmp_path: Path) -> None:
    for name, content, told in (
        ("x.jsonl", '{"a": "x", "b": "y"}\n{"a": "x", "b": ""}\n', r"x.jsonl:2: column 'b' is empty"),
        ("x.csv", "a,c\nx,y\n", r"x.csv: no column 'b' \(columns.positive\); found: a, c"),
    ):
        (tmp_path / name).write_text(content)
        source = Source(str(tmp_path / name), {"anchor": "a", "positive": "b"}, streaming=True)
        data = PairData([source], EncoderSpec(str(tiny_encoder)), batch_size=2, cache_dir=str(tmp_path / "cache"))
        with pytest.raises(ValueError, match=told):
            data.setup("fit")


def test_a_stream_of_json_lines_has_the_rows_of_loading_it(text: TextPreparation, tmp_path: Path) -> None:
    """`datasets` reads dates as times, casts files to the types of the first, and has no column that it lacks."""
    files: list[list[dict[str, object]]] = [
        [{"a": "hello", "b": "x", "s": 1, "y": 0}],
        [{"a": "2020-01-01", "b": "007", "s": 0.5, "y": "1", "more": [1]}],
        [{"s": "0.25", "y": 2.0, "b": "2020-01-01T10:00:00", "a": "1.50"}],
    ]
    for number, rows in enumerate(files):
        content = "".join(json.dumps(row) + "\r\n\n" for row in rows)
        (tmp_path / f"{number}.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode())
    source = Source(str(tmp_path), {**COLUMNS, "label": "y"})
    loaded = load(source, tmp_path / "cache")
    assert loaded["positive"][:] == ["x", "007", "2020-01-01T10:00:00"]
    reader = Reader(OpaqueStream(replace(source, streaming=True), text, 0), 0, 1)
    columns, targets, _, numbers = reader.take(len(loaded))
    order = numbers.argsort()
    for ids, name in zip(columns, ("anchor", "positive"), strict=True):
        assert [ids[place].tolist() for place in order] == text(loaded[name][:])
    assert targets["score"][order].tolist() == loaded["score"][:] == [1.0, 0.5, 0.25]
    assert targets["label"][order].tolist() == loaded["label"][:] == [0, 1, 2]


@pytest.mark.parametrize("key", ["hard", "m\u00fchsam", "in.side"])
def test_a_column_may_come_behind_the_first_rows(key: str, text: TextPreparation, tmp_path: Path) -> None:
    """A key that is null is left out by many who write JSON lines; `datasets` finds it wherever it comes."""
    name, _, inner = key.partition(".")
    rows: list[dict[str, object]] = [{"a": "hello", "b": "x"} for _ in range(110)]
    rows.append({"a": "hello", "b": "x", name: {inner: ["the cat"]} if inner else ["the cat"]})
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    columns = {"anchor": "a", "positive": "b", "negatives": key}
    source = Source(str(tmp_path / "x.jsonl"), columns, max_negatives=1)
    rows_of_datasets = load_dataset("json", data_files=source.path, split="train", cache_dir=str(tmp_path / "hf"))
    there = [cell is not None for cell in rows_of_datasets[name]]
    assert sum(there) == 1
    loaded = load(source, tmp_path / "cache")["negative_1"][:]
    assert [one is not None for one in loaded] == there
    _, _, hashes, numbers = Reader(OpaqueStream(replace(source, streaming=True), text, 0), 0, 1).take(len(rows))
    assert (hashes[numbers.argsort(), 2] != NO_TEXT).tolist() == there
    with pytest.raises(ValueError, match=r"no column 'else'.*found: a, b"):
        load(replace(source, columns={**columns, "negatives": "else"}), tmp_path / "cache")


@pytest.mark.parametrize(("name", "content"), [("x.jsonl", ""), ("x.csv", ""), ("x.tsv", "a\tb\n")])
def test_a_stream_without_rows_is_said_as_loading_says_it(
    name: str, content: str, text: TextPreparation, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    source = Source(str(tmp_path / name), {"anchor": "a", "positive": "b"})
    with pytest.raises(ValueError, match="x") as loaded:
        load(source, tmp_path / "cache")
    with pytest.raises(ValueError, match="x") as streamed:
        Reader(OpaqueStream(replace(source, streaming=True), text, 0), 0, 1)
    assert str(streamed.value) == str(loaded.value) == f"{tmp_path / name}: there is no row"


def test_a_header_by_position_is_said_before_the_first_step(
    tiny_encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "set", 2, "tsv")
    source = Source(str(tmp_path / "set"), {"anchor": 0, "positive": 1}, streaming=True)
    make_data(source, tiny_encoder, 0, tmp_path)
    said = [record.getMessage() for record in caplog.records if "its first line" in record.getMessage()]
    assert [one.partition(":")[0] for one in said] == [f"{tmp_path}/set/part-{number}.tsv" for number in range(2)]
    assert "names of its columns: 'a', 'b', 's'; if it is a row" in said[0]


def test_a_table_of_text_is_streamed_from_an_address(text: TextPreparation, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/rows/x.tsv.gz", gzip.compress(b'a\tb\ts\nx\t"y\t1\nz\tw\t2\n'))
    source = Source("memory://rows/x.tsv.gz", COLUMNS, streaming=True)
    columns, targets, *_ = Reader(OpaqueStream(source, text, 0), 0, 1).take(2)
    assert dict(zip(targets["score"].tolist(), (ids.tolist() for ids in columns[1]), strict=True)) == {
        1.0: text(['"y'])[0],
        2.0: text(["w"])[0],
    }


def make_data(source: Source, encoder: Path, workers: int, cache: Path) -> PairData:
    spec = EncoderSpec(str(encoder), max_length=32)
    data = PairData([source], spec, batch_size=8, num_workers=workers, cache_dir=str(cache))
    data.trainer = SimpleNamespace(global_step=0, max_steps=60, limit_train_batches=1.0)  # type: ignore[assignment]
    data.setup("fit")
    return data


def read_steps(data: PairData, stop: int, rank: int, world_size: int, spawned: int = 0) -> list[list[float]]:
    assert data.stream is not None
    batches = OpaqueBatches(data.stream, 8, rank, world_size, data.num_workers, data.steps_per_message, data._positions)
    context = worker_context() if spawned else None
    sampler = StepSampler(data)
    loader = StepLoader(
        batches, batch_sampler=sampler, collate_fn=list, num_workers=spawned, multiprocessing_context=context
    )
    seen = []
    for batch in loader:
        data.on_before_batch_transfer(batch, 0)
        seen.append(batch.targets.scores_B.tolist())
        data.trainer.global_step += 1  # type: ignore[union-attr]
        if data.trainer.global_step == stop:  # type: ignore[union-attr]
            break
    return seen


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (0, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_resume_through_the_loader(
    workers: int, world_size: int, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two resumes in a row, inside a message of three steps; what workers have ready does not count.

    The second part of a run with workers reads all shares in this process, for starting two takes seconds.
    """
    monkeypatch.setattr("trainer.data.parts._WINDOW", 24)
    source = write(tmp_path / "set", 2)
    whole_data = make_data(source, tiny_encoder, 0, tmp_path)
    whole_data.num_workers = workers
    for rank in range(world_size):
        if workers:  # one process reads what the workers of the other run read
            assert whole_data.stream is not None
            readers = [Reader(whole_data.stream, number, workers) for number in range(workers)]
            whole = [readers[step // 3 % workers].take(8)[1]["score"].tolist() for step in range(40)]
        else:
            whole_data.trainer.global_step, whole_data._positions = 0, {}  # type: ignore[union-attr]
            whole = read_steps(whole_data, 40, rank, world_size)
        seen: list[list[float]] = []
        state = None
        for stop in (13, 40) if workers else (5, 13, 40):
            data = make_data(source, tiny_encoder, workers, tmp_path)
            data.trainer.global_step = len(seen)  # type: ignore[union-attr]
            if state is not None:
                data.load_state_dict(state)
            seen += read_steps(data, stop, rank, world_size, workers if stop == 13 else 0)
            state = data.state_dict()
        assert seen == whole


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_epoch_goes_on_where_the_one_before_ended(
    workers: int, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch starts new workers. Epochs of four steps end inside a message of three."""
    monkeypatch.setattr("trainer.data.parts._WINDOW", 24)
    data = make_data(write(tmp_path / "set", 2), tiny_encoder, workers, tmp_path)
    data.trainer.limit_train_batches = 4  # type: ignore[union-attr]
    assert data.stream is not None
    readers = [Reader(data.stream, number, workers) for number in range(workers)]
    whole = [readers[step // 3 % workers].take(8)[1]["score"].tolist() for step in range(8)]
    loader, seen = data.train_dataloader(), []
    for _ in range(2):
        for batch in loader:
            data.on_before_batch_transfer(batch, 0)
            seen.append(batch.targets.scores_B.tolist())
            data.trainer.global_step += 1  # type: ignore[union-attr]
    rows = [row for step in seen for row in step]
    assert len(set(rows)) == 8 * 8, "a row comes once in a pass"
    assert seen == whole


def test_what_a_stream_can_not_do_is_said(text: TextPreparation, tiny_encoder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "set")
    endless = PairData([source], EncoderSpec(str(tiny_encoder)), cache_dir=str(tmp_path))
    endless.trainer = SimpleNamespace(max_steps=-1)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"has no index and no length; set trainer.max_steps"):
        endless.setup("fit")
    with pytest.raises(ValueError, match="so it can't be mixed with other sources; convert it to Parquet"):
        PairData([source, source], EncoderSpec(str(tiny_encoder)), cache_dir=str(tmp_path)).setup("fit")
    with pytest.raises(ValueError, match="the rows of a stream have no order that can be planned"):
        _ = make_data(source, tiny_encoder, 0, tmp_path).order
    saved = {"workers": 2, "positions": [{}, {}, {}]}
    with pytest.raises(
        ValueError, match=r"by 3 ranks with 2 loader workers each, now there are 1 with 1: .* same numbers"
    ):
        make_data(source, tiny_encoder, 0, tmp_path).load_state_dict(saved)
    with pytest.raises(ValueError, match="no row for reader 5 of 300"):
        Reader(OpaqueStream(Source(str(tmp_path / "set"), COLUMNS), text, 0, max_rows=3), 4, 300)
    (tmp_path / "set" / "more.csv").write_text("a,b,s\nx,y,1\n")
    with pytest.raises(ValueError, match=r"cannot be streamed: files of the formats .csv, .jsonl; a stream has one of"):
        Reader(OpaqueStream(source, text, 0), 0, 1)
    (tmp_path / "bad.jsonl").write_text('{"a": "x", "b": "y", "s": 1}\n{"a": "", "b": "y", "s": 1}\n')
    bad = Source(str(tmp_path / "bad.jsonl"), COLUMNS, streaming=True)
    with pytest.raises(ValueError, match=r"bad.jsonl:2: column 'a' is empty\n.*1 bad row among those just read"):
        Reader(OpaqueStream(bad, text, 0), 0, 1)
    before = fingerprint(bad)
    (tmp_path / "bad.jsonl").write_text('{"a": "x", "b": "y", "s": 1}\n{"a": "z", "b": "y", "s": 1}\n')
    assert fingerprint(bad) != before
