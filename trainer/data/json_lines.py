"""JSON lines in blocks: Arrow reads the good ones on all cores, a block with any doubt is read line by line.

Arrow takes 1 us a row where Python takes 10, but it cannot say in which line a mistake is. So it only ever accepts a
block, as a whole, of which it can tell that line by line reading would give the same rows and no bad one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from trainer.data.ahead import map_ahead, num_cores
from trainer.data.rows import MAX_TEXT_CHARS, Block, Record, Rows, json_records, text_blocks
from trainer.data.values import MAX_LABEL

if TYPE_CHECKING:
    from trainer.data.sources import Source

# Fields of a Source that `_parse` knows about; with any other one set, every line goes the general way.
_KNOWN = {"path", "columns", "score_range", "label_map", "split", "subset", "revision", "on_bad_row", "max_bad_rows"}
_NOT_OF_ROWS = {
    "name", "evaluator", "prompts", "loss", "weight", "streaming", "teacher", "max_negatives", "rows_per_label",
}  # fmt: skip
_PEEK = 100  # JSON lines have no header: their first rows say which columns there are


def read_json_lines(path: Path, source: Source, accept: Callable[[pa.RecordBatch], None]) -> Rows:
    """The rows of a file that need a closer look; the others go to ``accept`` as batches of canonical columns.

    The two come in the order of the file: ``accept`` is called when all rows before have been taken from the records.

    Args:
        path: of JSON lines, also gzipped.
        source: what is asked for.
        accept: gets checked rows: large_string texts, then float32 score and int64 label.
    """
    blocks = text_blocks(path)
    head: list[Record] = []
    for block in blocks:  # the first rows say which columns there are, and what they hold
        head += json_records(path, block)
        if len(head) >= _PEEK:
            break
    columns = list(dict.fromkeys(key for _, row in head[:_PEEK] if isinstance(row, dict) for key in row))
    types = _types(source, head)

    def records() -> Iterator[Record]:
        yield from head
        if types is None:
            for block in blocks:
                yield from json_records(path, block)
            return

        def parse(block: Block) -> tuple[Block, pa.RecordBatch | None]:
            return block, _parse(block, source, types)

        with ThreadPoolExecutor(num_cores()) as pool:  # Arrow lets go of the interpreter
            for block, batch in map_ahead(pool, parse, blocks, ahead=2 * num_cores()):
                if batch is None:
                    yield from json_records(path, block)
                else:
                    accept(batch)

    return Rows(str(path), ":", columns, records())


def _types(source: Source, head: list[Record]) -> pa.Schema | None:
    """Types of the columns of the file, None where Arrow cannot do what the source asks for."""
    if any(name in source.columns for name in ("positives", "negatives", "group")):
        return None
    for field in fields(source):
        if field.name in _KNOWN | _NOT_OF_ROWS:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if getattr(source, field.name) != default:
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


def _parse(block: Block, source: Source, types: pa.Schema) -> pa.RecordBatch | None:
    """The checked rows of a block; None where any row is not plainly good."""
    lines = block.lines.replace(b"\r\n", b"\n") if b"\r" in block.lines else block.lines
    if not lines.endswith(b"\n"):
        lines += b"\n"
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
    arrays: dict[str, pa.Array] = {}
    for name in source.canonical_columns:
        values = table.column(source.columns[name]).combine_chunks()
        is_text = name == "id" or name in source.text_columns
        array = _text(values) if is_text else _number(values, name, source)
        if array is None:
            return None
        arrays[name] = array
    return pa.RecordBatch.from_pydict(arrays)


def _text(values: pa.Array) -> pa.Array | None:
    sizes = pc.min_max(pc.binary_length(values)).as_py()
    if sizes["min"] == 0 or sizes["max"] > MAX_TEXT_CHARS or pc.any(pc.utf8_is_space(values)).as_py():
        return None
    return values


def _number(values: pa.Array, name: str, source: Source) -> pa.Array | None:
    if name == source.mapped_column:
        assert source.label_map is not None
        places = pc.index_in(values, pa.array(list(source.label_map), pa.large_string()))
        if places.null_count:
            return None
        values = pa.array(list(source.label_map.values()), pa.float64()).take(places)
    extremes: dict[str, Any] = pc.min_max(values).as_py()
    if not pc.all(pc.is_finite(values)).as_py():
        return None
    if name == "label":
        whole = pc.all(pc.equal(pc.floor(values), values)).as_py()
        return values.cast(pa.int64()) if whole and extremes["min"] >= 0 and extremes["max"] <= MAX_LABEL else None
    if source.score_range is not None:
        low, high = source.score_range
        if not low <= extremes["min"] <= extremes["max"] <= high:
            return None
        values = pc.divide(pc.subtract(values, low), high - low)
    return values.cast(pa.float32(), safe=False)
