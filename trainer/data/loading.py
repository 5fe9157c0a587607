"""A data set of a config becomes rows with canonical columns, checked once and cached as Arrow."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, load_dataset

from trainer.data.blocks import no_batch
from trainer.data.cache import place_of, use
from trainer.data.checks import BadRows, checked_rows
from trainer.data.columns import find_column, refuse_moved
from trainer.data.delimited import read_delimited
from trainer.data.derived import draw, draw_groups, held_out, triplets
from trainer.data.files import JSON_LINES, data_files, data_format, is_hub_id
from trainer.data.json_lines import read_json_lines
from trainer.data.rows import Rows, read_file, table_rows
from trainer.data.sources import Source
from trainer.files import sha256_of
from trainer.messages import cause_of, did_you_mean

_VERSION = 4  # of the cached rows: raise it when the same files and spec give other rows
_BATCH_ROWS = 10_000


def load(source: Source, cache_dir: Path, verify: bool = False) -> Dataset:
    """Rows of ``source`` with canonical columns only, memory-mapped; the first call builds ``cache_dir``.

    Args:
        source: what to read.
        cache_dir: where rows lie.
        verify: read rows that are there, and build them again where a file is damaged.

    Returns:
        N rows: texts (str, none empty), then score (float32) and label (int64, from 0) if there are any.

    Raises:
        ValueError: missing file, missing column, bad rows (with file and line), no rows.
    """
    folder = _folder(source, cache_dir)
    base = _base(source)
    use(folder, partial(_build, source) if base is None else partial(_derive, source, base, cache_dir), verify)
    return Dataset.from_file(str(folder / "rows.arrow"))


def _base(source: Source) -> Optional[Source]:
    """The source without what is done to its rows once they are read, or None where nothing is.

    Training and validation sources that share a path, and differ only in that, are read once.
    """
    if not (source.triplets or source.holdout or source.max_rows or source.prompts):
        return None
    spec: dict[str, Any] = {f.name: getattr(source, f.name) for f in fields(Source)}
    spec.update(triplets=None, holdout=0.0, holdout_by=None, max_rows=None, prompts=None, max_lengths=None)
    spec.update(loss=None)
    if source.triplets:
        positive, negative = map(str, source.triplets)
        kept = {**(source.where or {}), source.columns["label"]: [positive, negative]}
        spec.update(label_map={positive: 1, negative: 0}, where=kept)
    return Source(**spec)


def _derive(source: Source, base: Source, cache_dir: Path, folder: Path) -> None:
    """Writes the rows of ``source`` out of those of its base."""
    rows, skipped = load(base, cache_dir, verify=True), num_skipped(base, cache_dir)
    source = as_read(source, rows)
    table: pa.Table = rows.data.table
    columns = {name: table[name] for name in table.column_names}
    picked = {name: np.arange(len(rows)) for name in source.canonical_columns if name in columns}
    if source.triplets:
        anchors, negatives = triplets(columns["anchor"], columns["label"].to_numpy())
        if not len(anchors):
            raise ValueError(
                f"{source.path}: no anchor has both a '{source.triplets[0]}' and a '{source.triplets[1]}'; triplets "
                f"need both. The source has {len(rows):,} rows with one of these labels"
            )
        columns["negative"] = columns["positive"]
        picked = {"anchor": anchors, "positive": anchors, "negative": negatives}
    if source.holdout:
        by = source.holdout_by or source.text_columns[0]
        here = held_out(columns[by], source.holdout)[picked[by]] == source.keeps_holdout
        if not here.any():
            use, change = ("validate", "raise") if source.keeps_holdout else ("train", "lower")
            raise ValueError(
                f"{source.path}: a holdout of {source.holdout:g} by '{by}' leaves none of {len(picked[by]):,} rows to "
                f"{use} on; {change} holdout, for training and validation alike, or bring more rows"
            )
        picked = {name: numbers[here] for name, numbers in picked.items()}
    if source.max_rows:
        if source.draws_queries:  # a query that lost candidates would be an easier one
            drawn = draw_groups(columns["anchor"].take(pa.array(picked["anchor"])), source.max_rows)
        else:
            drawn = draw(len(next(iter(picked.values()))), source.max_rows)
        picked = {name: numbers[drawn] for name, numbers in picked.items()}
    num_rows = len(next(iter(picked.values())))
    large = partial(pa.scalar, type=pa.large_string())
    schema = pa.schema([(name, columns[name].type) for name in picked])
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, num_rows, _BATCH_ROWS):
            part = {name: _take(columns[name], n[start : start + _BATCH_ROWS]) for name, n in picked.items()}
            for name in source.text_columns:
                if prompt := source.prompt_of(name):  # an absent text stays absent
                    part[name] = pc.binary_join_element_wise(large(prompt), part[name], large(""))
            writer.write_table(pa.table(part, schema=schema).combine_chunks())
    report = {"source": source.path, "num_rows": num_rows, "num_skipped": skipped}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _take(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    """The values of some rows. Arrow would join all chunks of the column for it, so it sees those around the rows."""
    first, last = int(rows.min()), int(rows.max())
    return column.slice(first, last - first + 1).take(pa.array(rows - first))


def as_read(source: Source, rows: Dataset) -> Source:
    """The source with a name for each text of its rows, also where it takes all negatives of a list."""
    if source.max_negatives is not None or not source.may_lack_texts:
        return source
    return replace(source, max_negatives=sum(name.startswith("negative_") for name in rows.column_names) or None)


def num_skipped(source: Source, cache_dir: Path) -> int:
    """Bad rows that were left out of ``load(source, cache_dir)``."""
    load(source, cache_dir)
    return json.loads((_folder(source, cache_dir) / "report.json").read_text())["num_skipped"]


def fingerprint(source: Source) -> str:
    """Hash of what ``load`` gives: bytes of the files (or the hub's commit) and the spec, not the path."""
    base = _base(source)
    if base is not None:
        by = source.holdout_by or source.text_columns[0]
        held = [source.holdout, by, source.keeps_holdout] if source.holdout else []
        given = dict(source.prompts or {})
        if given and source.triplets:  # those of the negatives may follow from those of the positives
            given["negative"] = source.prompt_of("negative")
        prompts = sorted(given.items())
        drawn = ["queries"] if source.max_rows and source.draws_queries else []  # in place of rows
        derived = [_VERSION, fingerprint(base), bool(source.triplets), held, source.max_rows, prompts, *drawn]
        return hashlib.sha256(json.dumps(derived).encode()).hexdigest()[:24]
    if source.streaming:
        from trainer.data.streaming import fingerprint as streamed  # it imports the checks of a source

        return streamed(source)
    if is_hub_id(source.path):
        contents = [hub_rows(source.path, source.subset, source.split, source.revision)._fingerprint]
    else:
        contents = [content_hash(file) for file in data_files(source.path, source.split)]
    columns = sorted(source.columns.items())
    maps = [
        source.score_range and list(source.score_range),
        source.label_map and sorted(source.label_map.items()),
        source.where and sorted(source.where.items(), key=lambda item: (isinstance(item[0], str), item[0])),
    ]
    budget = [source.on_bad_row, source.max_bad_rows]
    lists = [source.max_negatives] if source.may_lack_texts else []
    spec = json.dumps([_VERSION, contents, columns, maps, budget, *lists], ensure_ascii=True)
    return hashlib.sha256(spec.encode()).hexdigest()[:24]


def _folder(source: Source, cache_dir: Path) -> Path:
    return place_of(cache_dir, "rows", fingerprint(source))


def content_hash(file: Path) -> str:
    """Of the bytes of a file and of how they are read."""
    stat = file.stat()
    return _hash_file(str(file), stat.st_size, stat.st_mtime_ns) + data_format(file)


@cache  # one process asks several times; size and time of change make a changed file a new one
def _hash_file(path: str, size: int, mtime_ns: int) -> str:
    try:
        return sha256_of(Path(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


@cache
def hub_rows(path: str, subset: Optional[str], split: str, revision: Optional[str]) -> Dataset:
    try:
        return load_dataset(path, name=subset, split=split, revision=revision)
    except Exception as error:  # the hub, the network, the split, the format: each has its own type
        near = did_you_mean(path, os.listdir())
        raise ValueError(
            f"{path}: neither a file or folder here nor a hub data set that can be read "
            f"({type(error).__name__}: {cause_of(error)}).{near}"
        ) from error


def _build(source: Source, folder: Path) -> None:
    if source.may_lack_texts and source.max_negatives is None:  # the columns stand in front of the rows
        source = replace(source, max_negatives=_most_negatives(source))
    bad = BadRows(source)
    types = {"score": pa.float32(), "label": pa.int64(), "group": pa.int64()}
    types |= dict.fromkeys(source.candidate_scores, pa.float32())
    schema = pa.schema([(name, types.get(name, pa.large_string())) for name in source.canonical_columns])
    with RowsFile(schema, folder / "rows.arrow") as file:
        for rows in _open(source, file.add_batch):
            for cells in checked_rows(source, rows, bad):
                file.add_row(cells)
    bad.close()
    if file.num_rows == 0:
        raise ValueError(f"{source.path}: there is no row{bad.why_none()}")
    report = {"source": source.path, "num_rows": file.num_rows, "num_skipped": bad.count}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _most_negatives(source: Source) -> int:
    """Of a record, whether it is good or not; at least 1."""
    most = 1
    for rows in _open(source, no_batch):
        column = find_column(source.columns["negatives"], rows.name, rows.columns, "columns.negatives")
        cells = (column.cell_or_none(row) for _, row in rows.records)
        most = max(most, *(len(cell) for cell in cells if isinstance(cell, list)), 0)
    return most


class RowsFile:
    """Checked rows on their way into an Arrow file, single ones and whole batches, in the order they come."""

    def __init__(self, schema: pa.Schema, path: Path) -> None:
        self.schema = schema
        self.path = path
        self.num_rows = 0
        self._waiting: list[Sequence[Any]] = []

    def __enter__(self) -> "RowsFile":
        self._file = pa.OSFile(str(self.path), "wb")
        self._writer = pa.ipc.new_stream(self._file, self.schema)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
        self._file.close()

    def add_row(self, cells: Sequence[Any]) -> None:
        self._waiting.append(cells)
        if len(self._waiting) == _BATCH_ROWS:
            self._flush()

    def add_batch(self, batch: pa.RecordBatch) -> None:
        self._flush()
        self._writer.write_batch(batch)
        self.num_rows += len(batch)

    def _flush(self) -> None:
        if self._waiting:
            columns = zip(*self._waiting, strict=True)
            arrays = [pa.array(cells, f.type) for cells, f in zip(columns, self.schema, strict=True)]
            self._waiting = []
            self.add_batch(pa.record_batch(arrays, schema=self.schema))


def _open(source: Source, accept: Callable[[pa.RecordBatch], None]) -> Iterator[Rows]:
    """The rows to check, file by file; ``accept`` gets those of text files that Arrow has read and found good."""
    wanted = source.read_columns
    if is_hub_id(source.path):
        rows = hub_rows(source.path, source.subset, source.split, source.revision)
        here = rows.select_columns([c for c in rows.column_names if wanted is None or c in wanted])
        yield table_rows(source.path, rows.features.arrow_schema, here.with_format("arrow").iter(1000))
    else:
        earlier: dict[tuple[str, ...], str] = {}
        for file in data_files(source.path, source.split):
            of_file = file_rows(file, source, accept)
            refuse_moved(source.asked, of_file.name, of_file.columns, earlier)
            yield of_file


def file_rows(file: Path, source: Optional[Source] = None, accept: Callable[[pa.RecordBatch], None] = no_batch) -> Rows:
    """The rows of a file of any known format.

    Args:
        source: what is asked for, where ``accept`` takes batches that need no closer look.
    """
    if data_format(file) in JSON_LINES:
        return read_json_lines(file, source, accept)
    if data_format(file) in (".csv", ".tsv"):
        return read_delimited(file, source, accept)
    return read_file(file, source.read_columns if source else None)
