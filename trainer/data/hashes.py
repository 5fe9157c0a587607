"""63-bit hashes: of texts as token ids, and of single values. Equal hashes are taken for equal things.

Among n different texts two share a hash with probability n^2 / 2^64: 5e-4 for 10^8.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

NO_TEXT = -1  # in place of a hash, where a row has no text in a column


def hash_tokens(ids_T: NDArray[np.integer], lengths_S: NDArray[np.integer], seed: int = 0) -> NDArray[np.int64]:
    """A hash of each text: (S,) int64, 0 or more.

    Args:
        ids_T: pieces of all texts, one behind the other.
        lengths_S: pieces of each text, none 0.
        seed: of the tokenizer, for the pieces of one are others than those of another.
    """
    if not len(lengths_S):
        return np.zeros(0, np.int64)
    ends_S = np.cumsum(lengths_S, dtype=np.int64)
    starts_S = ends_S - lengths_S
    places_T = np.arange(len(ids_T)) - np.repeat(starts_S, lengths_S)
    with np.errstate(over="ignore"):
        # Each piece is mixed with its place, so that a sum, which NumPy takes at once, tells orders apart.
        mixed_T = _mix(ids_T.astype(np.uint64) | (places_T.astype(np.uint64) << np.uint64(32)))
        sums_S = np.add.reduceat(mixed_T, starts_S)
        return (_mix(sums_S + lengths_S.astype(np.uint64) + np.uint64(seed << 32)) >> np.uint64(1)).astype(np.int64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mix_all(values: NDArray[np.integer], key: int) -> NDArray[np.uint64]:
    """A well-mixed number for each value and this key."""
    with np.errstate(over="ignore"):
        return _mix(values.astype(np.uint64) ^ np.uint64(key))


def hash_value(value: str) -> int:
    """A hash of a value as it is written, 0 or more; the same in every process."""
    return int.from_bytes(blake2b(value.encode(), digest_size=8).digest(), "little") >> 1
