"""Which rows form step t: a pure function of (seed, epoch, step), independent of ranks and workers.

Nothing is stored: the permutation of an epoch is computed index by index, so memory does not grow with the
number of rows, and any step is found in O(batch_size); among groups of streamed files in O(groups).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.data.parts import Part
from trainer.data.permutation import mix, permute

_RUN = 64  # steps of several sources that are permuted among themselves


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
