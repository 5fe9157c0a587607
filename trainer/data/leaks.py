"""What of a validation set stands in training, counted once and cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from trainer.data.facts import CHUNK_ROWS, cached_facts, facts_key, joined
from trainer.data.sources import EvalSource, Source, fingerprint, load


@dataclass(frozen=True)
class LeakFacts:
    """Of a validation set beside all training sources.

    Attributes:
        name: of the set.
        num_rows, num_texts: rows, and different texts.
        num_known_rows: rows whose texts (the first two columns) stand together in a training row.
        num_known_texts: texts that stand in training.
    """

    name: str
    num_rows: int
    num_texts: int
    num_known_rows: int
    num_known_texts: int


def leak_facts(
    validation: EvalSource, train: Sequence[Source], cache_dir: Path, max_rows: Optional[int] = None
) -> LeakFacts:
    """What of ``validation`` stands in training, whatever the size of that."""
    key = facts_key(fingerprint(validation), [fingerprint(source) for source in train], max_rows)
    counts = cached_facts(cache_dir, key, lambda: _leaks(validation, train, cache_dir, max_rows))
    return LeakFacts(name=validation.name, **counts)


def _leaks(validation: EvalSource, train: Sequence[Source], cache_dir: Path, max_rows: Optional[int]) -> dict[str, int]:
    rows = load(validation, cache_dir).with_format("arrow")[:]
    names = validation.text_columns
    row_keys = joined([rows[name].combine_chunks() for name in names[:2]])
    texts = pc.unique(pa.chunked_array([chunk for name in names for chunk in rows[name].chunks])).drop_null()
    known_texts = np.zeros(len(texts), dtype=bool)
    distinct_rows = pc.unique(row_keys)
    hit = np.zeros(len(distinct_rows), dtype=bool)
    for columns in _chunks(train, cache_dir, max_rows):
        for column in columns:
            _mark(known_texts, column, texts)
        if min(len(columns), 2) == len(names[:2]):
            _mark(hit, joined(columns[:2]), distinct_rows)
    known_rows = hit[pc.index_in(row_keys, value_set=distinct_rows).to_numpy()]
    return {
        "num_rows": len(row_keys),
        "num_texts": len(texts),
        "num_known_rows": int(known_rows.sum()),
        "num_known_texts": int(known_texts.sum()),
    }


def _chunks(train: Sequence[Source], cache_dir: Path, max_rows: Optional[int]) -> Iterator[list[pa.Array]]:
    """The text columns of the training rows, some rows at a time: a training set may be larger than memory."""
    for source in train:
        rows: Dataset = load(source, cache_dir).with_format("arrow")
        num_rows = min(len(rows), max_rows or len(rows))
        for start in range(0, num_rows, CHUNK_ROWS):
            chunk = rows[start : min(start + CHUNK_ROWS, num_rows)]
            yield [chunk[name].combine_chunks() for name in source.text_columns]


def _mark(found: NDArray[np.bool_], values: pa.Array, wanted: pa.Array) -> None:
    """Set ``found`` where one of ``values`` is the wanted one."""
    places = pc.index_in(values, value_set=wanted).drop_null().to_numpy()
    found[places] = True
