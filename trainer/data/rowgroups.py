"""Row groups of Parquet and Arrow files, near or far: what can be read in pieces, and how one piece is fetched."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.columns import find_column, refuse_moved
from trainer.data.files import data_files, data_format, is_hub_id, names_of_split
from trainer.data.parts import SLICE_ROWS
from trainer.data.rows import wanted_columns
from trainer.messages import cause_of, did_you_mean

if TYPE_CHECKING:
    from trainer.data.sources import Source

_READERS = 16  # footers that are read at the same time: far files answer slowly, not seldom
_INDEXED = (".parquet", ".arrow")


class StreamError(ValueError):
    """Rows that can't be used, met while training.

    A loader puts the traceback of its worker before the message; what the user can act on is the end.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("StreamError: ")[2].rstrip())


@dataclass(frozen=True)
class GroupFile:
    """A file that can be read by group.

    Attributes:
        url: path, or address with its protocol.
        group_sizes: rows of each row group (Parquet) or record batch (Arrow).
        columns: names of all columns.
        digest: of the size of the file and its footer, which holds the place and the statistics of every group.
    """

    url: str
    group_sizes: tuple[int, ...]
    columns: tuple[str, ...]
    digest: str

    @property
    def local(self) -> Path | None:
        """Where the file lies on this machine; None for an address."""
        return None if "://" in self.url else Path(self.url)


def group_files(source: Source) -> list[GroupFile] | None:
    """The files of a source with their row groups; only metadata are read. None: it has files of other kinds.

    Raises:
        ValueError: there is no file, it can't be read, or a column is missing or stands twice.
    """
    urls = file_urls(source)
    if urls is None or any(_suffix(url) not in _INDEXED for url in urls):
        return None
    if packed := [url for url in urls if url.endswith(".gz")]:
        raise ValueError(
            f"{packed[0]}: a gzipped {_suffix(packed[0])[1:]} file has no row groups to stream by; unpack it, "
            "or set streaming: false"
        )
    with ThreadPoolExecutor(_READERS) as pool:
        files = list(pool.map(_read_footer, urls, [_stamp(url) for url in urls]))
    earlier: dict[tuple[str, ...], str] = {}
    for file in files:
        wanted_columns(file.url, file.columns, source.read_columns)
        for key, column in source.asked:
            find_column(column, file.url, file.columns, key)
        refuse_moved(source.asked, file.url, file.columns, earlier)
    if not sum(sum(file.group_sizes) for file in files):
        raise ValueError(f"{source.path}: there is no row")
    return files


def file_urls(source: Source) -> list[str] | None:
    """The files of a source: local paths, or addresses with a protocol; None for a hub set of other files.

    Raises:
        ValueError: nothing is there.
    """
    if "://" in source.path:
        return _remote_files(source.path, source.split)
    if is_hub_id(source.path):
        return _hub_files(source)
    return [str(file) for file in data_files(source.path, source.split)]


def _remote_files(path: str, split: str) -> list[str]:
    import fsspec

    within: dict[str, str] = {}  # the way from a folder -> name
    try:
        system, root = fsspec.core.url_to_fs(path)
        if "*" in root or "?" in root or "[" in root:
            found = sorted(system.glob(root))
        elif system.isdir(root):
            within = {name.removeprefix(root): name for name in system.find(root) if data_format(Path(name))}
            within = {way: name for way, name in within.items() if "/." not in way}
            found = []
        else:
            found = [root] if system.exists(root) else []
    except Exception as error:  # each file system has its own types; a missing driver is an ImportError
        raise ValueError(f"{path}: cannot be listed ({type(error).__name__}: {cause_of(error)})") from error
    found += [within[name] for name in names_of_split(path, list(within), split)] if within else []
    if not found:
        raise ValueError(f"{path}: no file is there")
    return [system.unstrip_protocol(name) for name in found]


def _hub_files(source: Source) -> list[str] | None:
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(source.path, name=source.subset, revision=source.revision)
        files = [str(file) for file in (builder.config.data_files or {}).get(source.split, [])]
    except Exception as error:  # the hub, the network, the subset: each has its own type
        raise ValueError(
            f"{source.path}: neither a file or folder here nor a hub data set that can be read "
            f"({type(error).__name__}: {cause_of(error)}).{did_you_mean(source.path, os.listdir())}"
        ) from error
    return files or None


def _suffix(url: str) -> str:
    return data_format(Path(url))


def _stamp(url: str) -> tuple[int, int]:
    if "://" in url:
        return 0, 0
    stat = os.stat(url)
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    """A seekable file, near or far."""
    if "://" not in url:
        with pa.OSFile(url) as file:
            yield file
        return
    import fsspec

    with fsspec.open(url, "rb") as file:
        yield file


