"""Batches in which no text stands twice. Which rows form one follows from its number and the key of the pass alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.hashes import NO_TEXT, mix_all
from trainer.data.parts import Part, steps_per_window
from trainer.data.permutation import mix

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
