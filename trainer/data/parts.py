"""The rows of one source, and which of them form each batch of a pass over it.

An order is computed place by place, so memory does not grow with the number of rows; among groups of streamed files it
grows with theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.permutation import mix, permute

SLICE_ROWS = 2048  # rows of one group that are tokenised at once
BUNDLE_GROUPS = 8  # groups that are open at once
WINDOW_SLICES = 8  # slices whose rows are permuted together


# Thirty calls into NumPy cost the same for 16 numbers as for a thousand.
_WINDOW = 1024


def steps_per_window(batch_size: int) -> int:
    """Neighbouring steps that are planned, and sent from a loader's worker, together."""
    return max(1, _WINDOW // batch_size)


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
