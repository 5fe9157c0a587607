"""JSON lines in blocks: Arrow reads the good ones on all cores, a block with any doubt is read line by line."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.json

from trainer.data.blocks import PEEKED, checked_batch, is_plain, no_batch, parsed_blocks
from trainer.data.columns import is_position
from trainer.data.rows import Block, Record, Rows, json_records, text_blocks
from trainer.messages import did_you_mean

if TYPE_CHECKING:
    from trainer.data.sources import Source

_LOOKED_MIB = 32  # of a stream, in which negatives must show: seconds on a network; held until their rows are read


def read_json_lines(
    path: Path, source: Source | None = None, accept: Callable[[pa.RecordBatch], None] = no_batch
) -> Rows:
    """The rows of a file that need a closer look; the others go to ``accept`` as batches of canonical columns.

    The two come in the order of the file: ``accept`` is called when all rows before have been taken from the records.

    Args:
        path: of JSON lines, also gzipped.
        source: what is asked for; without it every line is read by itself.
        accept: gets checked rows: large_string texts, then float32 score and int64 label.
    """
    columns, lacking, head, blocks = _begin(path, source)
    columns += _late_columns(path, lacking, text_blocks(path))
    types = source and _types(source, head)

    def parse(lines: bytes) -> pa.RecordBatch | None:
        return _parse(lines, source, types) if source and types else None

    def records() -> Iterator[Record]:
        yield from head
        for block, batch in parsed_blocks(path, blocks, parse):
            if batch is None:
                yield from json_records(path, block)
            else:
                accept(batch)

    return Rows(str(path), ":", columns, records())


def stream_json_lines(url: str, source: Source) -> Rows:
    """The rows of a file from front to back, as ``read_json_lines`` numbers and reads them; little of it is held.

    Args:
        url: path of JSON lines, or its address with a protocol, also gzipped.
        source: what is asked for.

    Raises:
        ValueError: no row in the first part of a file has negatives, and nobody knows whether one far behind has.
    """
    columns, lacking, head, blocks = _begin(url, source)
    held: list[Block] = []

    def first_look() -> Iterator[Block]:
        num_bytes = 0
        while num_bytes < _LOOKED_MIB << 20 and (block := next(blocks, None)):
            held.append(block)
            yield block
            num_bytes += len(block.lines)

    columns += _late_columns(url, lacking, first_look())
    if (missing := lacking.difference(columns)) and (next_block := next(blocks, None)):
        name = missing.pop()
        raise ValueError(
            f"{url}: no column '{name}' (columns.negatives) in the first {_LOOKED_MIB} MiB, {next_block.first - 1:,} "
            f"lines; found: {', '.join(columns)}.{did_you_mean(name, columns)} If later rows have it, write it into "
            "the first one too, as null, or read a copy on this machine with streaming: false"
        )
    behind = chain.from_iterable(json_records(url, block) for block in chain(held, blocks))
    return Rows(url, ":", columns, chain(head, behind))


def _begin(path: Path | str, source: Source | None) -> tuple[list[str], set[str], list[Record], Iterator[Block]]:
    """The columns, the first rows, which say what columns there are (there is no header), and the blocks behind.

    A column that is asked for may be null, and so left out, in all of the first rows: the second set of names is to be
    looked for behind them. It has none whose lack makes these rows bad.
    """
    blocks = text_blocks(path)
    head: list[Record] = []
    for block in blocks:
        head += json_records(path, block)
        if len(head) >= PEEKED:
            break
    columns = _keys(head[:PEEKED])
    asked = source.asked if source and columns else []
    names = [str(name) for _, name in asked if not is_position(name)]
    lacking = {name.split(".")[0] for name in names if name not in columns} - set(columns)
    columns += [name for name in _keys(head) if name in lacking]
    if source and source.on_bad_row == "fail" and not source.where:
        lacking &= {str(source.columns.get("negatives")).split(".")[0]}
    return columns, lacking.difference(columns), head, blocks


def _keys(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(key for _, row in records if isinstance(row, dict) for key in row))


def _late_columns(path: Path | str, wanted: Collection[str], blocks: Iterator[Block]) -> list[str]:
    """Those of the columns ``wanted`` that some row of the ``blocks`` has."""
    found: list[str] = []
    while lacking := set(wanted).difference(found):
        if (block := next(blocks, None)) is None:
            break
        # A look at the bytes, for a misspelt name is in none of them, and is to be told soon.
        written = [json.dumps(name, ensure_ascii=escaped) for name in lacking for escaped in (False, True)]
        if any(name.encode() in block.lines for name in written):
            found += [name for name in _keys(json_records(path, block)) if name in lacking]
    return found


def _types(source: Source, head: list[Record]) -> pa.Schema | None:
    """Types of the columns of the file, None where Arrow cannot do what the source asks for."""
    if not is_plain(source):
        return None
    row = next((row for _, row in head if isinstance(row, dict)), {})
    types: dict[str, pa.DataType] = {}
    for name in source.canonical_columns:
        column, mapped = source.columns[name], name == source.mapped_column
        if not isinstance(column, str):
            return None
        value = row.get(column)
        if isinstance(value, str) and (mapped or name == "id" or name in source.text_columns):
            kind = pa.large_string()
        elif type(value) in (int, float) and not mapped and name in ("score", "label"):
            kind = pa.float64()
        else:
            return None
        if types.setdefault(column, kind) != kind:
            return None
    return pa.schema(list(types.items()))


def _parse(lines: bytes, source: Source, types: pa.Schema) -> pa.RecordBatch | None:
    """The checked rows of a block; None where any row is not plainly good."""
    num_lines = lines.count(b"\n")
    # One object a line: Arrow alone would also take two in one line, or one over two.
    if not (lines.endswith(b"}\n") and lines.startswith(b"{")):
        return None
    if lines.count(b"}\n") != num_lines or lines.count(b"\n{") != num_lines - 1:
        return None
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(lines),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=types, unexpected_field_behavior="ignore"),
        )
        table.validate(full=True)  # UTF-8
    except pa.ArrowInvalid:
        return None
    if len(table) != num_lines or any(column.null_count for column in table.columns):
        return None
    return checked_batch(source, {name: table.column(source.columns[name]) for name in source.canonical_columns})
