"""Text files by blocks: Arrow reads the good ones on all cores, a block with any doubt is left to the general way.

Arrow takes 1 us a row where Python takes 10, but it can't say in which line a mistake is. So it only ever accepts a
block, as a whole, of which it can tell that reading line by line would give the same rows and no bad one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.progress import shown_progress
from trainer.data.rows import MAX_TEXT_CHARS, Block
from trainer.data.values import MAX_LABEL, MAX_SCORE
from trainer.data.workers import map_ahead, num_cores

if TYPE_CHECKING:
    from trainer.data.sources import Source

# Fields of a Source that `checked_batch` knows about; with any other one set, every line goes the general way.
_KNOWN = {"path", "columns", "score_range", "label_map", "split", "subset", "revision", "on_bad_row", "max_bad_rows"}
_NOT_OF_ROWS = {
    "name", "evaluator", "prompts", "loss", "weight", "streaming", "teacher", "max_negatives", "max_lengths",
    "rows_per_label",
}  # fmt: skip
# All that the check of a text calls blank, in the words of RE2, whose \s is that of ASCII.
_BLANK = r"^[\s\p{Z}\x{0B}\x{1C}-\x{1F}\x{85}\x{180E}\x{200B}-\x{200F}\x{2060}\x{FEFF}]*$"
PEEKED = 100  # rows that are read the general way first: they say what the columns hold
_LARGE_BYTES = 1 << 27  # of a file that takes seconds


def no_batch(batch: pa.RecordBatch) -> None:
    """Takes the batches of a reader that has no source, and so makes none."""
    raise AssertionError("without a source every row is read the general way")


def is_plain(source: Source) -> bool:
    """Whether Arrow can do what the source asks for."""
    if source.candidate_scores or any(name in source.columns for name in ("positives", "negatives", "group")):
        return False
    for field in fields(source):
        if field.name in _KNOWN | _NOT_OF_ROWS:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if getattr(source, field.name) != default:
            return False
    return True


def parsed_blocks(
    path: Path, blocks: Iterator[Block], parse: Callable[[bytes], pa.RecordBatch | None]
) -> Iterator[tuple[Block, pa.RecordBatch | None]]:
    """Each block with what ``parse`` made of its lines on some thread, all with the same end; in the order of the file.
    A bar shows a large one."""

    def both(block: Block) -> tuple[Block, pa.RecordBatch | None]:
        lines = block.lines.replace(b"\r\n", b"\n") if b"\r" in block.lines else block.lines
        return block, parse(lines if lines.endswith(b"\n") else lines + b"\n")

    num_bytes, done = path.stat().st_size, 0
    what = f"{path}: reading {num_bytes:,} bytes"
    with (
        shown_progress(what, num_bytes, "bytes", num_bytes >= _LARGE_BYTES) as advance,
        ThreadPoolExecutor(num_cores()) as pool,  # Arrow lets go of the interpreter
    ):
        for block, batch in map_ahead(pool, both, blocks, ahead=2 * num_cores()):
            yield block, batch
            advance(block.bytes_read - done)
            done = block.bytes_read


def checked_batch(source: Source, columns: Mapping[str, pa.ChunkedArray]) -> pa.RecordBatch | None:
    """Canonical columns of checked cells; None where any row is not plainly good.

    Args:
        source: what is asked for.
        columns: by canonical name, without nulls: large_string texts and words of a label_map, float64 numbers.
    """
    arrays: dict[str, pa.Array] = {}
    for name in source.canonical_columns:
        values = columns[name].combine_chunks()
        is_text = name == "id" or name in source.text_columns
        array = _text(values) if is_text else _number(values, name, source)
        if array is None:
            return None
        arrays[name] = array
    return pa.RecordBatch.from_pydict(arrays)


def _text(values: pa.Array) -> pa.Array | None:
    sizes = pc.min_max(pc.binary_length(values)).as_py()
    if sizes["min"] == 0 or sizes["max"] > MAX_TEXT_CHARS or pc.any(pc.match_substring_regex(values, _BLANK)).as_py():
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
    elif max(-extremes["min"], extremes["max"]) > MAX_SCORE:
        return None
    return values.cast(pa.float32(), safe=False)
