"""Batches without repeated texts, and of some rows of each label: what they promise, for any data, rank and resume."""

from __future__ import annotations

import json
import logging
import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest

from trainer.data.batches import StepBatches
from trainer.data.bylabel import LabelBatches
from trainer.data.distinct import DistinctTexts
from trainer.data.hashes import NO_TEXT
from trainer.data.loading import load
from trainer.data.module import PairData
from trainer.data.order import Order
from trainer.data.parts import Permutation
from trainer.data.sources import Source
from trainer.encoder import EncoderSpec


def distinct(texts: NDArray[np.int64]) -> DistinctTexts:
    return DistinctTexts(Permutation(len(texts)), lambda rows: texts[rows])


def by_label(counts: list[int], rows_per_label: int) -> LabelBatches:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    return LabelBatches(SimpleNamespace(labels=labels), rows_per_label)  # type: ignore[arg-type]


def batches_of(order: Order, epoch: int = 0) -> list[list[int]]:
    return [order.step(epoch, index).rows.tolist() for index in range(order.steps_per_epoch)]


def has_repeats(texts: NDArray[np.int64], rows: list[int]) -> bool:
    """Whether a text stands in two of the rows, told with sets."""
    sets = [set(one) - {NO_TEXT} for one in texts[rows].tolist()]
    return sum(map(len, sets)) > len(set().union(*sets))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 4)),
    num_texts=st.integers(1, 400),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**63),
)
def test_no_text_stands_twice_in_a_batch(shape: tuple[int, int], num_texts: int, batch_size: int, seed: int) -> None:
    """Any data, also such that can't be placed: as many steps as without, none empty, no row twice, all counted."""
    texts = np.random.default_rng(seed).integers(NO_TEXT, num_texts, shape)
    order = Order([distinct(texts)], batch_size, seed)
    assert order.steps_per_epoch == -(-shape[0] // batch_size)
    batches = batches_of(order)
    assert not any(has_repeats(texts, rows) for rows in batches)
    assert all(0 < len(rows) <= batch_size for rows in batches)
    seen = [row for rows in batches for row in rows]
    assert len(set(seen)) == len(seen) == shape[0] - order.rows_without_place(0)
    index = seed % order.steps_per_epoch
    alone = Order([distinct(texts)], batch_size, seed).step(0, index).rows.tolist()
    assert alone == batches[index], "asked for this step alone another object answers otherwise"


def test_rows_whose_texts_are_all_different_keep_their_order() -> None:
    texts = np.arange(2000).reshape(1000, 2)
    assert batches_of(Order([distinct(texts)], 8, 5)) == batches_of(Order([Permutation(1000)], 8, 5))


@pytest.mark.parametrize("batch_size", [16, 256])
def test_rows_that_fit_are_all_placed(batch_size: int) -> None:
    """As in NLI, each premise stands in three rows, neighbours in the file, and most hypotheses in one or two."""
    premises = np.repeat(np.arange(2000), 3)
    hypotheses = 5000 + np.random.default_rng(1).integers(0, 6000, 6000)
    texts = np.stack([premises, hypotheses], axis=1)
    plain, order = Order([Permutation(6000)], batch_size, 3), Order([distinct(texts)], batch_size, 3)
    assert sum(has_repeats(texts, rows) for rows in batches_of(plain)) > 10
    batches = batches_of(order)
    assert sorted(row for rows in batches for row in rows) == list(range(6000))
    assert order.rows_without_place(0) == 0
    assert all(len(rows) == batch_size for rows in batches[:-1])
    # Only what has to move moves.
    kept = sum(len(set(a) & set(b)) for a, b in zip(batches, batches_of(plain), strict=True))
    assert kept > 0.6 * 6000


def test_a_text_of_every_row_leaves_one_row_a_batch() -> None:
    texts = np.stack([np.zeros(100, np.int64), np.arange(1, 101)], axis=1)
    order = Order([distinct(texts)], 10, 3)
    assert [len(rows) for rows in batches_of(order)] == [1] * 10
    assert order.rows_without_place(0) == 90
    said = order.parts[0].tell_left_out(90)
    assert said.startswith("90 of 100 rows (90.0%) find no place in an epoch, others in each: data.no_duplicates, and")
    first, second = ({row for rows in batches_of(order, epoch) for row in rows} for epoch in (0, 1))
    assert first != second


# -- labels -----------------------------------------------------------------------------------------------


def most_batches(counts: list[int], labels_per_batch: int, rows_per_label: int) -> int:
    """Dealt by hand: each batch takes a chunk of the labels that have the most left, while there are enough labels."""
    chunks = Counter({k: n // rows_per_label + (n % rows_per_label > 1) for k, n in enumerate(counts)})
    dealt = 0
    while True:
        largest = [label for label, left in chunks.most_common(labels_per_batch) if left]
        if len(largest) < labels_per_batch:
            return dealt
        chunks.subtract(largest)
        dealt += 1


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=40),
    labels_per_batch=st.integers(2, 8),
    rows_per_label=st.integers(2, 6),
    seed=st.integers(0, 2**63),
)
def test_a_batch_holds_some_rows_of_each_of_its_labels(
    counts: list[int], labels_per_batch: int, rows_per_label: int, seed: int
) -> None:
    part, batch_size = by_label(counts, rows_per_label), labels_per_batch * rows_per_label
    if part.num_labels < labels_per_batch:
        with pytest.raises(ValueError, match=f"asks for {labels_per_batch} labels in a batch; 2 are needed"):
            part.refuse_unfit(batch_size, "x")
        return
    part.refuse_unfit(batch_size, "x")
    order = Order([part], batch_size, seed)
    full = most_batches(counts, labels_per_batch, rows_per_label)
    assert order.steps_per_epoch in (full, full + 1)
    for epoch in (0, 1):
        batches = batches_of(order, epoch)
        for rows in batches:
            labels = Counter(part.labels[rows].tolist())
            assert 2 <= len(labels) <= labels_per_batch
            assert all(2 <= count <= rows_per_label for count in labels.values())
            assert len(labels) == labels_per_batch or order.steps_per_epoch == full + 1
        seen = [row for rows in batches for row in rows]
        assert len(set(seen)) == len(seen)
        if epoch == 0:
            assert order.rows_without_place(0) == part.size - len(seen)
    index = seed % order.steps_per_epoch
    alone = Order([by_label(counts, rows_per_label)], batch_size, seed).step(1, index).rows.tolist()
    assert alone == batches[index]


def test_balanced_labels_leave_no_row_out() -> None:
    order = Order([by_label([12] * 40, 4)], 32, 1)
    assert order.steps_per_epoch == 15
    assert sorted(row for rows in batches_of(order) for row in rows) == list(range(480))


def test_a_label_lies_all_over_the_epoch() -> None:
    """A rare and a frequent one; and labels of about the same size meet each other as often as by chance."""
    order = Order([by_label([400, 40, *[150] * 20], 2)], 16, 3)
    places: dict[int, list[float]] = {0: [], 1: []}
    together = np.zeros((22, 22))
    for epoch in range(10):
        for index, rows in enumerate(batches_of(order, epoch)):
            labels = np.unique(order.parts[0].labels[rows])  # type: ignore[attr-defined]
            together[np.ix_(labels, labels)] += 1
            for label in {0, 1} & set(labels.tolist()):
                places[label].append(index / order.steps_per_epoch)
    assert all(kstest(found, "uniform").pvalue > 1e-3 for found in places.values())
    pairs = together[2:, 2:][np.triu_indices(20, 1)]
    assert pairs.min() > 0.6 * pairs.mean()
    assert pairs.max() < 1.4 * pairs.mean()


def test_labels_of_one_row_are_named() -> None:
    part = by_label([1, 8, 1, 9], 4)
    left_out = Order([part], 8, 1).rows_without_place(0)
    assert left_out == 3
    assert part.tell_left_out(3).endswith("; 2 labels have one row and are never used: 0, 2")


def test_what_no_batch_can_hold_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"x: data\.batch_size 10 with rows_per_label 4 leaves 2 rows over; make it a mul"
    ):
        by_label([8, 8, 8], 4).refuse_unfit(10, "x")
    with pytest.raises(
        ValueError, match="4 labels in a batch; 2 are needed, 3 have 2 rows or more: set rows_per_label to"
    ):
        by_label([8, 8, 8], 4).refuse_unfit(16, "x")
    with pytest.raises(ValueError, match=r"1 have 2 rows or more: change data\.batch_size"):
        by_label([8, 1, 1], 4).refuse_unfit(16, "x")
    labelled = {"text": "t", "label": "y"}
    for spec, cause in (
        ({"rows_per_label": 1}, "rows_per_label is 1; a positive of a text takes 2 rows or more"),
        ({"rows_per_label": 2, "streaming": True}, "rows_per_label does not go with streaming: true"),
        ({"rows_per_label": 2, "columns": {"text": "t"}}, "rows_per_label needs a column label; columns has text"),
    ):
        with pytest.raises(ValueError, match=cause):
            Source("x.jsonl", **{"columns": labelled, **spec})  # type: ignore[arg-type]
    for source in (Source("x.jsonl", labelled, streaming=True), Source("x.jsonl", labelled, rows_per_label=2)):
        with pytest.raises(ValueError, match=r"x.jsonl: data\.no_duplicates does not go with"):
            PairData([source], EncoderSpec("x"), no_duplicates=True)


