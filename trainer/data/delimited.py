"""CSV and TSV: Arrow reads blocks in which every quote closes in its own cell and line, on all cores.

The others are read record by record. A cell that spans lines takes the blocks behind its own with it, so whoever begins
to read a block stands between two records.
"""

from __future__ import annotations

import csv
import logging
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from trainer.data.blocks import PEEKED, checked_batch, is_plain, no_batch, parsed_blocks
from trainer.data.columns import find_column, is_position
from trainer.data.files import data_format
from trainer.data.rows import MAX_TEXT_CHARS, Block, Record, Rows, text_blocks
from trainer.data.values import is_word
from trainer.distributed import gather

if TYPE_CHECKING:
    from trainer.data.sources import Source

logger = logging.getLogger(__name__)

_BOM = b"\xef\xbb\xbf"
_QUOTED = 5  # names of columns that a warning quotes
# Cells of a record with the number of its first line, or the reason why there are none.
_Cells = tuple[int, "list[str] | str"]


def read_delimited(
    path: Path, source: Source | None = None, accept: Callable[[pa.RecordBatch], None] = no_batch
) -> Rows:
    """The rows of a file that need a closer look; the others go to ``accept`` as batches of canonical columns.

    The two come in the order of the file: ``accept`` is called when all rows before have been taken from the records.

    Args:
        path: of CSV or TSV, also gzipped.
        source: what is asked for; without it every row is read cell by cell.
        accept: gets checked rows: large_string texts, then float32 score and int64 label.

    Raises:
        ValueError: the file as a whole cannot be read, or its header names a column twice.
    """
    delimiter = "," if data_format(path) == ".csv" else "\t"
    cells_of = _cells_of(path)
    header, head, blocks = _begin(path)
    if source:
        warn_of_header(source, path, header)
    columns = source and _columns(source, path, header, [cells for _, cells in head])

    def parse(lines: bytes) -> pa.RecordBatch | None:
        return _parse(lines, source, header, columns, delimiter) if source and columns else None

    def records() -> Iterator[Record]:
        yield from (_record(path, header, *one) for one in head)
        parsed = parsed_blocks(path, blocks, parse)
        following = (block for block, _ in parsed)  # for a record that goes on behind its block
        for block, batch in parsed:
            if batch is None:
                yield from (_record(path, header, *one) for one in cells_of(block, following))
            else:
                accept(batch)

    return Rows(str(path), ":", header, records())


def stream_delimited(url: str) -> Rows:
    """The rows of a file from front to back, as ``read_delimited`` numbers and splits them; little of it is held.

    Args:
        url: path of CSV or TSV, or its address with a protocol, also gzipped.

    Raises:
        ValueError: the file as a whole cannot be read, or its header names a column twice.
    """
    header, head, blocks = _begin(url)
    behind = chain.from_iterable(_cells_of(url)(block, blocks) for block in blocks)
    return Rows(url, ":", header, (_record(url, header, *one) for one in chain(head, behind)))


def warn_of_header(source: Source, path: Path | str, header: list[str]) -> None:
    """Say of a first line that it may be a row, where the config has no name that such a file would lack."""
    by_position = all(is_position(column) for _, column in source.asked)
    if header and by_position and not any(str(place) in header for place in source.columns.values()):
        names = ", ".join(f"'{name:.40}'" for name in header[:_QUOTED]) + (", ..." if len(header) > _QUOTED else "")
        gather.warn(
            logger,
            f"{path}: its first line is taken for the names of its columns: {names}; if it is a row, write a header "
            "above it",
        )


def _cells_of(path: Path | str) -> Callable[[Block, Iterator[Block]], Iterator[_Cells]]:
    return _csv_cells if data_format(Path(path)) == ".csv" else _tsv_cells


def _begin(path: Path | str) -> tuple[list[str], list[_Cells], Iterator[Block]]:
    """The header, the first records behind it, and the blocks behind those."""
    head: list[_Cells] = []
    try:
        blocks = text_blocks(path)
        for block in blocks:
            head += _cells_of(path)(block, blocks)
            if len(head) > PEEKED:
                break
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as {data_format(Path(path))[1:]}: {error}") from error
    return _header(path, head[0][1] if head else []), head[1:], blocks


def _header(path: Path | str, cells: list[str] | str) -> list[str]:
    if isinstance(cells, str):
        raise ValueError(f"{path}:1: {cells}")
    header = [name.strip() for name in cells]
    if header.count("") > 1 and any(header):  # Excel writes such behind the last column; a place is a name to them
        header = [name or str(place) for place, name in enumerate(header)]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"{path}:1: the header names column '{twice[0]}' twice")
    return header


def _record(path: Path | str, header: list[str], number: int, cells: list[str] | str) -> Record:
    if isinstance(cells, str):
        return number, cells
    if len(cells) != len(header):
        is_cut = len(cells) < len(header) and data_format(Path(path)) == ".tsv"
        hint = "; a row of a TSV is one line: write texts with line breaks as CSV or JSON lines" if is_cut else ""
        return number, f"{len(cells)} cells, the header has {len(header)}{hint}"
    # The file behind it may have begun with a byte order mark.
    if len(header) > 1 and sorted(cell.strip('\ufeff" ') for cell in cells) == sorted(header):
        raise ValueError(
            f"{path}:{number}: a second header, {', '.join(cells)}: files were joined here; name them apart in path (a "
            "glob or a folder), or, where the columns keep their order, take this line out"
        )
    return number, dict(zip(header, cells, strict=True))


