"""What the ids of embeddings do not say by themselves: rows that were left out, ids that stand twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from datasets import Dataset

from trainer.data.hashes import hash_value

_BATCH_ROWS = 10_000


def about_ids(rows: Dataset, num_skipped: int) -> str | None:
    """A sentence on what may mislead, or None.

    Args:
        rows: as ``trainer.data.loading.load`` gives them, with a column id or without.
        num_skipped: bad rows of the data that are not among them.
    """
    if "id" in rows.column_names:
        return _about_repeated(rows)
    if not num_skipped:
        return None
    left_out = "1 bad row is" if num_skipped == 1 else f"{num_skipped:,} bad rows are"
    return f"{left_out} left out, and ids are numbers of the rows that are left, from 0; name a column of ids: --id"


def _about_repeated(rows: Dataset) -> str | None:
    # One array of 8 bytes a row, sorted in place: the ids of a large corpus do not fit.
    hashes_N = np.fromiter(map(hash_value, _ids(rows)), np.int64, len(rows))
    hashes_N.sort()
    repeated = set(hashes_N[1:][hashes_N[1:] == hashes_N[:-1]].tolist())
    if not repeated:
        return None
    num_repeats = np.count_nonzero(hashes_N[1:] == hashes_N[:-1])
    first = next(one for one in _ids(rows) if hash_value(one) in repeated)
    return (
        f"in {num_repeats:,} of {len(rows):,} rows stands the id of an earlier row, the first such id is '{first}'; "
        "all rows are written"
    )


def _ids(rows: Dataset) -> Iterator[str]:
    for batch in rows.data.table.select(["id"]).to_batches(max_chunksize=_BATCH_ROWS):
        yield from batch.column(0).to_pylist()
