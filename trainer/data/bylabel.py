"""Batches of some rows of each label. Which rows form one follows from its number and the key of the pass alone."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.parts import Part
from trainer.data.permutation import mix, permute

if TYPE_CHECKING:
    from trainer.data.table import TokenTable


class LabelBatches(Part):
    """Batches of P labels with K rows of each (P x K sampling), for losses whose positives are the rows of a label.

    In each pass the rows of every label are shuffled and cut into chunks of K; a last chunk of 2 rows or more counts
    too. A batch takes P chunks of different labels. There are as many batches as there can be with P labels each; a
    label with more chunks than batches leaves out the others of this pass, so rare labels bound the length of an epoch.
    Where chunks are left over a last batch is added, and all batches share them: then some have fewer labels.
    Schroff et al. 2015, https://arxiv.org/abs/1503.03832; Hermans et al. 2017, https://arxiv.org/abs/1703.07737.

    A pass is planned at once: 4 bytes a row (8 above 2^31 rows), and 6 a chunk, are kept.

    Args:
        table: its ``labels`` are the classes of the rows.
        rows_per_label: K, 2 or more.
        max_rows: only the first rows count.
    """

    keeps_order: ClassVar[bool] = True

    def __init__(self, table: TokenTable, rows_per_label: int, max_rows: int | None = None) -> None:
        self.table, self.rows_per_label, self.max_rows = table, rows_per_label, max_rows
        self._planned: tuple[tuple[int, int], tuple[NDArray[Any], ...]] | None = None

    @property
    def labels(self) -> NDArray[np.int64]:
        assert self.table.labels is not None
        return self.table.labels[: self.max_rows]

    @property
    def size(self) -> int:
        return len(self.labels)

    @cached_property
    def _distinct(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The labels, ascending, and their rows."""
        return np.unique(self.labels, return_counts=True)

    @property
    def num_labels(self) -> int:
        """Labels of two rows or more."""
        return int(np.count_nonzero(self._distinct[1] > 1))

    @property
    def single_labels(self) -> list[int]:
        """Labels of one row, which no batch takes."""
        labels, counts = self._distinct
        return labels[counts == 1].tolist()

    def refuse_unfit(self, batch_size: int, path: str) -> None:
        """Raises ValueError where no batch can be put together; ``path`` is that of the source."""
        labels_per_batch, rest = divmod(batch_size, self.rows_per_label)
        what = f"{path}: data.batch_size {batch_size} with rows_per_label {self.rows_per_label}"
        if rest:
            raise ValueError(f"{what} leaves {rest} rows over; make it a multiple")
        if not 2 <= labels_per_batch <= self.num_labels:
            found = f"{self.num_labels:,} have 2 rows or more"
            needed = self._rows_with(labels_per_batch)
            fitting = [k for k in range(2, batch_size // 2 + 1) if batch_size % k == 0]
            fitting = [k for k in fitting if batch_size // k <= self.num_labels]
            remedy = f"set rows_per_label to {fitting[0]}" if fitting else "change data.batch_size"
            if needed is not None:
                found += f" among the first {self.size:,} rows (data.max_rows)"
                remedy = f"raise data.max_rows to {needed:,} or more"
            raise ValueError(f"{what} asks for {labels_per_batch} labels in a batch; 2 are needed, {found}: {remedy}")

    def _rows_with(self, num_labels: int) -> int | None:
        """The least ``max_rows`` with so many labels of two rows; None where it is not what lacks them."""
        assert self.table.labels is not None
        labels, (_, counts) = self.table.labels, np.unique(self.table.labels, return_counts=True)
        if num_labels < 2 or num_labels > np.count_nonzero(counts > 1):
            return None
        seconds = np.argsort(labels, kind="stable")[(np.cumsum(counts) - counts + 1)[counts > 1]]
        return int(np.sort(seconds)[num_labels - 1]) + 1

    def rows(self, places: NDArray[np.int64], key: int) -> NDArray[np.int64]:
        return permute(places, self.size, key)

    @property
    def _chunks(self) -> NDArray[np.int64]:
        """Chunks of each label."""
        full, rest = np.divmod(self._distinct[1], self.rows_per_label)
        return full + (rest > 1)

    def num_batches(self, batch_size: int) -> int:
        labels_per_batch, chunks = batch_size // self.rows_per_label, self._chunks
        low, high = 0, int(chunks.sum()) // labels_per_batch
        while low < high:  # the most batches that all have enough labels
            middle = (low + high + 1) // 2
            if np.minimum(chunks, middle).sum() >= labels_per_batch * middle:
                low = middle
            else:
                high = middle - 1
        used = int(np.minimum(chunks, low + 1).sum())
        return low + (used > labels_per_batch * low and used >= 2 * (low + 1))

    def batch(self, index: int, batch_size: int, key: int) -> NDArray[np.int64]:
        if self._planned is None or self._planned[0] != (batch_size, key):
            self._planned = (batch_size, key), self._plan(batch_size, key)
        rows, firsts, lengths, starts = self._planned[1]
        chunks = slice(starts[index], starts[index + 1])
        spans = zip(firsts[chunks].tolist(), lengths[chunks].tolist(), strict=True)
        return np.concatenate([rows[first : first + length] for first, length in spans]).astype(np.int64)

    def num_left_out(self, batch_size: int, key: int) -> int:
        return self.size - int(self._plan(batch_size, key)[2].sum())

    def tell_left_out(self, num_rows: int) -> str:
        single = self.single_labels
        shown = ", ".join(map(str, single[:5])) + (", ..." if len(single) > 5 else "")
        alone = f"; {len(single):,} labels have one row and are never used: {shown}" if single else ""
        why = f"rows_per_label {self.rows_per_label}, and labels have other numbers of rows"
        return f"{super().tell_left_out(num_rows)}, others in each: {why}{alone}"

    def _plan(self, batch_size: int, key: int) -> tuple[NDArray[Any], ...]:
        """Rows label by label; first and number of rows of each chunk, batch by batch; first chunk of each batch."""
        labels, counts = self._distinct
        kind = np.int32 if self.size < 2**31 else np.int64
        place = permute(np.arange(self.size), self.size, mix(key, 1))
        rows = np.argsort(np.searchsorted(labels, self.labels) * self.size + place).astype(kind)
        num_batches = self.num_batches(batch_size)
        shuffled = permute(np.arange(len(labels)), len(labels), mix(key, 2))
        kept = np.minimum(self._chunks, num_batches)[shuffled]
        most = num_batches * (batch_size // self.rows_per_label)
        label = np.repeat(shuffled, kept)[:most]
        number = (np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept))[:most]
        batch = _deal(label, num_batches, mix(key, 3))
        firsts = np.cumsum(counts) - counts
        lengths = np.minimum(self.rows_per_label, counts[label] - number * self.rows_per_label)
        by_batch = np.argsort(batch, kind="stable")
        starts = np.searchsorted(batch[by_batch], np.arange(num_batches + 1))
        first = (firsts[label] + number * self.rows_per_label)[by_batch]
        return rows, first.astype(kind), lengths[by_batch].astype(np.uint16), starts


def _deal(labels: NDArray[np.int64], num_batches: int, key: int) -> NDArray[np.int64]:
    """A batch for each chunk, such that no label comes to a batch twice.

    Args:
        labels: of the chunks, equal ones side by side, none more often than there are batches.
        num_batches: T. The chunks are dealt in laps of T, each lap in a new order of the batches. A label that goes on
            into the next lap there first gets batches that it was not given before.
    """
    batches = np.empty(len(labels), np.int64)
    bounds = np.r_[0, np.flatnonzero(labels[1:] != labels[:-1]) + 1, len(labels)]  # of the runs of one label
    for lap, start in enumerate(range(0, len(labels), num_batches)):
        stop = min(start + num_batches, len(labels))
        run = int(np.searchsorted(bounds, start, "right"))
        here = permute(np.arange(num_batches), num_batches, mix(key, lap, 1))
        had = np.zeros(num_batches, bool)
        had[batches[bounds[run - 1] : start]] = True
        for_head = here[~had[here]][: min(bounds[run], stop) - start] if had.any() else here[:0]
        others = np.setdiff1d(here, for_head)
        others = others[permute(np.arange(len(others)), len(others), mix(key, lap, 2))]
        batches[start:stop] = np.concatenate([for_head, others])[: stop - start]
    return batches
