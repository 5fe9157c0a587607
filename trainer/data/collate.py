"""From token ids to a packed batch: one stream, no padding, segments sorted by length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.batch import PackedBatch, Targets


def pack(
    columns: Sequence[Sequence[NDArray[np.integer]]], targets: Targets, num_rows: int, source: int = 0
) -> PackedBatch:
    """Pack the texts of this rank's rows.

    Args:
        columns: for each text column the token ids of each row; all columns have the same number of rows.
        targets: of the rows that count.
        num_rows: rows that count (0 where the only row is a placeholder).
        source: index of the training source.
    """
    segments = [np.asarray(ids) for column in columns for ids in column]
    lengths = np.array([len(ids) for ids in segments], dtype=np.int64)
    assert lengths.min() > 0, "a text without a single token"
    by_length = np.argsort(lengths, kind="stable")
    order_S = np.empty_like(by_length)
    order_S[by_length] = np.arange(len(segments))
    sorted_lengths = lengths[by_length]
    starts = np.cumsum(sorted_lengths) - sorted_lengths
    positions_T = np.arange(int(lengths.sum())) - np.repeat(starts, sorted_lengths)
    per_column = lengths.reshape(len(columns), -1)
    return PackedBatch(
        input_ids_T=torch.from_numpy(np.concatenate([segments[i] for i in by_length]).astype(np.int64)),
        positions_T=torch.from_numpy(positions_T),
        lengths=tuple(sorted_lengths.tolist()),
        order_S=torch.from_numpy(order_S),
        num_columns=len(columns),
        num_rows=num_rows,
        targets=targets,
        source=source,
        padded_tokens=int(per_column.max(axis=1).sum()) * per_column.shape[1] if num_rows else 0,
    )


def pack_texts(ids: Sequence[Sequence[int]]) -> PackedBatch:
    """Texts without targets, one column: what evaluation and inference embed."""
    targets = Targets(rows_per_rank=(len(ids),), row_ids_B=torch.arange(len(ids)))
    return pack([[np.asarray(i, dtype=np.int64) for i in ids]], targets, num_rows=len(ids))