@pytest.mark.parametrize("labels_per_batch", [2, 3, 4, 5])
def test_labels_that_max_rows_left_out_are_asked_for(labels_per_batch: int) -> None:
    """Rows sorted by label, of which a debug run takes the first: so many more rows are enough, one less is not."""
    labels = np.repeat([3, 0, 7, 1, 5], [100, 1, 50, 40, 30])
    table: Any = SimpleNamespace(labels=labels)
    what = f"with rows_per_label 2 asks for {labels_per_batch} labels in a batch; 2 are needed, 1 have 2 rows or more"
    if labels_per_batch == 5:  # four have two rows: max_rows is not to blame
        with pytest.raises(ValueError, match=f"{what}: change data.batch_size"):
            LabelBatches(table, 2, 64).refuse_unfit(10, "x")
        return
    needed = next(n for n in range(221) if sum(count > 1 for count in Counter(labels[:n]).values()) == labels_per_batch)
    message = rf"{what} among the first 64 rows \(data.max_rows\): raise data.max_rows to {needed} or more$"
    with pytest.raises(ValueError, match=message):
        LabelBatches(table, 2, 64).refuse_unfit(2 * labels_per_batch, "x")
    with pytest.raises(ValueError, match=r"raise data\.max_rows"):
        LabelBatches(table, 2, needed - 1).refuse_unfit(2 * labels_per_batch, "x")
    LabelBatches(table, 2, needed).refuse_unfit(2 * labels_per_batch, "x")


