"""Which rows form step t: a pure function of (seed, epoch, step), independent of ranks and workers.

Nothing is stored: the permutation of an epoch is computed index by index, so memory does not grow with the
number of rows, and any step is found in O(batch_size); among groups of streamed files in O(groups).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_MASK64 = (1 << 64) - 1
_RUN = 64  # steps of several sources that are permuted among themselves
SLICE_ROWS = 2048  # rows of one group that are tokenised at once
BUNDLE_GROUPS = 8  # groups that are open at once
WINDOW_SLICES = 8  # slices whose rows are permuted together


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


def split_rows(num_rows: int, world_size: int) -> tuple[int, ...]:
    """Rows of a global batch on each rank: floor or ceil of the mean, the larger shares first."""
    base, extra = divmod(num_rows, world_size)
    return tuple(base + (r < extra) for r in range(world_size))


class Part:
    """The rows of a source, and which of them form each batch of a pass. The base takes them as they come shuffled.

    Attributes:
        size: number of rows.
        keeps_order: whether batches must be asked for one behind the other to be found at once.
    """

    keeps_order: ClassVar[bool] = False

    if TYPE_CHECKING:  # a property here would take the place of a field below

        @property
        def size(self) -> int: ...

    def rows(self, places: NDArray[np.int64], key: int) -> NDArray[np.int64]:
        """Rows that stand at ``places`` (0 to size) of the pass with this key."""
        raise NotImplementedError

    def num_batches(self, batch_size: int) -> int:
        """Batches of a pass, whatever its key."""
        return -(-self.size // batch_size)

    def batch(self, index: int, batch_size: int, key: int) -> NDArray[np.int64]:
        """Rows of batch ``index`` (from 0) of the pass with this key; never empty."""
        # Neighbouring batches are planned together.
        num_rows = batch_size * steps_per_window(batch_size)
        first = index * batch_size // num_rows * num_rows
        rows = _window(self, first, min(first + num_rows, self.size), key)
        start = index * batch_size - first
        return rows[start : start + batch_size].copy()

    def num_left_out(self, batch_size: int, key: int) -> int:
        """Rows that no batch of the pass with this key takes; an estimate where to count them takes long."""
        return 0

    def tell_left_out(self, num_rows: int) -> str:
        """That no batch takes ``num_rows`` rows, and why."""
        return f"{num_rows:,} of {self.size:,} rows ({num_rows / self.size:.1%}) find no place in an epoch"


@dataclass(frozen=True)
class Permutation(Part):
    """Rows that can be read in any order: one permutation of all of them.

    Args:
        size: number of rows.
    """

    size: int  # type: ignore[misc]

    def rows(self, places: NDArray[np.int64], key: int) -> NDArray[np.int64]:
        return permute(places, self.size, key)


@dataclass(frozen=True, eq=False)  # known by itself, for a hash of all sizes would be taken at every step
class BlockShuffle(Part):
    """Rows that are fetched by group, as those of Parquet files: near rows stay near, so that few groups are open.

    The groups are permuted and bundled by 8. The slices of a bundle (2,048 rows of one group) are permuted and read
    through windows of 8; the rows of a window are permuted. So the rows of a batch come from up to 8 slices, and
    no group is needed again behind its bundle. Memory grows with the number of groups, never with that of rows; a
    place is found in the time that one bundle takes.

    Args:
        group_sizes: rows of each group, in the order of the files.
    """

    group_sizes: tuple[int, ...]
    keeps_order: ClassVar[bool] = True

    @cached_property
    def group_starts(self) -> NDArray[np.int64]:
        """First row of each group, and the number of all rows behind them."""
        return np.concatenate([[0], np.cumsum(np.array(self.group_sizes, dtype=np.int64))])

    @property
    def size(self) -> int:
        return int(self.group_starts[-1])

    @cached_property
    def _bundles_of_key(self) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        return {}

    def _bundles(self, key: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The groups in the order of a pass, and the place at which each bundle starts."""
        found = self._bundles_of_key.get(key)
        if found is None:
            groups = permute(np.arange(len(self.group_sizes)), len(self.group_sizes), mix(key, 1))
            sizes = np.diff(self.group_starts)[groups]
            found = groups, (np.cumsum(sizes) - sizes)[::BUNDLE_GROUPS]
            if len(self._bundles_of_key) > 3:  # of passes that are over
                self._bundles_of_key.clear()
            self._bundles_of_key[key] = found
        return found

    def rows(self, places: NDArray[np.int64], key: int) -> NDArray[np.int64]:
        groups, starts = self._bundles(key)
        rows = np.empty_like(places)
        bundle_of_place = np.searchsorted(starts, places, "right") - 1
        for bundle in np.unique(bundle_of_place).tolist():
            here = bundle_of_place == bundle
            members = groups[bundle * BUNDLE_GROUPS : (bundle + 1) * BUNDLE_GROUPS]
            rows[here] = self._rows_of_bundle(members, places[here] - starts[bundle], mix(key, 2, bundle))
        return rows

    def _rows_of_bundle(self, groups: NDArray[np.int64], places: NDArray[np.int64], key: int) -> NDArray[np.int64]:
        spans = [self.group_starts[g : g + 2].tolist() for g in groups.tolist()]
        firsts = np.concatenate([np.arange(start, stop, SLICE_ROWS) for start, stop in spans])
        stops = np.repeat([stop for _, stop in spans], [-(-(stop - start) // SLICE_ROWS) for start, stop in spans])
        shuffled = permute(np.arange(len(firsts)), len(firsts), mix(key, 1))
        firsts, sizes = firsts[shuffled], np.minimum(stops - firsts, SLICE_ROWS)[shuffled]
        starts = np.cumsum(sizes) - sizes  # place of each slice before the rows of its window are permuted
        window_of_place = np.searchsorted(starts[::WINDOW_SLICES], places, "right") - 1
        rows = np.empty_like(places)
        for window in np.unique(window_of_place).tolist():
            here = window_of_place == window
            members = slice(window * WINDOW_SLICES, (window + 1) * WINDOW_SLICES)
            start, num_rows = starts[members][0], int(sizes[members].sum())
            images = start + permute(places[here] - start, num_rows, mix(key, 2, window))
            found = np.searchsorted(starts, images, "right") - 1
            rows[here] = firsts[found] + images - starts[found]
        return rows


@lru_cache(maxsize=64)
def _window(part: Part, first: int, stop: int, key: int) -> NDArray[np.int64]:
    rows = part.rows(np.arange(first, stop), key)
    rows.flags.writeable = False
    return rows


@dataclass(frozen=True)
class Step:
    """The global batch of one step: ``rows`` of source ``source``, in the order that ranks share out."""

    source: int
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The plan of a run over one or more sources. A step takes rows of one source only.

    With one source an epoch uses every row once, its last step may be short. With several, ``mixing`` says how their
    steps lie among each other:

    - proportional: every row of every source once an epoch, steps interleaved pseudo-randomly.
    - round_robin: a step of each source in turn, until the source with the fewest steps is used up.
    - weighted: as many steps as proportional, shared out by ``weights``. A source that runs out starts again with
      a new shuffle; one that is not used up goes on in the next epoch.

    Args:
        parts: the rows of each source.
        batch_size: rows of a full global batch.
        seed: of the shuffle.
        mixing: how the steps of several sources are mixed.
        weights: share of each source under weighted, above 0; their sum does not matter.
    """

    parts: Sequence[Part]
    batch_size: int
    seed: int
    mixing: Literal["proportional", "round_robin", "weighted"] = "proportional"
    weights: Sequence[float] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(part.size for part in self.parts)

    def _steps_of(self, source: int) -> int:
        """Steps of one pass over a source."""
        return self.parts[source].num_batches(self.batch_size)

    @cached_property
    def steps_by_source(self) -> tuple[int, ...]:
        """Steps of each source in an epoch."""
        steps = [self._steps_of(source) for source in range(len(self.parts))]
        if len(steps) > 1 and self.mixing == "round_robin":
            return (min(steps),) * len(steps)
        if len(steps) > 1 and self.mixing == "weighted":
            return _largest_remainder(sum(steps), self.weights)
        return tuple(steps)

    @property
    def steps_per_epoch(self) -> int:
        return sum(self.steps_by_source)

    @property
    def rows_left_out(self) -> int:
        """Rows that an epoch under round_robin does not come to."""
        used = zip(self.sizes, self.steps_by_source, strict=True)
        return sum(max(0, size - steps * self.batch_size) for size, steps in used if self.mixing == "round_robin")

    def rows_without_place(self, source: int) -> int:
        """Rows of a source that no batch of its first pass takes, because none can hold them."""
        return self.parts[source].num_left_out(self.batch_size, mix(self.seed, 0, source))

    def step(self, epoch: int, index: int) -> Step:
        """The global batch of step ``index`` (from 0) of ``epoch``."""
        assert 0 <= index < self.steps_per_epoch, (index, self.steps_per_epoch)
        source, slot = self._turn(epoch, index)
        number = epoch  # of the pass over this source
        if self.mixing == "weighted" and len(self.parts) > 1:
            number, slot = divmod(epoch * self.steps_by_source[source] + slot, self._steps_of(source))
        return Step(source, self.parts[source].batch(slot, self.batch_size, mix(self.seed, number, source)))

    def _turn(self, epoch: int, index: int) -> tuple[int, int]:
        """The source of a step, and which of the source's steps of this epoch it is."""
        if len(self.parts) == 1:
            return 0, index
        if self.mixing == "round_robin":
            return index % len(self.parts), index // len(self.parts)
        steps_key = mix(self.seed, epoch, 0x57E9)
        if self.mixing == "weighted" or any(part.keeps_order for part in self.parts):
            return _interleaved(self.steps_by_source, index, steps_key)  # a source's steps must keep their order
        slot = int(permute(np.array([index]), self.steps_per_epoch, steps_key)[0])
        source = 0
        while slot >= self.steps_by_source[source]:
            slot -= self.steps_by_source[source]
            source += 1
        return source, slot


def _largest_remainder(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """``total`` shared out by weight in whole numbers (Hare and Niemeyer)."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: (shares[i] - exact[i], i))
    for source in by_rest[: total - sum(shares)]:
        shares[source] += 1
    return tuple(shares)


def _interleaved(steps: Sequence[int], index: int, key: int) -> tuple[int, int]:
    """The source of step ``index`` and how many steps of that source came before it, in O(number of sources).

    The sources first lie evenly: source 0 has floor(index * steps[0] / all) of the steps before ``index``, source 1
    shares out the others in the same way, and so on, so that steps before a place are counted without walking. Then
    each run of 64 steps is permuted.
    """
    first = index - index % _RUN
    size = min(_RUN, sum(steps) - first)
    rest = np.concatenate([[first], first + permute(np.arange(size), size, mix(key, first))[: index - first + 1]])
    left, source, before = sum(steps), np.full(len(rest), -1), [0] * len(steps)
    for number, own in enumerate(steps):
        if own == 0:
            continue
        earlier = rest * own // left
        before[number] = int(earlier[0])
        source[(source < 0) & ((rest + 1) * own // left > earlier)] = number
        rest, left = rest - earlier, left - own
        if left == 0:
            break
    last = int(source[-1])
    return last, before[last] + int((source[1:-1] == last).sum())
