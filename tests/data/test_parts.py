"""Rows that are fetched by group: each once in a pass, near ones near, and well mixed where that allows it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from trainer.data.parts import SLICE_ROWS, BlockShuffle
from trainer.data.permutation import mix

# Drawn when the order was first released.
BLOCK_ROWS = [461, 5622, 6126, 3103, 7050, 2305]

# Groups from one row to more than three slices, empty ones among them.
group_sizes = st.lists(st.one_of(st.integers(0, 40), st.integers(2000, 7000)), min_size=1, max_size=20).filter(sum)


def whole_pass(part: BlockShuffle, key: int) -> NDArray[np.int64]:
    return part.rows(np.arange(part.size), key)


@settings(max_examples=30, deadline=None)
@given(sizes=group_sizes, key=st.integers(0, 2**63), data=st.data())
def test_places_of_a_block_shuffle_are_found_one_by_one(sizes: list[int], key: int, data: st.DataObject) -> None:
    """A fresh object, asked for a few places in any order, answers as one that was asked for all."""
    whole = whole_pass(BlockShuffle(tuple(sizes)), key)
    assert sorted(whole.tolist()) == list(range(sum(sizes)))
    places = np.array(data.draw(st.lists(st.integers(0, sum(sizes) - 1), min_size=1, max_size=20)))
    assert BlockShuffle(tuple(sizes)).rows(places, key).tolist() == whole[places].tolist()


def test_a_pass_has_few_slices_and_groups_open_at_once() -> None:
    """16,384 rows in a row come from at most 9 to 16 slices; the groups of a bundle are done before the next begins."""
    part = BlockShuffle((5 * SLICE_ROWS,) * 40)
    rows = whole_pass(part, 7)
    for start in range(0, part.size, 8 * SLICE_ROWS):
        window = rows[start : start + 8 * SLICE_ROWS]
        assert len(np.unique(window // SLICE_ROWS)) == 8
        assert len(np.unique(window // (5 * SLICE_ROWS))) > 3, "a window mixes several groups"
    bundle_rows = 8 * 5 * SLICE_ROWS
    bundles = [set((rows[i : i + bundle_rows] // (5 * SLICE_ROWS)).tolist()) for i in range(0, part.size, bundle_rows)]
    assert all(len(bundle) == 8 for bundle in bundles)
    assert set.union(*bundles) == set(range(40))
    assert set(bundles[0]) != set(range(8)), "groups are shuffled"


def test_rows_of_a_window_are_well_mixed() -> None:
    """Chi-square of the slice that each of the first 64 places shows, over many keys: each of 8 is as likely."""
    part = BlockShuffle((SLICE_ROWS,) * 8)
    images = np.stack([part.rows(np.arange(64), mix(key)) for key in range(100)])
    assert chisquare(np.bincount(images.ravel() // SLICE_ROWS, minlength=8)).pvalue > 1e-3
    assert chisquare(np.histogram(images % SLICE_ROWS, bins=16, range=(0, SLICE_ROWS))[0]).pvalue > 1e-3
    assert len(np.unique(np.diff(images, axis=1) == 1, return_counts=True)[1]) <= 2
    assert (np.diff(images, axis=1) == 1).mean() < 0.01


def test_the_block_shuffle_of_a_release_is_kept() -> None:
    assert BlockShuffle((3000, 50, 7000)).rows(np.arange(6), mix(42, 0, 0)).tolist() == BLOCK_ROWS
