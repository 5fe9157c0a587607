"""Token ids of a source that is read while the model trains: slices are fetched, tokenised and kept for a while.

A folder of blocks under the cache holds a file for each row group that is in use (`group-*.arrow`, the wanted columns)
and one for each slice of it (`slice-*.arrow`, 2,048 rows as token ids). Ranks and loader workers share the folder
and the work: each builds slices that no other is building. Behind what Arrow wrote each file has the CRC-32 of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from trainer.data.cache import keep_open, place_of
from trainer.data.checks import checked_rows
from trainer.data.parts import SLICE_ROWS, BlockShuffle
from trainer.data.rowgroups import (
    StreamError,
    group_files,
    read_arrow_rows,
    stream_digests,
    write_group,
)
from trainer.data.rows import table_rows
from trainer.data.streamrows import StreamedBadRows, tokenize_column

if TYPE_CHECKING:
    from trainer.data.sources import Source
    from trainer.encoder.text import TextPreparation

logger = logging.getLogger(__name__)

_VERSION = 2  # of the blocks: raise it when the same source and tokenizer give other files
_LAYOUT = "crc"  # of a file: change it when the same rows lie there in another way
_CRC_BYTES = 4
_LOCKS = 64
_OPEN_SLICES = 64  # that a process keeps mapped
_TARGETS = {"score": pa.float32(), "label": pa.int64(), "group": pa.int64()}
_HASH = ".hash"  # behind the name of a text column: hashes of its texts
GIB = 1 << 30


class _Slice:
    """Token ids and targets of the rows of a slice, mapped."""

    def __init__(self, path: Path) -> None:
        batch = _open_block(path).get_batch(0)
        os.utime(path)  # the oldest is dropped first
        names = [field.name for field in batch.schema if pa.types.is_large_list(field.type)]
        self.values = {c: batch.column(c).values.to_numpy(zero_copy_only=True) for c in names}
        self.offsets = {c: batch.column(c).offsets.to_numpy(zero_copy_only=True) for c in names}
        self.targets = {c: batch.column(c).to_numpy() for c in _TARGETS if c in batch.schema.names}
        self.hashes = np.stack([batch.column(f"{c}{_HASH}").to_numpy() for c in names], axis=1)


class StreamedTable:
    """Token ids and targets of N rows of Parquet or Arrow files; a slice is there when it is first asked for.

    Reads as a `TokenTable` does, but knows nothing of its rows before they are read: no used ids, no lengths, no
    range of labels.

    Args:
        source: with ``streaming``; its files are Parquet or Arrow.
        text: turns texts into token ids.
        cache_dir: the blocks lie below it.
        max_bytes: of all blocks of this source; the slices in use stay, should they need more.

    Attributes:
        num_rows: N.
        columns: the text columns, in canonical order.

    Raises:
        ValueError: on opening, no file or no such column; on reading, a bad row (with file and number).
    """

    labels: None = None  # only of rows that are read
    scores: None = None

    def __init__(self, source: Source, text: TextPreparation, cache_dir: Path, max_bytes: int = 20 * GIB) -> None:
        files = group_files(source)
        assert files is not None, source.path
        self.source, self.text, self.cache_dir, self.max_bytes = source, text, Path(cache_dir), max_bytes
        self.columns = source.text_columns
        self.may_lack_texts = source.may_lack_texts
        self.has_towers = text.documents is not None
        self._groups = [(file, number) for file in files for number in range(len(file.group_sizes))]
        self._first_in_file = np.concatenate([np.cumsum(file.group_sizes) - file.group_sizes for file in files])
        self.group_sizes = tuple(chain.from_iterable(file.group_sizes for file in files))
        self._shuffle = BlockShuffle(self.group_sizes)
        self._starts, self.num_rows = self._shuffle.group_starts, self._shuffle.size
        slices_of_group = -(-np.array(self.group_sizes) // SLICE_ROWS)
        self._first_slice = np.concatenate([[0], np.cumsum(slices_of_group)])
        key = f"{_VERSION} {_LAYOUT} {fingerprint(source)} {text.fingerprint}"
        self.folder = place_of(self.cache_dir, "blocks", hashlib.sha256(key.encode()).hexdigest()[:24])
        self._open: OrderedDict[int, _Slice] = OrderedDict()
        self._read_groups: dict[Path, int] = {}  # the inode of those whose bytes were looked at
        self._in_use: list[Collection[int]] = []
        self._ahead: threading.Thread | None = None
        self._is_held = False  # by this process, from its first slice on
        self._unchecked_bytes = max_bytes  # written since the folder's size was last looked at

    def __reduce__(self) -> tuple[type[StreamedTable], tuple[Source, TextPreparation, Path, int]]:
        return StreamedTable, (self.source, self.text, self.cache_dir, self.max_bytes)

    def shuffle(self, max_rows: int | None) -> BlockShuffle:
        """The order of its rows, or of the first ``max_rows`` of them."""
        if max_rows is None or max_rows >= self.num_rows:
            return self._shuffle  # one object, for it remembers the groups of a pass
        cut = np.minimum(self._starts, max_rows)
        return BlockShuffle(tuple(np.diff(cut).tolist()))

    # -- reading ------------------------------------------------------------------------------------------

    def ids(self, column: str, rows: NDArray[np.integer]) -> list[NDArray[np.int32]]:
        """Token ids of the texts of ``rows``: read-only views into files, one (length,) array per row."""
        found = []
        for block, place in self._locate(rows):
            start, stop = block.offsets[column][place : place + 2].tolist()
            found.append(block.values[column][start:stop])
        return found

    def targets(self, rows: NDArray[np.integer]) -> dict[str, NDArray[np.generic]]:
        """What the rows have of label, group (int64) and score (float32): name -> one value per row."""
        located = list(self._locate(rows))
        kinds = {name: kind.to_pandas_dtype() for name, kind in _TARGETS.items() if name in self.source.columns}
        return {c: np.array([block.targets[c][place] for block, place in located], kinds[c]) for c in kinds}

    def hashes(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Hash of each text of ``rows``, (B, C): equal where the pieces are; NO_TEXT where a row has none."""
        found = [block.hashes[place] for block, place in self._locate(rows)]
        return np.array(found, np.int64).reshape(len(rows), len(self.columns))

    def prefetch(self, rows: NDArray[np.integer]) -> None:
        """Start to build the slices of ``rows`` in the background; a thread that is at work goes on alone."""
        slices = sorted(set(self._slices(rows)[0]))
        if (self._ahead and self._ahead.is_alive()) or all(self._path(one).exists() for one in slices):
            return
        self._in_use = [*self._in_use[-1:], slices]
        self._ahead = threading.Thread(target=self._build_ahead, args=(slices,), daemon=True)
        self._ahead.start()

    def _build_ahead(self, slices: list[int]) -> None:
        try:
            self._build_all(slices, wait=False)
        except ValueError:
            pass  # a bad row stops the run at the step that needs it

    def _slices(self, rows: NDArray[np.integer]) -> tuple[list[int], list[int]]:
        """The slice of each of ``rows``, and its place there."""
        groups = np.searchsorted(self._starts, rows, "right") - 1
        within = rows - self._starts[groups]
        return (self._first_slice[groups] + within // SLICE_ROWS).tolist(), (within % SLICE_ROWS).tolist()

    def _locate(self, rows: NDArray[np.integer]) -> Iterator[tuple[_Slice, int]]:
        numbers, places = self._slices(rows)
        missing = [number for number in dict.fromkeys(numbers) if number not in self._open]
        if missing:
            self._in_use = [*self._in_use[-1:], sorted(set(numbers))]
            self._build_all(missing, wait=True)
        for number, place in zip(numbers, places, strict=True):
            yield self._slice(number), place

    def _slice(self, number: int) -> _Slice:
        while number not in self._open:
            try:
                self._open[number] = _Slice(self._path(number))
            except FileNotFoundError:  # another process dropped it between its building and here
                self._build_all([number], wait=True)
            except pa.ArrowInvalid as error:
                _drop_damaged(self._path(number), error)
        self._open.move_to_end(number)
        if len(self._open) > _OPEN_SLICES:
            self._open.popitem(last=False)
        return self._open[number]

    # -- building -----------------------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self.folder / f"slice-{number:08d}.arrow"

    def _group_path(self, group: int) -> Path:
        return self.folder / f"group-{group:07d}.arrow"

    def _build_all(self, slices: Iterable[int], wait: bool) -> None:
        """Build what is missing. One that another process is building is left for last, then waited for."""
        if not self._is_held:
            keep_open(self.folder, {"source": self.source.path, "num_rows": self.num_rows})
            self._is_held = True
        missing = [number for number in slices if not self._path(number).exists()]
        while missing:
            left = [number for number in missing if not self._build_slice(number, wait=False)]
            if not wait:
                return
            if len(left) == len(missing):
                self._build_slice(left[0], wait=True)
            missing = [number for number in left if not self._path(number).exists()]

    def _build_slice(self, number: int, wait: bool) -> bool:
        """False: another process is building it, and we did not wait."""
        return self._build_file(self._path(number), number, wait, lambda path: self._tokenize(number, path))

    def _build_file(self, path: Path, number: int, wait: bool, build: Callable[[Path], None]) -> bool:
        kind = path.name.partition("-")[0]
        with _locked(self.folder / "locks" / f"{kind}-{number % _LOCKS}", wait) as ours:
            if not ours:
                return False
            if not path.exists():
                unfinished = path.with_suffix(".unfinished")  # we hold the lock: whoever left one was killed
                try:
                    build(unfinished)
                    _seal(unfinished)
                except ValueError as error:
                    raise StreamError(str(error)) from error
                with unfinished.open("rb") as written:
                    os.fsync(written.fileno())
                self._unchecked_bytes += unfinished.stat().st_size
                unfinished.rename(path)
        if self._unchecked_bytes > self.max_bytes // 100:
            self._unchecked_bytes = 0
            self._drop_oldest()
        return True

    def _tokenize(self, number: int, path: Path) -> None:
        group = int(np.searchsorted(self._first_slice, number, "right")) - 1
        start = (number - int(self._first_slice[group])) * SLICE_ROWS
        rows = self._read(group, start, min(start + SLICE_ROWS, self.group_sizes[group]))
        file, _ = self._groups[group]
        before = int(self._first_in_file[group]) + start
        records = table_rows(file.url, rows.schema, rows.to_batches())
        numbered = replace(records, records=((before + row, record) for row, record in records.records))
        bad = StreamedBadRows(self.source)
        cells = list(checked_rows(self.source, numbered, bad))
        bad.close()
        values = dict(zip(self.source.canonical_columns, zip(*cells, strict=True), strict=True))
        arrays: dict[str, pa.Array] = {}
        for name in self.columns:
            texts = tokenize_column(self.source, name, values[name], self.text)  # type: ignore[arg-type]
            if not texts.lengths.all():
                place = numbered.place(before + int(np.argmin(texts.lengths)) + 1)
                column = self.source.columns[self.source.key_of(name)]
                raise ValueError(f"{place}: column '{column}': the text has no token")
            offsets = np.concatenate([[0], np.cumsum(texts.lengths)])
            arrays[name] = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(texts.ids))
            arrays[f"{name}{_HASH}"] = pa.array(texts.hashes())
        for name, kind in _TARGETS.items():
            if name in values:
                arrays[name] = pa.array(values[name], kind)
        batch = pa.record_batch(list(arrays.values()), names=list(arrays))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)

    def _read(self, group: int, start: int, stop: int) -> pa.Table:
        """Rows of a group, which the first to come fetches."""
        file, number = self._groups[group]
        columns = self.source.read_columns
        if file.local is not None and file.local.suffix.lower() == ".arrow":
            return read_arrow_rows(file, number, columns, start, stop)
        path = self._group_path(group)
        while True:
            try:
                os.utime(path)
                # Once in a process: a group has many slices, and its bytes are more than theirs.
                inode = path.stat().st_ino
                rows = _open_block(path, verify=self._read_groups.get(path) != inode).read_all()
                self._read_groups[path] = inode
                return rows.slice(start, stop - start)
            except FileNotFoundError:
                self._build_file(path, group, True, lambda unfinished: write_group(file, number, columns, unfinished))
            except pa.ArrowInvalid as error:
                _drop_damaged(path, error)

    def _drop_oldest(self) -> None:
        """Keep the folder under its bound. Whoever has a dropped file mapped reads on."""
        files = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(".arrow"):
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # another process does the same
                    continue
                files.append((stat.st_mtime_ns, stat.st_size, entry.name))
        excess = sum(size for _, size, _ in files) - self.max_bytes
        if excess <= 0:
            return
        kept = set()
        for number in chain.from_iterable(self._in_use):
            group = int(np.searchsorted(self._first_slice, number, "right")) - 1
            kept |= {self._path(number).name, self._group_path(group).name}
        excess += self.max_bytes // 10  # not again at once
        for _, size, name in sorted(files):
            if excess <= 0:
                return
            if name not in kept:
                (self.folder / name).unlink(missing_ok=True)
                excess -= size


