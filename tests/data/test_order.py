"""Which rows form step t: every row once an epoch, for any number of ranks, well shuffled, found at once."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from tests.data.test_parts import group_sizes, whole_pass
from trainer.data.order import Order, split_rows
from trainer.data.parts import BlockShuffle, Permutation
from trainer.data.permutation import mix

# Drawn when the order was first released.
MIXED = 13675133952202209295
FIRST_ROWS = [714, 119, 380, 47, 424, 971, 941, 338]
SOURCES = [0, 0, 1, 1, 1]
FIRST_ROWS_OF_TWO = [11, 16, 1, 4, 8, 6, 3, 5, 7, 0]


def _order(sizes: Sequence[int], batch_size: int, seed: int) -> Order:
    return Order([Permutation(size) for size in sizes], batch_size, seed)


parts = st.one_of(st.integers(1, 150).map(Permutation), group_sizes.map(lambda sizes: BlockShuffle(tuple(sizes))))


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Every row once an epoch: all kinds of parts, mixed in proportion."""
    drawn = tuple(draw(st.lists(parts, min_size=1, max_size=4)))
    batch_size = draw(st.integers(1, 60)) if max(part.size for part in drawn) < 500 else draw(st.integers(300, 5000))
    return Order(drawn, batch_size, draw(st.integers(0, 2**63)))


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
    fresh = Order(order.parts, order.batch_size, order.seed, order.mixing, order.weights).step(epoch, index)
    step = order.step(epoch, index)
    assert step.source == fresh.source
    assert step.rows.tolist() == fresh.rows.tolist()


def test_the_order_of_a_release_is_kept() -> None:
    """A run that is resumed under a later version must find its rows; these were drawn once and stay."""
    assert mix(42, 0, 0) == MIXED
    assert _order((1000,), 8, 42).step(0, 0).rows.tolist() == FIRST_ROWS
    steps = [_order((20, 30), 10, 7).step(1, index) for index in range(5)]
    assert [step.source for step in steps] == SOURCES
    assert steps[0].rows.tolist() == FIRST_ROWS_OF_TWO


