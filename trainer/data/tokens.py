"""Tokenising a source, once: no text is tokenised while a model trains.

What is written is told in trainer/data/table.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from trainer.data.cache import place_of, use
from trainer.data.hashes import NO_TEXT, hash_tokens
from trainer.data.loading import fingerprint, load, num_skipped
from trainer.data.progress import Advance, shown_progress
from trainer.data.sources import Source
from trainer.data.table import USED_IDS, TokenTable, map_array
from trainer.data.workers import end_with, map_ahead, num_cores, worker_context

if TYPE_CHECKING:
    from trainer.encoder.text import TextPreparation

logger = logging.getLogger(__name__)

_VERSION = 4  # of the files: raise it when the same source and tokenizer give another folder
_SPAN = 2000  # texts per task
_TEXTS_PER_PROCESS = 20_000  # fewer are tokenised before another process has started
# Rows among which a text that repeats is found; memory is bounded by the bytes of their texts.
_SEGMENT_ROWS, _SEGMENT_BYTES = 1 << 20, 1 << 27

# Ids of all texts of a span, pieces per text, whether each was cut, hash of each.
_Tokens = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_], NDArray[np.int64]]


def tokenize(source: Source, text: TextPreparation, cache_dir: Path, verify: bool = False) -> TokenTable:
    """The token table of ``source``; the first call builds it in ``cache_dir``, a large one on all cores.

    Args:
        source: rows of texts.
        text: the encoder's tokenizer.
        cache_dir: where tables lie.
        verify: read a table that is there, and build it again where a file is damaged.

    Raises:
        ValueError: as ``load``, or a text without a single token.
    """
    key = hashlib.sha256(f"{_VERSION} {fingerprint(source)} {text.fingerprint}".encode()).hexdigest()[:24]
    folder = place_of(cache_dir, "tokens", key)
    use(folder, partial(_build, source, text, Path(cache_dir)), verify)
    return TokenTable(folder)


def _build(source: Source, text: TextPreparation, cache_dir: Path, folder: Path) -> None:
    rows = load(source, cache_dir, verify=True)
    num_skipped_rows = num_skipped(source, cache_dir)
    used = {text.tower_of(column): np.zeros(1, dtype=bool) for column in source.text_columns}
    with ExitStack() as stack:

        def array(name: str) -> Any:
            return stack.enter_context((folder / name).open("wb"))

        numbers = {c: array(f"{c}.int64") for c in source.text_columns}
        values, offsets, truncated = array("ids.int32"), array("offsets.int64"), array("truncated.bool")
        hashes = array("hashes.int64")
        offsets.write(np.zeros(1, np.int64).tobytes())
        num_texts = num_ids = 0
        what = f"{source.path}: tokenising {len(rows):,} rows"
        advance = stack.enter_context(shown_progress(what, len(rows), "rows", len(rows) >= _TEXTS_PER_PROCESS))
        # Columns of one tokenizer and length together, so that they share the texts that repeat.
        alike: dict[tuple[str, int], list[str]] = {}
        for column in source.text_columns:
            alike.setdefault((text.tower_of(column), text.of_column(column).max_length), []).append(column)
        share = 1.0 / len(alike)
        tokens = (
            (tower, found)
            for (tower, _), columns in alike.items()
            for found in _tokenize_spans(
                _spans(rows, tuple(columns), numbers, lambda done: advance(share * done), first=num_texts),
                text.of_column(columns[0]),
                len(rows) * len(columns),
            )
        )
        nothing = [(text.tower_of("negative"), _no_text(text))] if source.may_lack_texts else []
        for tower, (ids, pieces, cut, digests) in chain(nothing, tokens):
            if not pieces.all():
                for file in numbers.values():
                    file.flush()
                _refuse_empty(source, num_texts + int(np.argmin(pieces)), folder)
            values.write(ids.tobytes())
            ends = num_ids + np.cumsum(pieces, dtype=np.int64)
            offsets.write(ends.tobytes())
            truncated.write(cut.tobytes())
            hashes.write(digests.tobytes())
            num_ids, num_texts = int(ends[-1]), num_texts + len(pieces)
            used[tower] = np.pad(used[tower], (0, max(0, int(ids.max()) + 1 - len(used[tower]))))
            used[tower][ids] = True
    for tower, is_used in used.items():
        np.save(folder / USED_IDS[tower], np.flatnonzero(is_used))
    _write_targets(rows, folder)
    report = {
        "source": source.path,
        "num_rows": len(rows),
        "num_skipped": num_skipped_rows,
        "may_lack_texts": source.may_lack_texts,
        "has_towers": text.documents is not None,
        "num_candidate_scores": len(source.candidate_scores),
        "num_truncated": {c: _count_truncated(folder, c) for c in source.text_columns},
    }
    (folder / "truncated.bool").unlink()
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _no_text(text: TextPreparation) -> _Tokens:
    """What stands in place of a text that is not there: special pieces alone, or one piece where there are none."""
    ids = np.array(text.no_text, np.int32)
    return ids, np.array([len(ids)], np.int32), np.zeros(1, np.bool_), np.array([NO_TEXT])


def _spans(
    rows: Dataset, columns: tuple[str, ...], numbers: dict[str, Any], advance: Advance, first: int
) -> Iterator[list[str]]:
    """Distinct texts, some at a time, numbered from ``first``; absent ones are number 0.

    ``numbers`` are the files that get each row's number of its text.
    """
    num_texts = first
    for batches in _segments(rows, columns):
        texts = pa.concat_arrays([batch.column(c) for c in columns for batch in batches]).dictionary_encode()
        places = pc.fill_null(texts.indices, -1).to_numpy().astype(np.int64).reshape(len(columns), -1)
        texts_of_column = np.where(places < 0, 0, num_texts + places)
        for column, texts_of_rows in zip(columns, texts_of_column, strict=True):
            numbers[column].write(texts_of_rows.tobytes())
        num_distinct, num_rows = len(texts.dictionary), texts_of_column.shape[1]
        num_texts += num_distinct
        for start in range(0, num_distinct, _SPAN):
            yield texts.dictionary[start : start + _SPAN].to_pylist()
            advance(num_rows * min(_SPAN, num_distinct - start) / num_distinct)


def _segments(rows: Dataset, columns: tuple[str, ...]) -> Iterator[list[pa.RecordBatch]]:
    """The batches of a data set, some at a time."""
    taken: list[pa.RecordBatch] = []
    num_rows = num_bytes = 0
    for batch in rows.data.table.select(list(columns)).to_batches():
        if taken and (num_rows + len(batch) > _SEGMENT_ROWS or num_bytes + batch.nbytes > _SEGMENT_BYTES):
            yield taken
            taken, num_rows, num_bytes = [], 0, 0
        taken.append(batch)
        num_rows, num_bytes = num_rows + len(batch), num_bytes + batch.nbytes
    yield taken


def _write_targets(rows: Dataset, folder: Path) -> None:
    scores = [name for name in rows.column_names if name.partition("_")[0] == "score"]
    for target, suffix in (*((name, "float32") for name in scores), ("label", "int64"), ("group", "int64")):
        if target in rows.column_names:
            with (folder / f"{target}.{suffix}").open("wb") as file:
                for batch in rows.data.table.select([target]).to_batches():
                    file.write(batch.column(0).to_numpy().astype(suffix, copy=False).tobytes())


def _count_truncated(folder: Path, column: str) -> int:
    truncated, texts = map_array(folder / "truncated.bool"), map_array(folder / f"{column}.int64")
    return sum(int(truncated[texts[i : i + _SEGMENT_ROWS]].sum()) for i in range(0, len(texts), _SEGMENT_ROWS))


def _refuse_empty(source: Source, text: int, folder: Path) -> None:
    for column in source.text_columns:
        rows = np.flatnonzero(map_array(folder / f"{column}.int64") == text)
        if len(rows):
            raise ValueError(f"{source.path}: column '{column}', row {rows[0] + 1}: the text has no token")
    raise AssertionError(text)


def _tokenize_spans(spans: Iterator[list[str]], text: TextPreparation, num_texts: int) -> Iterator[_Tokens]:
    """Tokens of the spans, in their order.

    Processes instead of the tokenizer's own threads: with those, turning the result into Python lists stays
    on one core and takes longer than the threads save.
    """
    num_processes = min(num_cores(), num_texts // _TEXTS_PER_PROCESS)
    if num_processes < 2:
        for span in spans:
            yield _tokenize_span(text, span)
        return
    with ProcessPoolExecutor(num_processes, worker_context(), _start_worker, (text, os.getpid())) as pool:
        yield from map_ahead(pool, _work, spans, ahead=4 * num_processes)


def _tokenize_span(text: TextPreparation, texts: list[str]) -> _Tokens:
    ids = text(texts)
    pieces = np.fromiter(map(len, ids), np.int32, len(ids))
    flat = np.fromiter(chain.from_iterable(ids), np.int32, int(pieces.sum()))
    # Only a text that fills max_length may have been cut: ask whether one more place would be filled too.
    full = np.flatnonzero(pieces >= text.max_length)
    cut = np.zeros(len(ids), dtype=bool)
    if len(full):
        longer = replace(text, max_length=text.max_length + 1)([texts[i] for i in full])
        cut[full] = [len(t) > text.max_length for t in longer]
    hashes = hash_tokens(flat, pieces, text.hash_seed) if pieces.all() else np.zeros(len(ids), np.int64)
    return flat, pieces, cut, hashes


# Of a worker process: what all its spans share.
_shared: TextPreparation | None = None


def _start_worker(text: TextPreparation, parent: int) -> None:
    global _shared
    end_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken
    _shared = text


def _work(texts: list[str]) -> _Tokens:
    assert _shared is not None
    return _tokenize_span(_shared, texts)
