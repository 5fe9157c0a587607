"""Rows of one file as dictionaries, each with its place in the file, so that a bad row can be found again."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.files import JSON_LINES, data_format
from trainer.messages import cause_of

MAX_TEXT_CHARS = 1_000_000
_MAX_LINE_BYTES = 1 << 24
_BLOCK_BYTES = 1 << 21
_GZIP = b"\x1f\x8b"  # its first bytes

# A row, or the reason why there is none; the number counts lines of text files, rows of tables, from 1.
Record = tuple[int, "dict[str, Any] | str"]


@dataclass
class Rows:
    """The rows of one file.

    Attributes:
        name: of the file, as the user wrote it.
        unit: what stands between name and number in a place: ``name:17`` or ``name: row 17``.
        columns: found in the file; empty where no row could be read.
        records: numbered rows.
        class_names: for columns that hold class numbers of a datasets ClassLabel, their names.
    """

    name: str
    unit: str
    columns: list[str]
    records: Iterator[Record]
    class_names: dict[str, list[str]] = field(default_factory=dict)

    def place(self, number: int) -> str:
        return f"{self.name}{self.unit}{number}"


def read_file(path: Path, wanted: Collection[str] | None) -> Rows:
    """Open a table; its rows are read while the iterator runs.

    Args:
        path: of Parquet or Arrow.
        wanted: columns to read, None for all.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    suffix = data_format(path)
    try:
        if suffix == ".parquet":
            return _read_parquet(path, wanted)
        assert suffix == ".arrow", suffix
        return _read_arrow(path, wanted)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as {suffix[1:]}: {error}") from error


@dataclass(frozen=True)
class Block:
    """Some whole lines of a text file.

    Attributes:
        first: number of the first line, from 1.
        lines: with their ends; the last line of the file may have none.
        bytes_read: of the file, to the end of these lines or a little beyond.
    """

    first: int
    lines: bytes
    bytes_read: int

    def texts(self) -> Iterator[str]:
        """Lines without their line feed.

        Bytes that are not UTF-8 become lone surrogates, which the check of the text refuses: so only the row that
        holds them is bad.
        """
        for raw in self.lines.removesuffix(b"\n").split(b"\n"):
            yield raw.decode("utf-8", errors="surrogateescape")

    def numbered(self) -> Iterator[tuple[int, str]]:
        """Lines with their number, without their end."""
        for number, line in enumerate(self.texts(), self.first):
            yield number, line.rstrip("\r")


@contextmanager
def _opened(path: Path | str) -> Iterator[BinaryIO]:
    if isinstance(path, Path) or "://" not in path:
        with open(path, "rb") as file:
            yield file
        return
    import fsspec

    with fsspec.open(path, "rb") as far:
        yield io.BufferedReader(far)  # the files of fsspec have no read1


def text_blocks(path: Path | str) -> Iterator[Block]:
    """A text file, also gzipped, in blocks of about 2 MB; the first one is small.

    Args:
        path: of a file, or its address with a protocol.

    Raises:
        ValueError: it is no UTF-8 text with line feeds, or the gzip data are damaged.
    """
    number, held, damage = 1, b"", None
    with _opened(path) as raw, gzip.open(raw) if Path(path).suffix == ".gz" else nullcontext(raw) as file:
        while damage is None:
            parts, missing, ended = [held], _BLOCK_BYTES if number > 1 else _BLOCK_BYTES // 32, False
            while missing > 0 and not ended and damage is None:
                try:
                    chunk = file.read1(min(1 << 20, missing))  # type: ignore[union-attr]
                except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                    damage, chunk = error, b""  # the lines before it count
                else:
                    ended = not chunk
                parts.append(chunk)
                missing -= len(chunk)
            block = b"".join(parts)
            if number == 1 and not held:
                if why := _no_text(block):
                    raise ValueError(f"{path}: {why}")
                block = block.removeprefix(b"\xef\xbb\xbf")
            cut = len(block) if ended else block.rfind(b"\n") + 1
            if cut:
                yield Block(number, block[:cut], raw.tell())
                number += block.count(b"\n", 0, cut)
            if ended:
                return
            held = block[cut:]
            if len(held) > _MAX_LINE_BYTES:
                if number == 1 and data_format(Path(path)) in JSON_LINES and held.startswith(b"["):
                    raise _one_document(path)
                raise ValueError(f"{path}:{number}: a line over {_MAX_LINE_BYTES:,} bytes; is it text?")
    # Never skipped as one bad row: nobody knows how many rows are behind it.
    raise _damaged(path, f"{path}:{number}", damage, was_gzip=number > 1 or bool(block)) from damage


def _damaged(path: Path | str, place: str, error: Exception, was_gzip: bool) -> ValueError:
    """What to do about gzip data that end at a ``place`` with an ``error``, or that were none from the start."""
    if was_gzip or not isinstance(error, gzip.BadGzipFile):
        return ValueError(f"{place}: gzip data cut short or damaged ({error}); fetch the file again")
    return ValueError(
        f"{path}: its name ends in .gz, but gzip did not write it ({error}); take .gz off its name if it is not "
        "compressed, compress it with gzip if it is otherwise, or fetch it again"
    )


