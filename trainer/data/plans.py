"""Batches that are put together on purpose: without a text that stands twice in them, or of some rows of each label.

As of every order, which rows form a batch follows from the key of the pass and the number of the batch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.hashes import NO_TEXT, mix_all
from trainer.data.order import Part, mix, permute, steps_per_window

if TYPE_CHECKING:
    from trainer.data.tokens import TokenTable

_WINDOW_BATCHES = 64  # batches among which rows are exchanged
_TRIES = 8  # partners that a row tries in a round
_IDLE_ROUNDS = 4  # without an exchange, until the rows that are left are given up
_COUNTED_ROWS = 1 << 20  # planned, in whole windows, to count the rows that no batch takes


@dataclass(frozen=True, eq=False)
class DistinctTexts(Part):
    """Batches in which no text stands in two rows, in no column of them.

    The shuffled rows are cut into windows of 64 batches. Of two rows of a batch that share a text one changes places
    with a row of another batch of the window, so batches stay full and there are as many as without. A row for which no
    such exchange is found is left out of this pass, and its batch is shorter. A window is planned on its own: memory
    does not grow with the number of rows, and a batch is found in the time that one window takes.

    Args:
        shuffle: of the rows.
        hashes: of the texts of some rows, (B, C), NO_TEXT where a row has none.
    """

    shuffle: Part
    hashes: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    keeps_order: ClassVar[bool] = True
    _planned: dict[tuple[int, int, int], list[NDArray[np.int64]]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.shuffle.size

    def rows(self, places: NDArray[np.int64], key: int) -> NDArray[np.int64]:
        return self.shuffle.rows(places, key)

    def batch(self, index: int, batch_size: int, key: int) -> NDArray[np.int64]:
        window, place = divmod(index, _batches_per_window(batch_size))
        found = self._planned.get((window, batch_size, key))
        if found is None:
            found = self._plan(window, batch_size, key)
            if len(self._planned) > 1:
                self._planned.clear()
            self._planned[window, batch_size, key] = found
        return found[place].copy()

    def _plan(self, window: int, batch_size: int, key: int) -> list[NDArray[np.int64]]:
        num_rows = batch_size * _batches_per_window(batch_size)
        first = window * num_rows
        rows = self.shuffle.rows(np.arange(first, min(first + num_rows, self.size)), key)
        places = separate(self.hashes(rows), batch_size, mix(key, 4, window))
        by_place = np.full_like(rows, -1)
        by_place[places[places >= 0]] = rows[places >= 0]
        batches = np.split(by_place, np.arange(batch_size, len(rows), batch_size))
        return [batch[batch >= 0] for batch in batches]

    def num_left_out(self, batch_size: int, key: int) -> int:
        """Counted in windows of a million rows together, and multiplied where there are more."""
        num_rows = batch_size * _batches_per_window(batch_size)
        num_windows = -(-self.size // num_rows)
        stride = -(-num_windows // max(1, _COUNTED_ROWS // num_rows))
        placed = seen = 0
        for window in range(0, num_windows, stride):
            placed += sum(map(len, self._plan(window, batch_size, key)))
            seen += min(num_rows, self.size - window * num_rows)
        return round((seen - placed) * self.size / seen)

    def tell_left_out(self, num_rows: int) -> str:
        why = "data.no_duplicates, and a text of theirs stands in too many rows"
        return f"{super().tell_left_out(num_rows)}, others in each: {why}"


def _batches_per_window(batch_size: int) -> int:
    return max(_WINDOW_BATCHES, steps_per_window(batch_size))


def separate(texts_RC: NDArray[np.int64], batch_size: int, key: int) -> NDArray[np.int64]:
    """Places for R rows such that no text stands in two rows of a batch.

    Rows start at their own place; place p belongs to batch p // batch_size. In each round every row that repeats a text
    of an earlier row of its batch looks at some pseudo-random rows, and changes places with the first one such that
    neither meets its own texts in the other's batch. All rows do so at the same time: of exchanges that would bring a
    text into a batch twice only the first is made.

    Args:
        texts_RC: hashes of the texts of each row; NO_TEXT counts for nothing.
        batch_size: rows of a batch, the last may have fewer.
        key: of the pseudo-random choice.

    Returns:
        (R,) place of each row, -1 where it would repeat a text: then its place stays empty. Some row of each batch
        always has its place.
    """
    num_rows = len(texts_RC)
    codes_RC, num_codes = _repeated(texts_RC)
    row_E, column_E = np.nonzero(codes_RC >= 0)
    code_E = codes_RC[row_E, column_E]
    place_R, row_at = np.arange(num_rows), np.arange(num_rows)
    idle = turn = 0
    while True:
        taken_E = (place_R[row_E] // batch_size) * num_codes + code_E
        by_key = np.argsort(taken_E, kind="stable")
        taken = taken_E[by_key]
        # The first of equals is the one with the least row number, for row_E ascends.
        repeats = np.zeros(num_rows, bool)
        repeats[row_E[by_key[1:]][taken[1:] == taken[:-1]]] = True
        wanting_D = np.flatnonzero(repeats)
        if not len(wanting_D) or idle == _IDLE_ROUNDS:
            return np.where(repeats, -1, place_R)
        turn += 1
        draws = mix_all(wanting_D[:, None] * _TRIES + np.arange(_TRIES), mix(key, turn))
        partner_DT = row_at[(draws % np.uint64(num_rows)).astype(np.int64)]
        one, other = _exchanges(wanting_D, partner_DT, place_R // batch_size, codes_RC, taken, repeats, num_codes)
        idle = 0 if len(one) else idle + 1
        place_R[one], place_R[other] = place_R[other], place_R[one]
        row_at[place_R[one]], row_at[place_R[other]] = one, other


def _repeated(texts_RC: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Numbers of the texts that stand in the window more than once, -1 for the others; how many numbers there are."""
    distinct, codes, counts = np.unique(texts_RC, return_inverse=True, return_counts=True)
    codes_RC = codes.reshape(texts_RC.shape)
    codes_RC = np.where((counts[codes_RC] > 1) & (texts_RC != NO_TEXT), codes_RC, -1)
    for column in range(1, texts_RC.shape[1]):  # a row does not repeat itself
        codes_RC[(codes_RC[:, :column] == codes_RC[:, [column]]).any(axis=1), column] = -1
    return codes_RC, len(distinct)


