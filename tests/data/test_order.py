"""Which rows form step t: every row once an epoch, for any number of ranks, well shuffled, found at once."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare, kstest

from trainer.data.order import Order, mix, permute, split_rows

# Drawn when the order was first released.
MIXED = 13675133952202209295
FIRST_ROWS = [714, 119, 380, 47, 424, 971, 941, 338]
SOURCES = [0, 0, 1, 1, 1]
FIRST_ROWS_OF_TWO = [11, 16, 1, 4, 8, 6, 3, 5, 7, 0]

SIZES = [1, 2, 3, 5, 16, 17, 1000]


def _images(size: int, key: int) -> NDArray[np.int64]:
    return permute(np.arange(size), size, key)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = tuple(draw(st.lists(st.integers(1, 150), min_size=1, max_size=4)))
    return Order(sizes, draw(st.integers(1, 60)), draw(st.integers(0, 2**63)))


@settings(max_examples=60, deadline=None)
@given(order=orders(), epoch=st.integers(0, 1000), world_size=st.integers(1, 9))
def test_every_row_stands_once_in_an_epoch(order: Order, epoch: int, world_size: int) -> None:
    """Over the steps of an epoch and the ranks of a step, for every source; each step takes one source."""
    seen: list[list[int]] = [[] for _ in order.sizes]
    short = [0] * len(order.sizes)
    for index in range(order.steps_per_epoch):
        step = order.step(epoch, index)
        shares = split_rows(len(step.rows), world_size)
        assert sum(shares) == len(step.rows)
        assert max(shares) - min(shares) <= 1
        assert len(shares) == world_size
        assert sorted(shares, reverse=True) == list(shares)
        assert len(step.rows) <= order.batch_size
        short[step.source] += len(step.rows) < order.batch_size
        seen[step.source].extend(step.rows.tolist())
    assert [sorted(rows) for rows in seen] == [list(range(size)) for size in order.sizes]
    assert max(short) <= 1, "only the last step of a source may be short"


@settings(max_examples=30, deadline=None)
@given(order=orders(), epoch=st.integers(0, 50), data=st.data())
def test_a_step_is_a_pure_function(order: Order, epoch: int, data: st.DataObject) -> None:
    """Another object, asked for this step alone, answers the same."""
    index = data.draw(st.integers(0, order.steps_per_epoch - 1))
    for earlier in range(index):
        order.step(epoch, earlier)
    fresh = Order(order.sizes, order.batch_size, order.seed).step(epoch, index)
    step = order.step(epoch, index)
    assert step.source == fresh.source
    assert step.rows.tolist() == fresh.rows.tolist()


def test_the_order_of_a_release_is_kept() -> None:
    """A run that is resumed under a later version must find its rows; these were drawn once and stay."""
    assert mix(42, 0, 0) == MIXED
    assert Order((1000,), 8, 42).step(0, 0).rows.tolist() == FIRST_ROWS
    steps = [Order((20, 30), 10, 7).step(1, index) for index in range(5)]
    assert [step.source for step in steps] == SOURCES
    assert steps[0].rows.tolist() == FIRST_ROWS_OF_TWO


@pytest.mark.parametrize("size", SIZES)
def test_permutation_is_a_bijection(size: int) -> None:
    for key in range(50):
        assert sorted(_images(size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [17, 1000])
def test_epochs_seeds_and_sources_differ(size: int) -> None:
    def epoch_rows(seed: int, epoch: int) -> list[int]:
        order = Order((size,), 4, seed)
        return [row for index in range(order.steps_per_epoch) for row in order.step(epoch, index).rows.tolist()]

    plans = [tuple(epoch_rows(seed, epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(plans)) == 25
    twins = Order((size, size), size, 1)
    one, other = twins.step(0, 0), twins.step(0, 1)
    assert one.source != other.source
    assert one.rows.tolist() != other.rows.tolist()


def test_sources_are_interleaved() -> None:
    """Steps of a small source lie all over the epoch, elsewhere in each."""
    order = Order((4000, 400), 10, 3)
    places = [[index for index in range(440) if order.step(epoch, index).source == 1] for epoch in range(10)]
    assert all(len(found) == 40 for found in places)
    assert len({tuple(found) for found in places}) == 10
    assert kstest(np.concatenate(places) / 440, "uniform").pvalue > 1e-3


def test_a_step_among_a_billion_rows_is_found_at_once() -> None:
    order = Order((10**9, 10**8), 16, 42)
    last = order.steps_per_epoch - 1
    tracemalloc.start()
    start = time.perf_counter()
    rows = [order.step(3, index).rows for index in (0, 12_345_678, last)]
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(0 <= row < 10**9 for step in rows for row in step)
    assert len(np.unique(np.concatenate(rows))) == 48
    assert seconds < 0.5
    assert peak < 1_000_000


# -- quality of the shuffle: fixed keys, so these can't fail by chance ---------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_permutations_of_few_rows_are_equally_likely(size: int) -> None:
    _, counts = np.unique([_images(size, mix(key)) for key in range(4800)], axis=0, return_counts=True)
    assert len(counts) == {2: 2, 3: 6, 4: 24}[size]
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("size", [100, 1000, 4097])
def test_an_image_says_nothing_about_its_place(size: int) -> None:
    """Chi-square over a table of 10 x 10 bins of place and image, summed over many keys."""
    num_keys = 200_000 // size
    images = np.stack([_images(size, mix(key)) for key in range(num_keys)])
    places = np.broadcast_to(np.arange(size), images.shape)
    table, _, _ = np.histogram2d(places.ravel(), images.ravel(), bins=10, range=[[0, size]] * 2)
    bins = np.histogram(np.arange(size), bins=10, range=(0, size))[0]
    expected = np.outer(bins, bins) / size * num_keys
    # Permutations fix the margins: 9 x 9 degrees of freedom; the cells of one vary by size / (size - 1) more.
    assert chisquare(table.ravel(), expected.ravel(), ddof=100 - 1 - 81).pvalue > 1e-3


@pytest.mark.parametrize("size", [1000, 4097])
def test_displacement_neighbours_and_fixed_points_are_those_of_chance(size: int) -> None:
    num_keys = 200
    images = np.stack([_images(size, mix(key, 1)) for key in range(num_keys)])
    displacement = np.abs(images - np.arange(size)).mean()
    assert displacement == pytest.approx((size * size - 1) / (3 * size), rel=0.01)
    # Each is Poisson with mean 1 per permutation: 200 in all, standard deviation 14.
    assert abs((images == np.arange(size)).sum() - num_keys) < 60
    assert abs((np.diff(images, axis=1) == 1).sum() - num_keys) < 60
    assert abs((np.diff(images, axis=1) == -1).sum() - num_keys) < 60


def test_epochs_are_independent() -> None:
    """Rows that met in a batch of one epoch meet again in the next no more often than by chance."""
    order = Order((1024,), 16, 9)
    batch_of = np.empty((20, 1024), dtype=np.int64)
    for epoch in range(20):
        for index in range(64):
            batch_of[epoch, order.step(epoch, index).rows] = index
    together = 0
    for epoch in range(19):
        pairs = np.unique(batch_of[epoch] * 64 + batch_of[epoch + 1], return_counts=True)[1]
        together += int((pairs * (pairs - 1) // 2).sum())
    # 64 * C(16, 2) pairs of an epoch, each together again with probability 15 / 1023.
    expected = 19 * 64 * 120 * 15 / 1023
    assert together == pytest.approx(expected, rel=0.1)


def test_steps_outside_the_epoch_are_a_mistake() -> None:
    with pytest.raises(AssertionError):
        Order((10,), 4, 0).step(0, 3)
