"""Streams without an index (JSON lines, CSV, hub sets of other formats): read from front to back, over and over.

Every loader worker of every rank has a reader with its own share of the stream. What a reader gives next does not
follow from the step: its position travels with each batch, and a checkpoint holds those of all ranks. So a run goes
on exactly with the same number of ranks and workers, and is refused with another.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import ClassLabel, IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from numpy.typing import NDArray
from torch.utils.data import Dataset

from trainer.batch import PackedBatch
from trainer.data.blocks import PEEKED
from trainer.data.checks import checked_rows
from trainer.data.collate import pack, pack_towers, targets_of
from trainer.data.columns import is_position, refuse_moved
from trainer.data.delimited import stream_delimited, warn_of_header
from trainer.data.files import JSON_LINES, data_format, is_hub_id
from trainer.data.json_lines import stream_json_lines
from trainer.data.order import split_rows
from trainer.data.permutation import mix, permute
from trainer.data.rowgroups import StreamError, file_urls
from trainer.data.rows import Rows
from trainer.data.streamrows import StreamedBadRows, tokenize_column
from trainer.messages import cause_of

if TYPE_CHECKING:
    from trainer.data.sources import Source
    from trainer.encoder.text import TextPreparation

BUFFER_ROWS = 8192  # read one behind the other, then given in another order
_DELIMITED = (".csv", ".tsv")
_FORMATS = (*JSON_LINES, *_DELIMITED)  # read as without streaming; the readers of `datasets` guess types and join lines


class OpaqueStream:
    """Rows of a source that can only be read from front to back; `datasets` deals them out.

    Args:
        source: with ``streaming``.
        text: turns texts into token ids.
        seed: of the order inside a buffer.
        max_rows: only the first rows of the stream.

    Attributes:
        columns: the text columns, in canonical order.
    """

    labels: None = None  # only of rows that are read
    scores: None = None

    def __init__(self, source: Source, text: TextPreparation, seed: int, max_rows: int | None = None) -> None:
        self.source, self.text, self.seed, self.max_rows = source, text, seed, max_rows
        self.columns = source.text_columns

    @property
    def remedy(self) -> str:
        """What to do about an error of the network, or of `datasets`, whose readers name neither file nor line."""
        if is_hub_id(self.source.path):
            return "; set streaming: false to fetch it whole first"
        return "; copy it to this machine" if "://" in self.source.path else ""

    def look(self) -> None:
        """Say before the first step what reading says without streaming: of the first rows of the first file, and
        of what a position means in each.

        Raises:
            ValueError: there is no such file, a column is missing, or a row is bad.
        """
        urls = self._text_urls()
        if not urls:
            return
        bad = StreamedBadRows(self.source)
        earlier: dict[tuple[str, ...], str] = {}
        # What a position means is seen of all files together; later a reader sees some of them only.
        by_position = any(is_position(column) for _, column in self.source.asked)
        try:
            rows = _text_file(urls[0], self.source)
            for url in urls if by_position else ():
                columns = rows.columns if url == urls[0] else _text_file(url, self.source).columns
                if data_format(Path(url)) in _DELIMITED:
                    warn_of_header(self.source, url, columns)
                refuse_moved(self.source.asked, url, columns, earlier)
            first = islice(rows.records, min(PEEKED, self.max_rows or PEEKED))
            for _ in checked_rows(self.source, replace(rows, records=first), bad):
                pass
        except ValueError:
            raise
        except Exception as error:
            raise self._not_streamed(error) from error
        bad.close()

    def _text_urls(self) -> list[str]:
        """The files, all of one format; none of a set of the hub, which `datasets` reads."""
        urls = [] if is_hub_id(self.source.path) else file_urls(self.source) or []
        suffixes = sorted({data_format(Path(url)) for url in urls})
        if urls and (len(suffixes) > 1 or suffixes[0] not in _FORMATS):
            raise ValueError(
                f"{self.source.path}: cannot be streamed: files of the formats {', '.join(suffixes)}; a stream has one "
                f"of {', '.join(_FORMATS)}"
            )
        return urls

    def _not_streamed(self, error: Exception) -> StreamError:
        """Of an error of the hub, the network, the format: each has its own type."""
        cause = cause_of(error).rstrip(".") if str(error) else type(error).__name__
        return StreamError(f"{self.source.path}: cannot be streamed: {cause}{self.remedy}")

    def open(self) -> IterableDataset:
        """The rows from the first one on.

        Raises:
            ValueError: there is no such file, or no reader for it.
        """
        source, urls = self.source, self._text_urls()
        try:
            if not urls:
                rows = load_dataset(
                    source.path, name=source.subset, split=source.split, revision=source.revision, streaming=True
                )
            else:
                rows = IterableDataset.from_generator(_text_rows, gen_kwargs={"urls": urls, "source": source})
        except StopIteration:  # of the reader of JSON lines, which looks for the first row of all files
            raise StreamError(f"{source.path}: there is no row") from None
        except Exception as error:
            raise self._not_streamed(error) from error
        return rows if self.max_rows is None else rows.take(self.max_rows)


def _text_file(url: str, source: Source) -> Rows:
    return stream_json_lines(url, source) if data_format(Path(url)) in JSON_LINES else stream_delimited(url)


def _text_rows(urls: list[str], source: Source) -> Iterator[dict[str, Any]]:
    for url in urls:
        try:
            rows = _text_file(url, source)
            for record in rows.records:
                yield {_FILE: url, _COLUMNS: rows.columns, _RECORD: record}
        except ValueError as error:
            raise StreamError(str(error)) from error


_FILE, _COLUMNS, _RECORD = ".file", ".columns", ".record"  # of a row of a text file
_HASHES = ""  # of the texts of a buffer, beside its columns


class Reader:
    """One share of a stream: buffers of 8,192 rows, each permuted, pass behind pass.

    `datasets` deals out whole files where their number is a multiple of ``num_readers``, else every num_readers-th row.

    Args:
        stream: what is shared.
        number: of this share, from 0.
        num_readers: ranks times loader workers.
        position: of an earlier reader of this share; None: the start.
    """

    def __init__(
        self, stream: OpaqueStream, number: int, num_readers: int, position: Mapping[str, Any] | None = None
    ) -> None:
        self.stream, self.number, self.num_readers = stream, number, num_readers
        rows = stream.open()
        self._rows = split_dataset_by_node(rows, number, num_readers) if num_readers > 1 else rows
        position = position or {"pass": 0, "buffer": 0, "before": 0, "place": 0, "start": None}
        self._pass, self._buffer, self._before = position["pass"], position["buffer"], position["before"]
        self._open(position["start"])
        self._fill()
        self._place: int = position["place"]

    def _open(self, start: dict[str, Any] | None) -> None:
        # A copy, for a data set that was iterated starts elsewhere.
        self._reading = copy.deepcopy(self._rows)
        if start is not None:
            self._reading.load_state_dict(copy.deepcopy(start))
        self._start = start
        # Not by iter(): in a loader's worker that one deals the rows out once more.
        self._batches: Iterator[dict[str, list[Any]]] = self._reading.iter(BUFFER_ROWS)

    @property
    def position(self) -> dict[str, Any]:
        """Plain and small: where the reader stands. ``start`` is `datasets`' own state at the start of the buffer."""
        return {
            "pass": self._pass,
            "buffer": self._buffer,
            "before": self._before,
            "place": self._place,
            "start": copy.deepcopy(self._start),
        }

    def take(
        self, num_rows: int
    ) -> tuple[list[list[NDArray[np.int32]]], dict[str, NDArray[Any]], NDArray[np.int64], NDArray[np.int64]]:
        """The next rows.

        Returns:
            Token ids of each text column; targets by name; hashes of the texts, (num_rows, columns); numbers of the
            rows, distinct within a pass.

        Raises:
            ValueError: a bad row, or a share without any row.
        """
        places: list[tuple[dict[str, Any], int, int]] = []
        while len(places) < num_rows:
            if self._place == self._size:
                self._next_buffer()
            slot = int(self._order[self._place])
            places.append((self._cells, slot, self.number + self.num_readers * (self._before + slot)))
            self._place += 1
        columns = [[cells[name][slot] for cells, slot, _ in places] for name in self.stream.columns]
        targets = {
            name: np.array([cells[name][slot] for cells, slot, _ in places], kind)
            for name, kind in (("label", np.int64), ("score", np.float32), ("group", np.int64))
            if name in self.stream.source.columns
        }
        hashes = np.array([cells[_HASHES][slot] for cells, slot, _ in places], np.int64)
        return columns, targets, hashes, np.array([number for _, _, number in places], dtype=np.int64)

    def _next_buffer(self) -> None:
        self._buffer, self._before = self._buffer + 1, self._before + self._size
        self._start = copy.deepcopy(self._reading.state_dict())
        self._fill()

    def _fill(self) -> None:
        path = self.stream.source.path
        try:
            batch = next(self._batches, None)
        except StreamError:
            raise
        except Exception as error:  # the network, the format: each has its own type
            share = f" of share {self.number + 1} of {self.num_readers}" if self.num_readers > 1 else ""
            cause = cause_of(error).rstrip(".")
            raise StreamError(
                f"{path}: cannot be read behind row {self._before:,}{share}: {cause}{self.stream.remedy}"
            ) from error
        if batch is None:
            if self._before == 0 and self.num_readers == 1:
                raise StreamError(f"{path}: there is no row")
            if self._before == 0:
                raise StreamError(
                    f"{path}: no row for reader {self.number + 1} of {self.num_readers} (ranks x "
                    "data.num_workers); the stream is empty, or take fewer readers"
                )
            self._pass, self._buffer, self._before = self._pass + 1, 0, 0
            self._open(None)
            return self._fill()
        try:
            self._cells = self._checked(batch)
        except ValueError as error:
            raise StreamError(str(error)) from error
        self._size, self._place = len(next(iter(self._cells.values()))), 0
        key = mix(self.stream.seed, self._pass, self.number, self._buffer)
        self._order = permute(np.arange(self._size), self._size, key)

    def _checked(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        source, text = self.stream.source, self.stream.text
        bad = StreamedBadRows(source)
        cells: list[list[Any]] = []
        origins: list[tuple[Rows, int]] = []
        for rows in self._by_file(batch):
            numbered = list(rows.records)
            origins += [(rows, number) for number, _ in numbered]
            cells += checked_rows(source, replace(rows, records=iter(numbered)), bad)
        bad.close()
        values: dict[str, Any] = dict(zip(source.canonical_columns, zip(*cells, strict=True), strict=True))
        hashes = []
        for name in self.stream.columns:
            texts = tokenize_column(source, name, values[name], text)
            if not texts.lengths.all():
                rows, number = origins[int(np.argmin(texts.lengths))]
                raise ValueError(
                    f"{rows.place(number)}: column '{source.columns[source.key_of(name)]}': the text has no token"
                )
            values[name] = np.split(texts.ids, np.cumsum(texts.lengths)[:-1])
            hashes.append(texts.hashes())
        values[_HASHES] = np.stack(hashes, axis=1)
        return values

    def _by_file(self, batch: dict[str, list[Any]]) -> Iterator[Rows]:
        """The rows of a buffer; of each file apart where it is known."""
        if _FILE in batch:
            rows_of_file = zip(batch[_FILE], batch[_COLUMNS], batch[_RECORD], strict=True)
            for (file, columns), same in groupby(rows_of_file, itemgetter(0, 1)):
                yield Rows(file, ":", columns, (record for *_, record in same))
            return
        records = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        share = f" (share {self.number + 1} of {self.num_readers})" if self.num_readers > 1 else ""
        features = self._rows.features or {}
        names = {name: kind.names for name, kind in features.items() if isinstance(kind, ClassLabel)}
        name = self.stream.source.path + share
        yield Rows(name, ": row ", list(batch), iter(enumerate(records, self._before + 1)), names)


class OpaqueBatches(Dataset[PackedBatch]):
    """Item t is this rank's next batch; the steps must come in their order.

    Args:
        stream: of the run.
        batch_size: rows of a step over all ranks.
        rank: of this process.
        world_size: number of ranks.
        num_workers: loader processes of each rank.
        steps_per_message: neighbouring steps that the loader gives to one worker.
        positions: of this rank's readers, by worker, where the run goes on; the caller keeps it up to date, for every
            epoch starts new workers, which read on from there.
    """

    def __init__(
        self,
        stream: OpaqueStream,
        batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        steps_per_message: int,
        positions: Mapping[int, Mapping[str, Any]],
    ) -> None:
        self.stream = stream
        self.rows_per_rank = split_rows(batch_size, world_size)
        self.rank, self.world_size = rank, world_size
        self.num_readers = max(1, num_workers)
        self.steps_per_message = steps_per_message
        self.positions = positions
        self._readers: dict[int, Reader] = {}

    def __getitem__(self, step: int) -> PackedBatch:
        # The loader's messages go to its workers in turn, so each process meets one of these numbers only.
        own = step // self.steps_per_message % self.num_readers
        if own not in self._readers:
            number, all_readers = self.rank * self.num_readers + own, self.world_size * self.num_readers
            self._readers[own] = Reader(self.stream, number, all_readers, self.positions.get(own))
        num_rows = self.rows_per_rank[self.rank]
        columns, found, hashes, numbers = self._readers[own].take(num_rows)
        may_lack_texts = self.stream.source.may_lack_texts
        targets = targets_of(numbers, found, hashes, may_lack_texts, self.rows_per_rank, self.rank)
        together = pack if self.stream.text.documents is None else pack_towers
        return replace(together(columns, targets, num_rows=num_rows), position=(own, self._readers[own].position))