def _exchanges(
    wanting_D: NDArray[np.int64],
    partner_DT: NDArray[np.int64],
    batch_R: NDArray[np.int64],
    codes_RC: NDArray[np.int64],
    taken: NDArray[np.int64],
    repeats: NDArray[np.bool_],
    num_codes: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and partners that change places now; ``taken`` are the texts of all batches, sorted."""

    def brought(rows: NDArray[np.int64], to: NDArray[np.int64]) -> NDArray[np.int64]:
        """What rows bring into the batches of others: (..., C), -1 for nothing."""
        codes = codes_RC[rows]
        return np.where(codes >= 0, batch_R[to][..., None] * num_codes + codes, -1)

    def is_free(keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        places = np.minimum(np.searchsorted(taken, keys), len(taken) - 1)
        return (taken[places] != keys).all(axis=-1)

    wanting_DT = np.broadcast_to(wanting_D[:, None], partner_DT.shape)
    fits_DT = ~repeats[partner_DT] & is_free(brought(wanting_DT, partner_DT)) & is_free(brought(partner_DT, wanting_DT))
    has_one = fits_DT.any(axis=1)
    one, other = wanting_D[has_one], partner_DT[has_one, fits_DT[has_one].argmax(axis=1)]
    first = np.unique(other, return_index=True)[1]  # nobody changes with two
    one, other = one[first], other[first]
    keys = np.concatenate([brought(one, other), brought(other, one)], axis=1)
    clashes = np.zeros(len(one), bool)
    exchange = np.broadcast_to(np.arange(len(one))[:, None], keys.shape)[keys >= 0]
    keys = keys[keys >= 0]
    by_key = np.argsort(keys, kind="stable")
    clashes[exchange[by_key[1:]][keys[by_key[1:]] == keys[by_key[:-1]]]] = True
    return one[~clashes], other[~clashes]


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
            fitting = [k for k in range(2, batch_size // 2 + 1) if batch_size % k == 0]
            fitting = [k for k in fitting if batch_size // k <= self.num_labels]
            remedy = f"set rows_per_label to {fitting[0]}" if fitting else "change data.batch_size"
            raise ValueError(f"{what} asks for {labels_per_batch} labels in a batch; 2 are needed, {found}: {remedy}")

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