# -- record by record -------------------------------------------------------------------------------------


def _csv_cells(block: Block, following: Iterator[Block]) -> Iterator[_Cells]:
    """The records of a block, numbered by their first line; a quoted cell may span lines.

    A record that goes on behind the block takes the next ones, and then their records come too. A quote that is never
    closed swallows lines up to the next quote. Reading goes on at the line after the record's first one, so that only
    that row is lost.
    """
    waiting = deque(block.texts())  # with carriage returns: inside quotes they are text
    taken: list[str] = []

    def feed() -> Iterator[str]:
        while True:
            if not waiting and taken and (more := next(following, None)) is not None:
                waiting.extend(more.texts())
            if not waiting:
                return
            taken.append(waiting.popleft())
            yield taken[-1] + "\n"

    limit = csv.field_size_limit(MAX_TEXT_CHARS)
    try:
        reader = csv.reader(feed(), strict=True)
        number = block.first
        while True:
            taken.clear()
            try:
                cells: list[str] | str = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                cells = _cause(error)
                waiting.extendleft(reversed(taken[1:]))
                del taken[1:]
                reader = csv.reader(feed(), strict=True)
            if cells:  # a blank line is no row
                yield number, cells
            number += len(taken)
    finally:
        csv.field_size_limit(limit)


def _cause(error: csv.Error) -> str:
    """Why a record can't be split, from the words of the reader."""
    if "new-line" in str(error):
        return "a carriage return stands outside quotes; put its text in quotes, or take it out"
    if "field limit" in str(error):
        return f"a quote is not closed or a text is over {MAX_TEXT_CHARS:,} characters"
    return f"a quote is not closed, or one inside quotes is not doubled ({error})"


def _tsv_cells(block: Block, following: Iterator[Block]) -> Iterator[_Cells]:
    """The records of a block, one a line."""
    return ((number, _split_tabs(line)) for number, line in block.numbered() if line)


def _split_tabs(line: str) -> list[str]:
    """Cells of a line. Many TSV files hold bare quotes: a quote binds only if it closes in its own cell."""
    cells = line.split("\t")
    if '"' not in line:
        return cells
    try:
        return next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error:
        return cells


# -- by blocks --------------------------------------------------------------------------------------------


def _columns(source: Source, path: Path, header: list[str], head: list[list[str] | str]) -> dict[str, str] | None:
    """Canonical name -> column of the file; None where Arrow can't do what the source asks for, or nothing is there."""
    if not header or not is_plain(source):
        return None
    found: dict[str, str] = {}
    for name in source.canonical_columns:
        column = find_column(source.columns[name], str(path), header, f"columns.{name}")
        if column.fields:
            return None
        place = header.index(column.name)
        is_number = name in ("score", "label") and name != source.mapped_column
        if is_number and any(is_word(cells[place]) for cells in head if len(cells) == len(header)):
            return None
        found[name] = column.name
    return found


def _parse(
    lines: bytes, source: Source, header: list[str], columns: dict[str, str], delimiter: str
) -> pa.RecordBatch | None:
    """The checked rows of a block; None where any row is not plainly good."""
    if b"\r" in lines or b"\0" in lines or _BOM in lines or not _is_regular(lines, delimiter):
        return None
    used = list(dict.fromkeys(columns.values()))
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(lines),
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=len(lines) + 1, column_names=header),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(used, pa.large_string()), include_columns=used, strings_can_be_null=False
            ),
        )
        # In a second header, in whatever order, each cell is a name; a text that is one as well gets a closer look.
        names = pc.is_in(pc.utf8_trim_whitespace(table.column(used[0])), pa.array(header, pa.large_string()))
        if len(header) > 1 and pc.any(names).as_py():
            return None
        cells = {
            name: table.column(column).cast(pa.float64())
            if name in ("score", "label") and name != source.mapped_column
            else table.column(column)
            for name, column in columns.items()
        }
    except pa.ArrowInvalid:
        return None
    return checked_batch(source, cells) if len(table) else None  # blank lines


def _is_regular(lines: bytes, delimiter: str) -> bool:
    """Whether each quote opens a cell, closes it in the same line, or is one of two inside it; and no line is too long.

    Quotes open and close in turn, for of two inside a cell the first closes and the second opens it again.
    """
    data = np.frombuffer(lines, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if np.diff(ends, prepend=-1).max() > MAX_TEXT_CHARS:
        return False
    quotes = np.flatnonzero(data == ord('"'))
    if len(quotes) % 2:
        return False
    opening, closing = quotes[::2], quotes[1::2]
    before, after = np.where(opening > 0, data[opening - 1], ord("\n")), data[closing + 1]
    beside = [ord(delimiter), ord("\n"), ord('"')]
    if not (np.isin(before, beside).all() and np.isin(after, beside).all()):
        return False
    return bool((np.searchsorted(ends, opening) == np.searchsorted(ends, closing)).all())
