"""What is said about ids: how many differ, and the first of those that stand twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
from datasets import Dataset

from trainer.predict.ids import about_ids


def test_counts_and_the_first_are_those_of_a_dictionary() -> None:
    names = [f"d{i}" for i in np.random.default_rng(0).integers(0, 10**6, 25_000)]  # several batches
    counts = Counter(names)
    first = next(name for name in names if counts[name] > 1)
    said = about_ids(Dataset.from_dict({"text": names, "id": names}), 5)
    assert said is not None
    repeats = f"in {25_000 - len(counts):,} of 25,000 rows stands the id of an earlier row"
    assert said == f"{repeats}, the first such id is '{first}'; all rows are written"
    once = list(counts)
    assert about_ids(Dataset.from_dict({"text": once, "id": once}), 5) is None


def test_one_row_is_no_repetition() -> None:
    assert about_ids(Dataset.from_dict({"text": ["a"], "id": ["a"]}), 0) is None


def test_without_ids_left_out_rows_are_said() -> None:
    rows = Dataset.from_dict({"text": ["a", "b"]})
    assert about_ids(rows, 0) is None
    said = "1 bad row is left out, and ids are numbers of the rows that are left, from 0; name a column of ids: --id"
    assert about_ids(rows, 1) == said
