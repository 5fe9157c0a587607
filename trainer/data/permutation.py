"""Random orders that are functions of a key: nothing is drawn in turn, and nothing is stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def mix(*values: int) -> int:
    """A well-mixed 64-bit hash of integers (splitmix64 finaliser over a running state)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state + 0x9E3779B97F4A7C15 + (value & _MASK64)) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def permute(indices: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Images of indices under a pseudo-random permutation of range(size) that is never written down.

    A balanced Feistel network over the smallest even number of bits that holds ``size``, walked along its
    cycle until the image falls inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    Fewer than four applications are needed on average.
    """
    if size <= 1:
        return np.zeros_like(indices)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = [np.uint64(mix(key, size, r)) for r in range(_ROUNDS)]

    def network(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> shift, x & mask
        for k in keys:
            mixed = (right + k) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(32)
            left, right = right, left ^ (mixed & mask)
        return (left << shift) | right

    with np.errstate(over="ignore"):
        out = network(indices.astype(np.uint64))
        outside = out >= size
        while outside.any():
            out[outside] = network(out[outside])
            outside = out >= size
    return out.astype(np.int64)