def _no_text(start: bytes) -> str:
    """Why a file that starts so can't be read as UTF-8 lines, and what to do; empty where it may be."""
    for magic, suffix in ((_GZIP, ".gz"), (b"PAR1", ".parquet"), (b"ARROW1", ".arrow")):
        if start.startswith(magic):
            return f"holds what a {suffix} file holds; rename it so that its name ends in {suffix}"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16, not UTF-8; convert it with `iconv -f UTF-16 -t UTF-8`"
    if b"\0" in start[:2] and start[:2].strip(b"\0"):  # without the mark at its start, but with an ASCII character
        return f"is UTF-16, not UTF-8; convert it with `iconv -f UTF-16{'BE' if start[0] == 0 else 'LE'} -t UTF-8`"
    if b"\r" in start.rstrip() and b"\n" not in start:
        return "its lines end with a carriage return alone; convert it with `tr '\\r' '\\n'`"
    return ""


def _one_document(path: Path | str) -> ValueError:
    return ValueError(f"{path}: is one JSON document, not one object per line; convert it with `jq -c '.[]'`")


def json_records(path: Path | str, block: Block) -> Iterator[Record]:
    """The rows of a block, or why there is none.

    Raises:
        ValueError: the file is one JSON document, over many lines or all in the first.
    """
    for number, line in block.numbered():
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == 1 and line.strip() == "[":
                raise _one_document(path) from error
            if number == 1 and line.strip() == "{":
                raise ValueError(
                    f"{path}: has a JSON object over many lines, not one per line; convert it with `jq -c .`, or with "
                    "`jq -c '.KEY[]'` where it lists the rows under a key"
                ) from error
            cause = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            yield number, f"invalid JSON: {cause}"
            continue
        if number == 1 and isinstance(row, list) and all(isinstance(one, dict) for one in row):
            raise _one_document(path)
        yield number, row if isinstance(row, dict) else f"a JSON object is expected, not {type(row).__name__}"


def _read_parquet(path: Path, wanted: Collection[str] | None) -> Rows:
    # Parquet is compressed inside; a gzipped one has to be unpacked whole.
    file = pq.ParquetFile(io.BytesIO(_unpacked(path)) if path.suffix == ".gz" else path)
    columns = wanted_columns(str(path), file.schema_arrow.names, wanted)
    batches = file.iter_batches(batch_size=1000, columns=columns)
    return table_rows(str(path), file.schema_arrow, _refuse_damage(path, batches))


def _read_arrow(path: Path, wanted: Collection[str] | None) -> Rows:
    data = pa.memory_map(str(path)) if path.suffix != ".gz" else pa.BufferReader(_unpacked(path))
    reader: Any
    try:
        reader = pa.ipc.open_file(data)
        batches: Iterable[pa.RecordBatch] = (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pa.ArrowInvalid:  # datasets writes streams
        data.seek(0)
        reader = batches = pa.ipc.open_stream(data)
    columns = wanted_columns(str(path), reader.schema.names, wanted)
    return table_rows(str(path), reader.schema, _refuse_damage(path, (batch.select(columns) for batch in batches)))


def wanted_columns(name: str, found: Sequence[str], wanted: Collection[str] | None) -> list[str]:
    """Those of the columns ``found`` in the file ``name`` that are read; None: all.

    Raises:
        ValueError: two of them have one name: a row would hold one cell for both.
    """
    columns = [column for column in found if wanted is None or column in wanted]
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise ValueError(f"{name}: the schema names column '{twice[0]}' twice; give each a name of its own")
    return columns


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        return gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, str(path), error, was_gzip=data.startswith(_GZIP)) from error


def _refuse_damage(path: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches; damage shows only when one is read, long after the file was opened."""
    number = 0
    try:
        for batch in batches:
            yield batch
            number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read as {data_format(path)[1:]} behind row {number:,}: "
            f"{cause_of(error).rstrip('.')}; fetch the file again"
        ) from error


def table_rows(name: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch | pa.Table]) -> Rows:
    """Rows of Arrow batches; ``schema`` may have more columns than they."""
    from datasets import ClassLabel, Features  # slow to import, and JSON lines do not need it

    class_names: dict[str, list[str]] = {}
    if b"huggingface" in (schema.metadata or {}):
        features = Features.from_arrow_schema(schema)
        class_names = {k: f.names for k, f in features.items() if isinstance(f, ClassLabel)}
    return Rows(name, ": row ", schema.names, _table_records(batches), class_names)


def _table_records(batches: Iterable[pa.RecordBatch | pa.Table]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, 1000):  # a batch of a saved data set may hold the whole set
            part = batch.slice(start, 1000)
            try:
                rows = part.to_pylist()
            except (ValueError, OverflowError):  # among them bytes that are not UTF-8, and times before the year 1
                rows = [_decode(part.slice(i, 1)) for i in range(part.num_rows)]
            for row in rows:
                number += 1
                yield number, row


def _decode(row: pa.RecordBatch | pa.Table) -> dict[str, Any] | str:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"not valid UTF-8 ({error.reason})"
    except (ValueError, OverflowError) as error:
        return f"holds a value that can't be read ({error})"