@pytest.mark.parametrize("size", [17, 1000])
def test_epochs_seeds_and_sources_differ(size: int) -> None:
    def epoch_rows(seed: int, epoch: int) -> list[int]:
        order = _order((size,), 4, seed)
        return [row for index in range(order.steps_per_epoch) for row in order.step(epoch, index).rows.tolist()]

    plans = [tuple(epoch_rows(seed, epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(plans)) == 25
    twins = _order((size, size), size, 1)
    one, other = twins.step(0, 0), twins.step(0, 1)
    assert one.source != other.source
    assert one.rows.tolist() != other.rows.tolist()


def test_sources_are_interleaved() -> None:
    """Steps of a small source lie all over the epoch, elsewhere in each."""
    order = _order((4000, 400), 10, 3)
    places = [[index for index in range(440) if order.step(epoch, index).source == 1] for epoch in range(10)]
    assert all(len(found) == 40 for found in places)
    assert len({tuple(found) for found in places}) == 10
    assert kstest(np.concatenate(places) / 440, "uniform").pvalue > 1e-3


def test_a_step_among_a_billion_rows_is_found_at_once() -> None:
    order = _order((10**9, 10**8), 16, 42)
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


def test_epochs_are_independent() -> None:
    """Rows that met in a batch of one epoch meet again in the next no more often than by chance."""
    order = _order((1024,), 16, 9)
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
        _order((10,), 4, 0).step(0, 3)


# -- several sources ------------------------------------------------------------------------------------------


def _sources(order: Order, epoch: int) -> list[int]:
    return [order.step(epoch, index).source for index in range(order.steps_per_epoch)]


def test_round_robin_is_that_of_sentence_transformers() -> None:
    """The same source at each step, the same number of steps, and the rows that are left out are counted."""
    from datasets import Dataset
    from sentence_transformers.sampler import RoundRobinBatchSampler
    from torch.utils.data import BatchSampler, ConcatDataset, SequentialSampler

    sizes = (95, 40, 61)
    sets = [Dataset.from_dict({"text": ["x"] * size}) for size in sizes]
    samplers = [BatchSampler(SequentialSampler(range(size)), 8, drop_last=False) for size in sizes]
    theirs = list(RoundRobinBatchSampler(ConcatDataset(sets), samplers))  # type: ignore[arg-type]
    order = Order([Permutation(size) for size in sizes], 8, 3, "round_robin")
    starts = np.cumsum(sizes)
    assert _sources(order, 0) == [int(np.searchsorted(starts, rows[0], "right")) for rows in theirs]
    assert [len(order.step(0, i).rows) for i in range(order.steps_per_epoch)] == [len(rows) for rows in theirs]
    assert order.rows_left_out == sum(sizes) - sum(map(len, theirs)) == (95 - 40) + (61 - 40)
    left_out = [set(range(95)) - {row for i in range(0, 15, 3) for row in order.step(e, i).rows} for e in (0, 1)]
    assert left_out[0] != left_out[1], "another epoch leaves out other rows"


@settings(max_examples=30, deadline=None)
@given(
    drawn=st.lists(st.tuples(parts, st.floats(0.01, 10)), min_size=2, max_size=4),
    seed=st.integers(0, 2**63),
)
def test_weighted_sources_get_their_share_and_use_every_row(drawn: list, seed: int) -> None:
    """An epoch is as long as under proportional, shares are right to one step, and the steps of a source, one epoch
    behind the other, are whole passes over its rows."""
    sources, weights = zip(*drawn, strict=True)
    batch_size = 20 if max(part.size for part in sources) < 500 else 2000
    order = Order(sources, batch_size, seed, "weighted", weights)
    assert order.steps_per_epoch == Order(sources, batch_size, seed).steps_per_epoch
    for steps, weight in zip(order.steps_by_source, weights, strict=True):
        assert abs(steps - order.steps_per_epoch * weight / sum(weights)) < 1
    seen: list[list[int]] = [[] for _ in sources]
    for epoch in range(3):
        assert np.bincount(_sources(order, epoch), minlength=len(sources)).tolist() == list(order.steps_by_source)
        for index in range(order.steps_per_epoch):
            step = order.step(epoch, index)
            seen[step.source] += step.rows.tolist()
    for part, rows in zip(sources, seen, strict=True):
        passes = [sorted(rows[i : i + part.size]) for i in range(0, len(rows) - part.size + 1, part.size)]
        assert all(one == list(range(part.size)) for one in passes)
        rest = rows[len(passes) * part.size :]
        assert len(set(rest)) == len(rest)


def test_weighted_sources_lie_among_each_other() -> None:
    order = Order([Permutation(4000), Permutation(4000)], 10, 3, "weighted", (10, 1))
    places = [[i for i, source in enumerate(_sources(order, epoch)) if source == 1] for epoch in range(10)]
    assert all(len(found) == 73 for found in places)
    assert len({tuple(found) for found in places}) == 10
    assert kstest(np.concatenate(places) / 800, "uniform").pvalue > 1e-3
    starts = [sources[:20] for sources in (_sources(order, epoch) for epoch in range(3))]
    assert starts[0] != starts[1], "no pattern that is the same in each epoch"


def test_streamed_sources_are_read_in_their_order_when_mixed() -> None:
    """The steps of a source within an epoch are its own pass, place by place: no group is opened twice."""
    part = BlockShuffle((3000, 5000, 900))
    order = Order([part, Permutation(2000)], 100, 5)
    mixed = [step for step in (order.step(2, i) for i in range(order.steps_per_epoch)) if step.source == 0]
    assert np.concatenate([step.rows for step in mixed]).tolist() == whole_pass(part, mix(5, 2, 0)).tolist()


def test_a_step_among_a_billion_streamed_rows_needs_little_memory() -> None:
    order = Order([BlockShuffle((50_000,) * 20_000)], 16, 42)
    tracemalloc.start()
    rows = [order.step(3, index).rows for index in (0, 12_345_678, order.steps_per_epoch - 1)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(np.concatenate(rows))) == 48
    assert peak < 8_000_000, "of the number of groups, not of rows"
