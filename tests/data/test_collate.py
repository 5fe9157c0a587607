"""Packing: nothing lost, nothing padded, segments in order of length, rows found again."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.batch import Targets
from trainer.data.collate import TokenSpans, pack, pack_texts, plan_rounds


@st.composite
def texts_of_columns(draw: st.DrawFn) -> list[list[list[int]]]:
    num_columns, num_rows = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    text = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
    return [[draw(text) for _ in range(num_rows)] for _ in range(num_columns)]


def _targets(num_rows: int) -> Targets:
    return Targets((num_rows,), torch.arange(num_rows))


@settings(max_examples=60, deadline=None)
@given(columns=texts_of_columns())
def test_each_text_is_found_again(columns: list[list[list[int]]]) -> None:
    num_rows = len(columns[0])
    arrays = [[np.array(ids, dtype=np.int32) for ids in column] for column in columns]
    batch = pack(arrays, _targets(num_rows), num_rows=num_rows, source=3)
    assert list(batch.lengths) == sorted(len(ids) for column in columns for ids in column)
    assert batch.input_ids_T.shape == batch.positions_T.shape == (sum(batch.lengths),)
    assert batch.input_ids_T.dtype == batch.positions_T.dtype == torch.int64
    segments = [part.tolist() for part in batch.input_ids_T.split(list(batch.lengths))]
    column_major = [segments[place] for place in batch.order_S.tolist()]
    assert column_major == [ids for column in columns for ids in column]
    for positions in batch.positions_T.split(list(batch.lengths)):
        assert positions.tolist() == list(range(len(positions)))
    assert (batch.num_columns, batch.num_rows, batch.source) == (len(columns), num_rows, 3)
    assert batch.num_tokens == sum(batch.lengths)
    assert batch.padded_tokens == sum(num_rows * max(len(ids) for ids in column) for column in columns)


def _pack_as_it_was(columns: list[list[np.ndarray]]) -> tuple[torch.Tensor, ...]:
    """The stream made by laying view beside view: what `pack` gathers at once."""
    segments = [ids for column in columns for ids in column]
    lengths = np.array([len(ids) for ids in segments], dtype=np.int64)
    by_length = np.argsort(lengths, kind="stable")
    order = np.empty_like(by_length)
    order[by_length] = np.arange(len(segments))
    ids = np.concatenate([segments[i] for i in by_length]).astype(np.int64)
    positions = np.concatenate([np.arange(length) for length in lengths[by_length]])
    return tuple(torch.from_numpy(array) for array in (ids, positions, order, lengths[by_length]))


@pytest.mark.parametrize("num_rows", [1, 16, 1024])
def test_spans_of_one_array_give_the_same_batch_as_views(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    values = rng.integers(0, 120_000, 50_000, dtype=np.int32)
    starts, lengths = rng.integers(0, 49_000, (3, num_rows)), rng.integers(1, 200, (3, num_rows))
    spans = [TokenSpans(values, s, n) for s, n in zip(starts, lengths, strict=True)]
    views = [list(column) for column in spans]
    expected = _pack_as_it_was(views)
    for columns in (spans, views, pickle.loads(pickle.dumps(spans))):
        batch = pack(columns, _targets(num_rows), num_rows=num_rows)
        found = (batch.input_ids_T, batch.positions_T, batch.order_S, torch.tensor(batch.lengths))
        for f, e in zip(found, expected, strict=True):
            assert f.dtype == e.dtype
            assert torch.equal(f, e)
    assert len(pickle.dumps(TokenSpans(values, starts[0][:2], lengths[0][:2]))) < 4000, "the whole array was sent"


def test_a_placeholder_row_counts_for_nothing() -> None:
    targets = Targets((1, 0), torch.empty(0, dtype=torch.int64), rank=1)
    batch = pack([[np.array([5, 6])], [np.array([7])]], targets, num_rows=0)
    assert batch.lengths == (1, 2)
    assert batch.num_tokens == batch.padded_tokens == 0


def test_a_text_without_tokens_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="without a single token"):
        pack([[np.array([1]), np.array([], dtype=np.int64)]], _targets(2), num_rows=2)


def test_pack_texts_is_one_column() -> None:
    batch = pack_texts([[4, 5, 6], [7]])
    assert batch.input_ids_T.tolist() == [7, 4, 5, 6]
    assert batch.order_S.tolist() == [1, 0]
    assert (batch.num_columns, batch.num_rows) == (1, 2)
    assert batch.targets.rows_per_rank == (2,)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_texts", [1, 2, 7, 41, 300])
def test_rounds_hold_every_text_once_within_the_budget(world_size: int, num_texts: int) -> None:
    lengths = np.random.default_rng(num_texts).integers(3, 90, num_texts).tolist()
    rounds = plan_rounds(lengths, world_size, max_tokens=100)
    assert sorted(text for shares in rounds for share in shares for text in share) == list(range(num_texts))
    for shares in rounds:
        assert len(shares) == world_size
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        for share in shares:
            padded = len(share) * max((lengths[i] for i in share), default=0)
            assert padded <= 100 or len(share) == 1
    # Every round but the last is full.
    for full in rounds[:-1]:
        assert (len(full[0]) + 1) * lengths[full[0][0]] > 100