def _seal(path: Path) -> None:
    """Write the checksum behind what stands in a file."""
    with path.open("r+b") as file:
        crc = 0
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
        file.write(crc.to_bytes(_CRC_BYTES, "little"))


def _open_block(path: Path, verify: bool = True) -> pa.ipc.RecordBatchFileReader:
    """A sealed file, mapped.

    Args:
        path: of a slice or a group.
        verify: compare its bytes with its checksum.

    Raises:
        pa.ArrowInvalid: it is damaged.
    """
    whole = pa.memory_map(str(path)).read_buffer()
    content = whole.slice(0, max(0, whole.size - _CRC_BYTES))
    if verify and zlib.crc32(content).to_bytes(_CRC_BYTES, "little") != whole[-_CRC_BYTES:].to_pybytes():
        raise pa.ArrowInvalid(f"the checksum of its {whole.size:,} bytes is another")
    return pa.ipc.open_file(pa.BufferReader(content))


def _drop_damaged(path: Path, error: pa.ArrowInvalid) -> None:
    """For the next to ask makes it again; no report names its size, for the folder grows while it is in use."""
    logger.warning("%s: is damaged (%s); it is made again", path, error)
    path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Whether we hold the lock; only without ``wait`` it can be another's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def fingerprint(source: Source) -> str:
    """Hash of what streaming gives: size and footer of each file (not all its bytes, which may be far), and the spec.

    A Parquet footer holds the place, size and statistics of every column chunk, so other rows have another one but
    for rows that were changed by hand without changing a size, the least or the greatest value. Of files without a
    footer the first and the last MiB count.
    """
    files = group_files(source)
    digests = [file.digest for file in files] if files is not None else stream_digests(source)
    columns = sorted(source.columns.items())
    maps = [source.score_range and list(source.score_range), source.label_map and sorted(source.label_map.items())]
    prompts = sorted((source.prompts or {}).items())
    lists = [source.max_negatives] if source.may_lack_texts else []
    spec = json.dumps([_VERSION, digests, columns, maps, prompts, *lists], ensure_ascii=True)
    return hashlib.sha256(spec.encode()).hexdigest()[:24]
