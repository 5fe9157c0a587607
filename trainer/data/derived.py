"""Which rows a source takes of those that were read: triplets of labelled pairs, a part held out, a sample."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.data.permutation import permute

_SAMPLE_KEY = 0x5A3B1E  # of the sample of max_rows: the same rows in every run


def triplets(anchors: pa.ChunkedArray, is_positive: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of one anchor put together: every positive once, with the anchor's negatives in turn.

    Args:
        anchors: text of each of N rows.
        is_positive: (N,) 1 where the row's second text is a positive of its anchor, 0 where a negative.

    Returns:
        Rows of the positives, ascending, and for each the row of its negative; both (M,).
    """
    anchor_of_row = anchors.combine_chunks().dictionary_encode().indices.to_numpy()
    positives, negatives = np.flatnonzero(is_positive == 1), np.flatnonzero(is_positive == 0)
    negatives = negatives[np.argsort(anchor_of_row[negatives], kind="stable")]
    num_anchors = int(anchor_of_row.max()) + 1 if len(anchor_of_row) else 0
    num_negatives = np.bincount(anchor_of_row[negatives], minlength=num_anchors)
    first_negative = np.cumsum(num_negatives) - num_negatives
    positives = positives[num_negatives[anchor_of_row[positives]] > 0]
    turn = _rank_among_equals(anchor_of_row[positives])
    anchor = anchor_of_row[positives]
    return positives, negatives[first_negative[anchor] + turn % num_negatives[anchor]]


def _rank_among_equals(values: NDArray[np.integer]) -> NDArray[np.int64]:
    """How many equal values stand before each."""
    by_value = np.argsort(values, kind="stable")
    ordered = values[by_value]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(values) else np.zeros(0, np.int64)
    lengths = np.diff(np.r_[starts, len(values)])
    ranks = np.empty(len(values), np.int64)
    ranks[by_value] = np.arange(len(values)) - np.repeat(starts, lengths)
    return ranks


def held_out(texts: pa.ChunkedArray, share: float) -> NDArray[np.bool_]:
    """(N,) whether a row is held out: its text's hash, taken as a number from 0 to 1, is below ``share``."""
    limit = int(share * 2**64)
    digests = (blake2b(text.encode(), digest_size=8).digest() for chunk in texts.chunks for text in chunk.to_pylist())
    return np.fromiter((int.from_bytes(digest, "little") < limit for digest in digests), bool, len(texts))


def draw(num_rows: int, wanted: int) -> NDArray[np.int64]:
    """``wanted`` of ``num_rows`` row numbers, drawn evenly, ascending; the same ones every time."""
    if wanted >= num_rows:
        return np.arange(num_rows)
    return np.sort(permute(np.arange(wanted), num_rows, _SAMPLE_KEY))


def draw_groups(texts: pa.ChunkedArray, wanted: int) -> NDArray[np.int64]:
    """Numbers of all rows of ``wanted`` of the distinct ``texts``, ascending; the same ones every time."""
    numbers = texts.combine_chunks().dictionary_encode().indices.to_numpy()
    return np.flatnonzero(np.isin(numbers, draw(int(numbers.max(initial=-1)) + 1, wanted)))
