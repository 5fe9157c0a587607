"""What of a validation set stands in training, counted once and cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from trainer.data.columnfacts import CHUNK_ROWS
from trainer.data.evalsource import EvalSource
from trainer.data.facts import cached_facts, facts_key, joined
from trainer.data.loading import as_read, fingerprint, load
from trainer.data.retrieval import collections_fingerprint, load_collections
from trainer.data.sources import Source


@dataclass(frozen=True)
class LeakFacts:
    """Of a validation set beside all training sources; prompts, and which of two texts is the anchor, don't count.

    Attributes:
        name: of the set.
        num_rows, num_texts: rows, and different texts; of a set that is searched the rows are its queries.
        num_known_rows: rows whose texts (the first two columns) stand together in a training row; queries that stand
            anywhere in training; None where no training source was looked at.
        num_known_texts: texts that stand in training, or None.
        unit: what a row is.
        num_unsearched: training sources that were not looked at, because they are streamed.
    """

    name: str
    num_rows: int
    num_texts: int
    num_known_rows: Optional[int]
    num_known_texts: Optional[int]
    unit: Literal["rows", "queries"] = "rows"
    num_unsearched: int = 0


def leak_facts(
    validation: EvalSource, train: Sequence[Source], cache_dir: Path, max_rows: Optional[int] = None
) -> LeakFacts:
    """What of ``validation`` stands in training, whatever the size of that."""
    # To look for a text in a streamed source would be to read all of it.
    searched = [replace(source, prompts=None) for source in train if not source.streaming]
    validation = replace(validation, prompts=None)
    whole = collections_fingerprint(validation) if validation.searches else fingerprint(validation)
    key = facts_key(whole, [fingerprint(source) for source in searched], max_rows)
    counts = cached_facts(cache_dir, key, lambda: _leaks(validation, searched, cache_dir, max_rows))
    if not searched:
        counts |= {"num_known_rows": None, "num_known_texts": None}
    unit: Literal["rows", "queries"] = "queries" if validation.searches else "rows"
    return LeakFacts(validation.name, unit=unit, num_unsearched=len(train) - len(searched), **counts)


def _leaks(validation: EvalSource, train: Sequence[Source], cache_dir: Path, max_rows: Optional[int]) -> dict[str, int]:
    row_keys, texts, num_columns = _held_out(validation, cache_dir)
    known_texts = np.zeros(len(texts), dtype=bool)
    distinct_rows = pc.unique(row_keys)
    hit = np.zeros(len(distinct_rows), dtype=bool)
    for columns in _chunks(train, cache_dir, max_rows):
        for column in columns:
            _mark(known_texts, column, texts)
        if validation.searches:
            for column in columns:
                _mark(hit, column, distinct_rows)
        elif min(len(columns), 2) == min(num_columns, 2):
            _mark(hit, _row_keys(columns), distinct_rows)
    known_rows = hit[pc.index_in(row_keys, value_set=distinct_rows).to_numpy()]
    return {
        "num_rows": len(row_keys),
        "num_texts": len(texts),
        "num_known_rows": int(known_rows.sum()),
        "num_known_texts": int(known_texts.sum()),
    }


def _held_out(validation: EvalSource, cache_dir: Path) -> tuple[pa.Array, pa.Array, int]:
    """A key for each row, the different texts, and the number of text columns."""
    if validation.searches:
        sets = load_collections(validation, cache_dir, verify=True).values()
        queries = pa.array([text for one in sets for text in one.queries], pa.large_string())
        documents = pa.array([text for one in sets for text in one.documents], pa.large_string())
        return queries, pc.unique(pa.chunked_array([queries, documents])), 2
    data = load(validation, cache_dir, verify=True)
    rows, names = data.with_format("arrow")[:], as_read(validation, data).text_columns
    row_keys = _row_keys([rows[name].combine_chunks() for name in names])
    texts = pa.chunked_array([chunk for name in names for chunk in rows[name].chunks])
    return row_keys, pc.unique(texts).drop_null(), len(names)


def _row_keys(columns: Sequence[pa.Array]) -> pa.Array:
    """One string a row: its first two texts, the smaller one first."""
    texts = columns[:2]
    return joined([pc.min_element_wise(*texts), pc.max_element_wise(*texts)][: len(texts)])


def _chunks(train: Sequence[Source], cache_dir: Path, max_rows: Optional[int]) -> Iterator[list[pa.Array]]:
    """The text columns of the training rows, some rows at a time: a training set may be larger than memory."""
    for source in train:
        rows: Dataset = load(source, cache_dir, verify=True).with_format("arrow")
        num_rows = min(len(rows), max_rows or len(rows))
        for start in range(0, num_rows, CHUNK_ROWS):
            chunk = rows[start : min(start + CHUNK_ROWS, num_rows)]
            yield [chunk[name].combine_chunks() for name in source.text_columns]


def _mark(found: NDArray[np.bool_], values: pa.Array, wanted: pa.Array) -> None:
    """Set ``found`` where one of ``values`` is the wanted one."""
    places = pc.index_in(values, value_set=wanted).drop_null().to_numpy()
    found[places] = True
