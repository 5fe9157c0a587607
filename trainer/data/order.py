"""Which rows form step t: a pure function of (seed, epoch, step), independent of ranks and workers.

Nothing is stored: the permutation of an epoch is computed index by index, so memory does not grow with the
number of rows, and any step is found in O(batch_size).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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


# Thirty calls into NumPy cost the same for 16 numbers as for a thousand.
_WINDOW = 1024


def steps_per_window(batch_size: int) -> int:
    """Neighbouring steps that are planned, and sent from a loader's worker, together."""
    return max(1, _WINDOW // batch_size)


@lru_cache(maxsize=64)
def _window(first: int, stop: int, size: int, key: int) -> NDArray[np.int64]:
    images = permute(np.arange(first, stop), size, key)
    images.flags.writeable = False
    return images


def split_rows(num_rows: int, world_size: int) -> tuple[int, ...]:
    """Rows of a global batch on each rank: floor or ceil of the mean, the larger shares first."""
    base, extra = divmod(num_rows, world_size)
    return tuple(base + (r < extra) for r in range(world_size))


@dataclass(frozen=True)
class Step:
    """The global batch of one step: ``rows`` of source ``source``, in the order that ranks share out."""

    source: int
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The plan of a run over one or more sources.

    Each epoch uses every row of every source once. A step takes rows of one source only, the last step of a
    source in an epoch may be short. With several sources the steps are interleaved in a pseudo-random order,
    in proportion to their sizes.

    Args:
        sizes: rows of each source.
        batch_size: rows of a full global batch.
        seed: of the shuffle.
    """

    sizes: Sequence[int]
    batch_size: int
    seed: int

    def _steps_of(self, source: int) -> int:
        return -(-self.sizes[source] // self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return sum(self._steps_of(s) for s in range(len(self.sizes)))

    def step(self, epoch: int, index: int) -> Step:
        """The global batch of step ``index`` (from 0) of ``epoch``."""
        assert 0 <= index < self.steps_per_epoch, (index, self.steps_per_epoch)
        slot = index
        if len(self.sizes) > 1:
            steps_key = mix(self.seed, epoch, 0x57E9)
            slot = int(permute(np.array([index]), self.steps_per_epoch, steps_key)[0])
        source = 0
        while slot >= self._steps_of(source):
            slot -= self._steps_of(source)
            source += 1
        size = self.sizes[source]
        # Neighbouring steps are planned together.
        rows = self.batch_size * steps_per_window(self.batch_size)
        first = slot * self.batch_size // rows * rows
        images = _window(first, min(first + rows, size), size, mix(self.seed, epoch, source))
        start = slot * self.batch_size - first
        return Step(source, images[start : start + self.batch_size].copy())
