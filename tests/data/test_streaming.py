"""A streamed table holds what the tokenizer gives for every row, whoever builds it, under a bound of disk space."""

from __future__ import annotations

import math
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from filelock import FileLock
from torch._utils import ExceptionWrapper

from tests.stub_hub import stub_hub
from trainer.data.batches import StepBatches
from trainer.data.cache import clean
from trainer.data.evalsource import EvalSource
from trainer.data.loading import fingerprint
from trainer.data.module import PairData
from trainer.data.parts import SLICE_ROWS
from trainer.data.sources import Source
from trainer.data.steps import StepLoader, StepSampler
from trainer.data.streaming import StreamedTable
from trainer.data.tokens import tokenize
from trainer.data.workers import worker_context
from trainer.encoder import EncoderSpec
from trainer.encoder.text import TextPreparation, load_text_preparation

ROOT = Path(__file__).parents[2]
COLUMNS = {"anchor": "a", "positive": "b", "score": "s", "label": "y"}
GROUPS = (3000, 100, 5000, 2500, 4, 4000)
NUM_ROWS = sum(GROUPS)


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    words = np.array(["the", "a", "cat", "dog", "sits", "runs", "on", "mat", "house", "two"])
    texts = [[" ".join(rng.choice(words, n)) for n in rng.integers(1, 9, NUM_ROWS)] for _ in range(2)]
    texts[0] = [f"{text} {row}" for row, text in enumerate(texts[0])]
    return pd.DataFrame({"a": texts[0], "b": texts[1], "s": rng.random(NUM_ROWS), "y": rng.integers(0, 3, NUM_ROWS)})


@pytest.fixture(scope="module")
def text(tiny_encoder: Path) -> TextPreparation:
    return load_text_preparation(EncoderSpec(str(tiny_encoder), max_length=32))


def write_parquet(frame: pd.DataFrame, folder: Path) -> Path:
    """Two files, rows in groups of GROUPS."""
    folder.mkdir()
    table, start = pa.Table.from_pandas(frame), 0
    for name, sizes in (("one", GROUPS[:3]), ("two", GROUPS[3:])):
        with pq.ParquetWriter(folder / f"{name}.parquet", table.schema) as writer:
            for size in sizes:
                writer.write_table(table.slice(start, size), row_group_size=size)
                start += size
    return folder