@cache  # one process asks several times; size and time of change make a changed local file a new one
def _read_footer(url: str, stamp: tuple[int, int]) -> GroupFile:
    try:
        with _opened(url) as file:
            size = file.seek(0, io.SEEK_END) or file.tell()
            if _suffix(url) == ".parquet":
                meta = pq.ParquetFile(file).metadata
                sizes = tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups))
                footer = meta.serialized_size + 8  # its length and the magic number stand behind it
                columns = tuple(meta.schema.to_arrow_schema().names)
            else:
                batches = _batches(url, file)
                sizes = tuple(batch.num_rows for batch in batches.batches)
                columns = tuple(batches.schema.names)
                footer = min(size, 1 << 16)
            file.seek(size - footer)
            digest = hashlib.sha256(f"{size} {sizes} ".encode() + file.read(footer)).hexdigest()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{url}: cannot be read as {_suffix(url)[1:]}: {error}") from error
    return GroupFile(url, sizes, columns, digest)


def stream_digests(source: Source) -> list[str]:
    """Of files without a footer: a hash of size, first and last MiB each."""
    urls = file_urls(source)
    if urls is None:  # a hub set that names no files
        return [json.dumps([source.path, source.subset, source.split, source.revision])]
    digests = []
    for url in urls:
        try:
            with _opened(url) as file:
                size = file.seek(0, io.SEEK_END) or file.tell()
                file.seek(0)
                ends = file.read(1 << 20)
                file.seek(max(0, size - (1 << 20)))
                digests.append(hashlib.sha256(f"{size} ".encode() + ends + file.read(1 << 20)).hexdigest())
        except OSError as error:
            raise ValueError(f"{url}: cannot be read: {error.strerror or error}") from error
    return digests


@dataclass
class _Batches:
    schema: pa.Schema
    batches: list[pa.RecordBatch]


def _batches(url: str, file: Any) -> _Batches:
    """Record batches of an Arrow file; memory-mapped where it is local, so that none is read before it is used."""
    data = pa.memory_map(url) if "://" not in url else pa.PythonFile(file, "r")
    data.seek(0)
    reader: Any
    try:
        reader = pa.ipc.open_file(data)
        return _Batches(reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)])
    except pa.ArrowInvalid:
        data.seek(0)
        reader = pa.ipc.open_stream(data)  # what datasets writes
        return _Batches(reader.schema, list(reader))


def write_group(file: GroupFile, number: int, wanted: Collection[str] | None, path: Path) -> None:
    """Fetch the wanted columns (None: all) of one Parquet row group, or Arrow record batch, into a local Arrow file.

    Raises:
        ValueError: it can't be read.
    """
    try:
        with _opened(file.url) as opened:
            batches: Iterable[pa.RecordBatch]
            if _suffix(file.url) == ".parquet":
                # Far reads are joined into few; near ones page by page, so that memory holds a page and not a group.
                meta = _metadata(file.url, _stamp(file.url))
                parquet = pq.ParquetFile(opened, metadata=meta, pre_buffer=file.local is None)
                schema = parquet.schema_arrow
                names = [name for name in schema.names if wanted is None or name in wanted]
                batches = parquet.iter_batches(SLICE_ROWS, row_groups=[number], columns=names, use_threads=False)
            else:
                found = _batches(file.url, opened)
                schema = found.schema
                names = [name for name in schema.names if wanted is None or name in wanted]
                batches = [found.batches[number].select(names)]
            kept = pa.schema([schema.field(name) for name in names], metadata=schema.metadata)
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, kept) as writer:
                for batch in batches:
                    writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=kept))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file.url}: row group {number + 1} cannot be read: {error}") from error


def read_arrow_rows(file: GroupFile, number: int, wanted: Collection[str] | None, start: int, stop: int) -> pa.Table:
    """Rows of a record batch of a local Arrow file, in place."""
    found = _mapped(file.url, _stamp(file.url))
    names = [name for name in found.schema.names if wanted is None or name in wanted]
    batch = found.batches[number].select(names)
    return pa.Table.from_batches([batch.replace_schema_metadata(found.schema.metadata)]).slice(start, stop - start)


@lru_cache(maxsize=16)
def _metadata(url: str, stamp: tuple[int, int]) -> pq.FileMetaData:
    """Of a Parquet file whose groups are being read: the more there are, the longer its footer."""
    with _opened(url) as file:
        return pq.read_metadata(file)


@lru_cache(maxsize=16)
def _mapped(url: str, stamp: tuple[int, int]) -> _Batches:
    return _batches(url, None)