# -- through a run ----------------------------------------------------------------------------------------


def run_of(sources: list[Source], encoder: Path, cache: Path, **settings: Any) -> PairData:
    spec = EncoderSpec(str(encoder), max_length=32)
    data = PairData(sources, spec, cache_dir=str(cache), seed=3, **settings)
    data.setup("fit")
    return data


def assert_same_on_all_ranks(data: PairData) -> list[list[int]]:
    """Any number of ranks, and a loader worker that has got the plan as bytes, hold the rows of one process."""
    steps = data.steps_per_epoch
    whole = [
        b.targets.row_ids_B.tolist()
        for b in map(StepBatches(data.tables, data.order, steps, 0, 1).__getitem__, range(steps))
    ]
    for world_size in (2, 3):
        ranks = [StepBatches(data.tables, data.order, steps, rank, world_size) for rank in range(world_size)]
        ranks = pickle.loads(pickle.dumps(ranks))
        for step in reversed(range(steps)):
            rows = [row for batches in ranks for row in batches[step].targets.row_ids_B.tolist()]
            assert sorted(rows) == sorted(whole[step])
    return whole


def test_real_inferences_without_repeated_texts(
    data_dir: Path, tmp_path: Path, minilm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """2,196 pairs in which nearly every premise stands three times; the texts themselves say what repeats."""
    path = data_dir / "nli" / "nli-3way.dev.jsonl.gz"
    source = Source(str(path), {"anchor": "premise", "positive": "hypothesis"}, where={"source": "id"})
    with caplog.at_level(logging.WARNING):
        data = run_of([source], minilm, tmp_path, batch_size=64, no_duplicates=True)
    assert "find no place" not in caplog.text
    rows = load(source, tmp_path)
    texts = [{row["anchor"], row["positive"]} for row in rows.to_list()]

    def repeats(batch: list[int]) -> int:
        return sum(len(texts[row]) for row in batch) - len(set().union(*(texts[row] for row in batch)))

    batches = assert_same_on_all_ranks(data)
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    assert max(map(repeats, batches)) == 0
    plain = batches_of(Order([Permutation(len(rows))], 64, 3))
    assert sum(map(repeats, plain)) > 50, "the data has nothing to separate"


def test_two_sources_each_in_its_own_way(tmp_path: Path, tiny_encoder: Path, demo_texts: list[str]) -> None:
    """Pairs and labelled texts in one run: the batches of the one are drawn by label, those of the other are not."""
    texts = list(dict.fromkeys(demo_texts))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"a": x, "b": y}) + "\n" for x, y in zip(texts[:40], texts[40:80], strict=True))
    )
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"t": x, "y": i % 6}) + "\n" for i, x in enumerate(texts[:60]))
    )
    sources = [
        Source(str(tmp_path / "a.jsonl"), {"anchor": "a", "positive": "b"}),
        Source(str(tmp_path / "b.jsonl"), {"text": "t", "label": "y"}, rows_per_label=4),
    ]
    data = run_of(sources, tiny_encoder, tmp_path, batch_size=8)
    assert_same_on_all_ranks(data)
    steps = [data.order.step(0, index) for index in range(data.steps_per_epoch)]
    labels = data.tables[1].labels
    assert labels is not None
    for step in steps:
        if step.source == 1:
            assert set(Counter(labels[step.rows].tolist()).values()) <= {2, 4}
    assert sorted(row for s in steps if s.source == 0 for row in s.rows.tolist()) == list(range(40))
    assert sorted(row for s in steps if s.source == 1 for row in s.rows.tolist()) == list(range(60))