@pytest.fixture(scope="module")
def parquet(frame: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(frame, tmp_path_factory.mktemp("parquet") / "set")


def check_rows(table: StreamedTable, frame: pd.DataFrame, text: TextPreparation, rows: np.ndarray) -> None:
    for column, name in (("anchor", "a"), ("positive", "b")):
        found = table.ids(column, rows)
        assert [ids.tolist() for ids in found] == text(frame[name].iloc[rows].tolist())
        assert {ids.dtype for ids in found} == {np.dtype(np.int32)}
    targets = table.targets(rows)
    np.testing.assert_array_equal(targets["score"], frame.s.to_numpy()[rows].astype(np.float32))
    np.testing.assert_array_equal(targets["label"], frame.y.to_numpy()[rows])


def test_every_row_is_that_of_the_file(
    parquet: Path, frame: pd.DataFrame, text: TextPreparation, tmp_path: Path
) -> None:
    table = StreamedTable(Source(str(parquet), COLUMNS, streaming=True), text, tmp_path)
    assert (table.num_rows, table.group_sizes, table.columns) == (NUM_ROWS, GROUPS, ("anchor", "positive"))
    assert not table.folder.exists(), "only footers are read at the start"
    check_rows(table, frame, text, np.random.default_rng(1).permutation(NUM_ROWS))
    copy = pickle.loads(pickle.dumps(table))
    check_rows(copy, frame, text, np.arange(50))
    assert table.targets(np.array([], dtype=np.int64))["score"].tolist() == []


def test_only_slices_that_are_asked_for_are_built(parquet: Path, text: TextPreparation, tmp_path: Path) -> None:
    table = StreamedTable(Source(str(parquet), COLUMNS, streaming=True), text, tmp_path)
    table.ids("anchor", np.array([2999, 3000, 3101]))
    assert sorted(path.name for path in table.folder.glob("*.arrow")) == [
        *(f"group-{group:07d}.arrow" for group in (0, 1, 2)),
        *(f"slice-{number:08d}.arrow" for number in (1, 2, 3)),
    ]
    kept = table.folder / "group-0000000.arrow"
    without_checksum = kept.read_bytes()[:-4]
    assert pa.ipc.open_file(without_checksum).schema.names == ["a", "b", "s", "y"], "no other column is fetched"


@pytest.mark.parametrize("kind", ["memory", "file", "arrow-file", "arrow-stream"])
def test_other_places_and_arrow(
    kind: str, parquet: Path, frame: pd.DataFrame, text: TextPreparation, tmp_path: Path
) -> None:
    """Far files through fsspec; local Arrow files, both kinds, are mapped where they lie."""
    if kind == "memory":
        system = fsspec.filesystem("memory")
        for file in parquet.iterdir():
            system.pipe(f"/far/{file.name}", file.read_bytes())
        path = "memory://far/*.parquet"
    elif kind == "file":
        path = f"file://{parquet}"
    else:
        path = str(tmp_path / "set.arrow")
        table = pa.Table.from_pandas(frame)
        opened = pa.ipc.new_file if kind == "arrow-file" else pa.ipc.new_stream
        with pa.OSFile(path, "wb") as sink, opened(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2500)
    streamed = StreamedTable(Source(path, COLUMNS, streaming=True), text, tmp_path / "cache")
    check_rows(streamed, frame, text, np.arange(0, NUM_ROWS, 4))
    fetched = list(streamed.folder.glob("group-*"))
    assert len(fetched) == (0 if kind.startswith("arrow") else len(GROUPS))


def test_fields_positions_prompts_and_lengths_count_as_in_a_whole_set(text: TextPreparation, tmp_path: Path) -> None:
    rows = [{"t": {"en": f"word {i}", "he": f"other {i}"}, "c": f"third {i}", "d": "unused"} for i in range(20)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for columns in ({"anchor": "t.en", "positive": "c"}, {"anchor": "t.he", "positive": 1}):
        spec = {"path": str(tmp_path / "rows.parquet"), "columns": columns, "prompts": {"anchor": "query: "}}
        whole = tokenize(Source(**spec), text, tmp_path / "cache")
        streamed = StreamedTable(Source(**spec, streaming=True), text, tmp_path / "cache")
        for column in ("anchor", "positive"):
            expected = [ids.tolist() for ids in whole.ids(column, np.arange(20))]
            assert [ids.tolist() for ids in streamed.ids(column, np.arange(20))] == expected
        assert (
            whole.ids("anchor", np.arange(1))[0].tolist() == text(["query: " + rows[0]["t"][columns["anchor"][2:]]])[0]
        )
        cut = StreamedTable(
            Source(**spec, streaming=True), replace(text, max_lengths={"anchor": 4}), tmp_path / "cache"
        )
        assert {len(ids) for ids in cut.ids("anchor", np.arange(20))} == {4}
        assert [ids.tolist() for ids in cut.ids("positive", np.arange(20))] == expected


def test_class_names_and_score_range_count_as_in_a_whole_set(text: TextPreparation, tmp_path: Path) -> None:
    features = Features({"a": Value("string"), "y": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"a": ["one", "two", "three"], "y": [1, 0, 1]}, features=features)
    rows.to_parquet(str(tmp_path / "x.parquet"))
    columns = {"text": "a", "label": "y"}
    for label_map in (None, {"yes": 5, "no": 3}):
        whole = tokenize(Source(str(tmp_path / "x.parquet"), columns, label_map=label_map), text, tmp_path)
        source = Source(str(tmp_path / "x.parquet"), columns, label_map=label_map, streaming=True)
        found = StreamedTable(source, text, tmp_path).targets(np.arange(3))
        assert whole.labels is not None
        assert found["label"].tolist() == whole.labels.tolist()


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "what", "remedy"),
    [
        ("a", None, "is null", "mend them, or set streaming: false"),
        ("s", None, "is nan, not a finite number|is null", "mend them, or set streaming: false"),
        ("s", 5.0, r"is 5, outside score_range 0\.\.1", r".*go from 0 to 5, set score_range: \[0, 5\]"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_number(
    column: str, value: object, what: str, remedy: str, frame: pd.DataFrame, text: TextPreparation, tmp_path: Path
) -> None:
    bad = frame.copy()
    bad.loc[3100 + 2500, column] = value  # the second slice of the third group
    folder = write_parquet(bad, tmp_path / "set")
    table = StreamedTable(Source(str(folder), COLUMNS, score_range=(0, 1), streaming=True), text, tmp_path)
    table.ids("anchor", np.arange(3100, 3200))
    table.prefetch(np.array([5600]))
    assert table._ahead is not None
    table._ahead.join()  # the thread says nothing: the step that needs the row does
    expected = f"one.parquet: row 5601: column '{column}' ({what})\n.*: 1 bad row among those just read; {remedy}$"
    with pytest.raises(ValueError, match=expected):
        table.ids("anchor", np.array([5200]))
    try:
        table.ids("anchor", np.array([5200]))
    except ValueError:
        carried = ExceptionWrapper(where="in DataLoader worker process 0")  # as a worker does
    with pytest.raises(ValueError, match=r"^[^ ]*one.parquet: row 5601: column [^\n]*\n[^\n]*$"):
        carried.reraise()


def test_what_can_not_be_streamed_is_said(parquet: Path, text: TextPreparation, tmp_path: Path) -> None:
    def refused(path: str, expected: str, columns: dict[str, str] = COLUMNS) -> None:
        with pytest.raises(ValueError, match=expected):
            StreamedTable(Source(path, columns, streaming=True), text, tmp_path)

    refused(str(parquet), "one.parquet: no column 'A'.*found: a, b, s, y.* Did you mean 'a'", {"text": "A"})
    refused("memory://nothing/*.parquet", "memory://nothing/.*: no file is there")
    refused("nosuch://x/a.parquet", "nosuch://x/a.parquet: cannot be listed .ValueError: Protocol not known")
    (tmp_path / "packed.parquet.gz").write_bytes(b"")
    refused(str(tmp_path / "packed.parquet.gz"), "a gzipped parquet file has no row groups to stream by; unpack it")
    (tmp_path / "torn.parquet").write_bytes((parquet / "one.parquet").read_bytes()[:5000])
    refused(str(tmp_path / "torn.parquet"), "torn.parquet: cannot be read as parquet")
    pd.DataFrame({"a": [], "b": [], "s": [], "y": []}).to_parquet(tmp_path / "empty.parquet")
    refused(str(tmp_path / "empty.parquet"), "empty.parquet: there is no row")
    with pytest.raises(ValueError, match="on_bad_row: skip does not go with streaming: true"):
        PairData([Source("x", COLUMNS, streaming=True, on_bad_row="skip")], EncoderSpec("x"))
    with pytest.raises(ValueError, match="streaming: true is for"):
        PairData([], EncoderSpec("x"), validation=[EvalSource("x", COLUMNS, streaming=True, name="dev")])


def test_a_damaged_group_is_named(frame: pd.DataFrame, text: TextPreparation, tmp_path: Path) -> None:
    folder = write_parquet(frame, tmp_path / "set")
    table = StreamedTable(Source(str(folder), COLUMNS, streaming=True), text, tmp_path)
    file = folder / "two.parquet"
    data = file.read_bytes()
    end = len(data) // 5  # inside the first of its groups
    file.write_bytes(data[:4] + bytes(end) + data[4 + end :])
    table.ids("anchor", np.array([8099]))
    with pytest.raises(ValueError, match=r"two.parquet: row group 1 cannot be read: "):
        table.ids("anchor", np.array([8100]))


@pytest.mark.parametrize("name", ["slice-00000000.arrow", "group-0000000.arrow"])
@pytest.mark.parametrize("kept", [0, 1000])
def test_a_damaged_block_is_made_again(
    name: str,
    kept: int,
    parquet: Path,
    frame: pd.DataFrame,
    text: TextPreparation,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A block is cut to its first bytes; of a cut group another slice is asked for."""
    source = Source(str(parquet), COLUMNS, streaming=True)
    path = StreamedTable(source, text, tmp_path).folder / name
    check_rows(StreamedTable(source, text, tmp_path), frame, text, np.array([5]))
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    check_rows(StreamedTable(source, text, tmp_path), frame, text, np.array([5, SLICE_ROWS + 5]))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{path}: is damaged (")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["slice-00000000.arrow", "group-0000000.arrow"])
@pytest.mark.parametrize("place", [0.3, 0.6, 1.0])
def test_a_block_with_one_other_bit_is_made_again(
    name: str,
    place: float,
    parquet: Path,
    frame: pd.DataFrame,
    text: TextPreparation,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Arrow opens it: a letter or a piece is another, or the checksum itself."""
    source = Source(str(parquet), COLUMNS, streaming=True)
    path = StreamedTable(source, text, tmp_path).folder / name
    check_rows(StreamedTable(source, text, tmp_path), frame, text, np.array([5]))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[min(int(place * len(whole)), len(whole) - 1)] ^= 1
    path.write_bytes(damaged)
    check_rows(StreamedTable(source, text, tmp_path), frame, text, np.array([5, *range(SLICE_ROWS, GROUPS[0])]))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"{path}: is damaged (the checksum of its {len(whole):,} bytes is another); it is made again"
    assert path.read_bytes() == whole


def test_the_fingerprint_follows_the_files(parquet: Path, frame: pd.DataFrame, tmp_path: Path) -> None:
    source = Source(str(parquet), COLUMNS, streaming=True)
    copy = write_parquet(frame, tmp_path / "copy")
    assert fingerprint(source) == fingerprint(Source(str(copy), COLUMNS, streaming=True)), "the place does not count"
    other = frame.copy()
    other.loc[7000, "a"] = "zebra"
    changed = write_parquet(other, tmp_path / "changed")
    assert fingerprint(source) != fingerprint(Source(str(changed), COLUMNS, streaming=True))
    swapped = Source(str(parquet), {**COLUMNS, "anchor": "b", "positive": "a"}, streaming=True)
    assert fingerprint(source) != fingerprint(swapped)


# -- the folder of blocks -----------------------------------------------------------------------------------------


def test_the_folder_stays_under_its_bound(
    parquet: Path, frame: pd.DataFrame, text: TextPreparation, tmp_path: Path
) -> None:
    """Slices are dropped, oldest first, while others are read; what was dropped is built again."""
    bound = 1_200_000
    table = StreamedTable(Source(str(parquet), COLUMNS, streaming=True), text, tmp_path, bound)
    most = 0
    for start in (*range(0, NUM_ROWS - 500, 500), 0):
        held = table.ids("anchor", np.arange(start, start + 10))
        check_rows(table, frame, text, np.arange(start, start + 500, 50))
        table._open.clear()  # as if many others had been used
        most = max(most, sum(path.stat().st_size for path in table.folder.glob("*.arrow")))
        expected = text(frame["a"].iloc[start : start + 10].tolist())
        assert [ids.tolist() for ids in held] == expected, "what is mapped stays readable"
    whole = StreamedTable(Source(str(parquet), COLUMNS, streaming=True), text, tmp_path / "whole")
    whole.ids("anchor", np.arange(NUM_ROWS))
    everything = sum(path.stat().st_size for path in whole.folder.glob("*.arrow"))
    assert most < 1.2 * bound
    assert everything > 2 * bound


def test_work_is_shared_and_what_a_kill_left_is_done_again(
    parquet: Path, frame: pd.DataFrame, text: TextPreparation, tmp_path: Path
) -> None:
    """Another builds slice 0 (its lock is held) and dies: we build slice 1 first, then wait, then build 0 too."""
    table = StreamedTable(Source(str(parquet), COLUMNS, streaming=True), text, tmp_path)
    (table.folder / "locks").mkdir(parents=True)
    (table.folder / "slice-00000000.unfinished").write_bytes(b"torn")
    lock = FileLock(str(table.folder / "locks" / "slice-0.lock"))
    lock.acquire()
    reader = threading.Thread(target=check_rows, args=(table, frame, text, np.array([5, 2500])), daemon=True)
    reader.start()
    deadline = time.monotonic() + 60
    while not table._path(1).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert table._path(1).exists()
    assert not table._path(0).exists()
    assert reader.is_alive()
    lock.release()
    reader.join(60)
    assert table._path(0).exists()
    assert not list(table.folder.glob("*.unfinished"))


HOLD = """
import sys
from trainer.data.cache import keep_open
from pathlib import Path
keep_open(Path(sys.argv[1]), {})
print("in use", flush=True)
sys.stdin.read()
"""


def test_blocks_that_a_process_uses_are_not_cleaned(
    parquet: Path, frame: pd.DataFrame, text: TextPreparation, tmp_path: Path
) -> None:
    """By whoever cleans: this process, or another; they are when nobody lives that uses them."""
    bound = 1_200_000
    table = StreamedTable(Source(str(parquet), COLUMNS, streaming=True), text, tmp_path, bound)
    table.ids("anchor", np.arange(5))
    command = [sys.executable, "-m", "trainer", "cache", "clean", "--all", "--data.cache_dir", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.startswith("freed 0 bytes (0 folders)")
    assert "(1 folder) that a running process builds or uses" in said
    assert table._path(0).exists()
    for start in range(0, NUM_ROWS, 500):  # the stream itself drops its oldest
        check_rows(table, frame, text, np.arange(start, start + 10))
    assert sum(path.stat().st_size for path in table.folder.glob("*.arrow")) < 1.2 * bound
    assert clean(tmp_path, 0.0)[0] == []


def test_blocks_that_nobody_uses_are_cleaned(tmp_path: Path) -> None:
    """Also a folder without a report, as an older version left it; whoever comes then makes it again."""
    folder = tmp_path / "blocks" / ("0123456789ab" * 2)
    (folder / "locks").mkdir(parents=True)
    (folder / "slice-00000000.arrow").write_bytes(bytes(100))
    for _ in range(2):
        argv = [sys.executable, "-c", HOLD, str(folder)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "in use\n"
            assert [entry.folder for entry in clean(tmp_path, 0.0)[1]] == [folder]
            process.kill()
        assert [entry.folder for entry in clean(tmp_path, 0.0)[0]] == [folder]
        assert not folder.exists()
    folder.mkdir(parents=True)  # without a report, and nobody holds it
    assert [entry.folder for entry in clean(tmp_path, 0.0)[0]] == [folder]


# -- through the loader ----------------------------------------------------------------------------------------------


def make_data(sources: list[Source], encoder: Path, cache: Path, **settings: object) -> PairData:
    spec = EncoderSpec(str(encoder), max_length=32)
    data = PairData(sources, spec, batch_size=1000, cache_dir=str(cache), **settings)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def read_steps(data: PairData, start: int, stop: int, workers: int, rank: int = 0, world_size: int = 1) -> list:
    """(source, rows, first ids) of the steps of a run that goes on at ``start``, epoch by epoch, as Lightning does."""
    batches = StepBatches(data.tables, data.order, data.order.steps_per_epoch, rank, world_size)
    data.trainer = SimpleNamespace(global_step=start, limit_train_batches=1.0)  # type: ignore[assignment]
    context = worker_context() if workers else None
    loader = StepLoader(
        batches, batch_sampler=StepSampler(data), collate_fn=list, num_workers=workers, multiprocessing_context=context
    )
    seen = []
    while data.trainer.global_step < stop:
        for batch in loader:
            seen.append((batch.source, batch.targets.row_ids_B.tolist(), batch.input_ids_T[:50].tolist()))
            data.trainer.global_step += 1
            if data.trainer.global_step == stop:
                break
    return seen


def join(ranks: list[list]) -> list:
    """Rows of the steps of all ranks, ascending; they take the same source."""
    assert all(len({step[0] for step in one}) == 1 for one in zip(*ranks, strict=True))
    return [(one[0][0], sorted(row for step in one for row in step[1])) for one in zip(*ranks, strict=True)]


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_resume_anywhere_gives_the_rows_of_a_run_never_stopped(
    streaming: bool, parquet: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    """Epoch 0, epoch 1, the end of an epoch, two resumes in a row; ranks 1, 2, 1 to 2 to 1. No worker is started."""
    data = make_data([Source(str(parquet), COLUMNS, streaming=streaming)], tiny_encoder, tmp_path)
    per_epoch = math.ceil(NUM_ROWS / 1000)
    whole = read_steps(data, 0, 2 * per_epoch, 0)
    for epoch in (0, 1):
        rows = [row for _, rows, _ in whole[epoch * per_epoch : (epoch + 1) * per_epoch] for row in rows]
        assert sorted(rows) == list(range(NUM_ROWS))
    assert [rows for _, rows, _ in whole[:per_epoch]] != [rows for _, rows, _ in whole[per_epoch:]]
    alone = join([whole])
    again = make_data([Source(str(parquet), COLUMNS, streaming=streaming)], tiny_encoder, tmp_path)
    for stops in ([5], [per_epoch], [per_epoch + 3], [4, per_epoch + 2]):
        places = [0, *stops, 2 * per_epoch]
        for worlds in ((1, 1, 1), (2, 2, 2), (1, 2, 1), (2, 1, 2)):
            seen = []
            for start, stop, world in zip(places, places[1:], worlds, strict=False):
                seen += join([read_steps(again, start, stop, 0, rank, world) for rank in range(world)])
            assert seen == alone, (stops, worlds)


def test_workers_that_come_and_go_change_nothing(parquet: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    """Two spawned workers build the slices together; the run goes on without workers, and with them in epoch 1."""
    source = Source(str(parquet), COLUMNS, streaming=True)
    small = Source(str(parquet / "one.parquet"), COLUMNS)
    data = make_data([source, small], tiny_encoder, tmp_path / "one")
    whole = read_steps(data, 0, 50, 0)
    assert {step[0] for step in whole} == {0, 1}
    assert join([read_steps(data, 0, 20, 0, rank, 2) for rank in (0, 1)]) == join([whole[:20]])
    shared = make_data([source, small], tiny_encoder, tmp_path / "two")
    parts = read_steps(shared, 0, 7, 2), read_steps(shared, 7, 10, 0), read_steps(shared, 10, 50, 0)
    assert [step for part in parts for step in part] == whole


def test_the_next_window_is_built_while_this_one_is_read(parquet: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    frame = pd.read_parquet(parquet)
    bigger = pd.concat([frame] * 4, ignore_index=True)
    bigger.to_parquet(tmp_path / "big.parquet", row_group_size=8 * SLICE_ROWS)
    data = make_data([Source(str(tmp_path / "big.parquet"), COLUMNS, streaming=True)], tiny_encoder, tmp_path)
    table = data.tables[0]
    assert isinstance(table, StreamedTable)
    batches = StepBatches(data.tables, data.order, data.order.steps_per_epoch, 0, 1)
    first = batches[0]
    needed = set(table._slices(first.targets.row_ids_B.numpy())[0])
    assert table._ahead is not None
    table._ahead.join()
    built = {int(re.sub(r"\D", "", path.name)) for path in table.folder.glob("slice-*.arrow")}
    ahead = set(table._slices(data.order.step(0, batches.steps_ahead).rows)[0])
    assert built == needed | ahead
    assert len(needed) <= 8
    assert ahead - needed


def test_max_rows_takes_the_first_rows_only(parquet: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    data = make_data([Source(str(parquet), COLUMNS, streaming=True)], tiny_encoder, tmp_path, max_rows=3500)
    rows = [row for _, rows, _ in read_steps(data, 0, 4, 0) for row in rows]
    assert sorted(rows) == list(range(3500))


HUB = """
import sys
import numpy as np
from trainer.data.sources import Source
from trainer.data.streaming import StreamedTable
from trainer.encoder import EncoderSpec
from trainer.encoder.text import load_text_preparation

text = load_text_preparation(EncoderSpec(sys.argv[1], max_length=32))
table = StreamedTable(Source("org/rows", {"text": "a", "label": "y"}, streaming=True), text, sys.argv[2])
rows = np.array([0, 3500, 8100])
print(table.num_rows, table.targets(rows)["label"].tolist(), [ids.tolist() for ids in table.ids("text", rows)])
print([file.url for file, _ in table._groups][0])
"""


def test_a_hub_set_of_parquet_is_read_by_row_group(
    parquet: Path, frame: pd.DataFrame, tiny_encoder: Path, text: TextPreparation, tmp_path: Path
) -> None:
    """In a process of its own, for the address of the hub is read at the import; whole files are not fetched."""
    (tmp_path / "rows").mkdir()
    for number, name in enumerate(("one", "two")):
        (tmp_path / "rows" / f"train-{number:05d}-of-00002.parquet").symlink_to(parquet / f"{name}.parquet")
    with stub_hub({}, {"org/rows": tmp_path / "rows"}) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, "-c", HUB, str(tiny_encoder), str(tmp_path / "cache")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [0, 3500, 8100]
    expected = f"{NUM_ROWS} {frame.y.iloc[rows].tolist()} {text(frame['a'].iloc[rows].tolist())}"
    first, second = done.stdout.splitlines()[-2:]
    assert first == expected
    assert second.startswith("hf://datasets/org/rows@")
    assert not list((tmp_path / "hf").rglob("*.parquet"))
