"""From token ids to a packed batch: one stream, no padding, segments sorted by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.batch import PackedBatch, Targets
from trainer.data.hashes import NO_TEXT


@dataclass(frozen=True)
class TokenSpans(Sequence[NDArray[np.int32]]):
    """Texts that lie in one array of ids: text i is the view ``values[starts_S[i] : starts_S[i] + lengths_S[i]]``.

    Attributes:
        values: ids of these and of other texts, int32.
        starts_S: where each text begins, int64.
        lengths_S: its pieces, int64.
    """

    values: NDArray[np.int32]
    starts_S: NDArray[np.int64]
    lengths_S: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts_S)

    @overload
    def __getitem__(self, i: int) -> NDArray[np.int32]: ...
    @overload
    def __getitem__(self, i: slice) -> TokenSpans: ...
    def __getitem__(self, i: int | slice) -> NDArray[np.int32] | TokenSpans:
        if isinstance(i, slice):
            return TokenSpans(self.values, self.starts_S[i], self.lengths_S[i])
        start = self.starts_S[i]
        return self.values[start : start + self.lengths_S[i]]

    def __reduce__(self) -> tuple[Any, ...]:  # another process gets these texts, not the file they lie in
        values = np.concatenate([*self, np.empty(0, np.int32)])
        return TokenSpans, (values, np.cumsum(self.lengths_S) - self.lengths_S, self.lengths_S)


def targets_of(
    rows: NDArray[np.int64],
    values: Mapping[str, NDArray[Any]],
    hashes_BC: NDArray[np.int64],
    may_lack_texts: bool,
    rows_per_rank: tuple[int, ...],
    rank: int,
) -> Targets:
    """Targets of this rank's rows.

    Args:
        rows: numbers of the rows.
        values: what they have of label, score and group, by name.
        hashes_BC: of their texts, NO_TEXT where there is none.
        may_lack_texts: of the source, so that all ranks know the same fields.
        rows_per_rank: of the global batch.
        rank: whose rows these are.
    """

    def tensor(name: str, kind: type[np.generic]) -> Tensor | None:
        return torch.from_numpy(values[name].astype(kind)) if name in values else None

    return Targets(
        rows_per_rank=rows_per_rank,
        row_ids_B=torch.from_numpy(rows),
        labels_B=tensor("label", np.int64),
        scores_B=tensor("score", np.float32),
        rank=rank,
        texts_BC=torch.from_numpy(hashes_BC),
        groups_B=tensor("group", np.int64),
        present_BC=torch.from_numpy(hashes_BC != NO_TEXT) if may_lack_texts else None,
    )


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
    spans = _as_spans(columns)
    lengths = spans.lengths_S
    assert lengths.min() > 0, "a text without a single token"
    by_length = np.argsort(lengths, kind="stable")
    order_S = np.empty_like(by_length)
    order_S[by_length] = np.arange(len(spans))
    sorted_lengths = lengths[by_length]
    ends = np.cumsum(sorted_lengths)
    positions_T = np.arange(int(ends[-1])) - np.repeat(ends - sorted_lengths, sorted_lengths)
    # One gather for the whole stream: a view per text would cost more than its copy.
    places_T = np.repeat(spans.starts_S[by_length], sorted_lengths) + positions_T
    per_column = lengths.reshape(len(columns), -1)
    return PackedBatch(
        input_ids_T=torch.from_numpy(spans.values.take(places_T).astype(np.int64, copy=False)),
        positions_T=torch.from_numpy(positions_T),
        lengths=tuple(sorted_lengths.tolist()),
        order_S=torch.from_numpy(order_S),
        num_columns=len(columns),
        num_rows=num_rows,
        targets=targets,
        source=source,
        padded_tokens=int(per_column.max(axis=1).sum()) * per_column.shape[1] if num_rows else 0,
    )


def pack_towers(
    columns: Sequence[Sequence[NDArray[np.integer]]], targets: Targets, num_rows: int, source: int = 0
) -> PackedBatch:
    """As ``pack``, the first column for the query tower and the others for the document tower."""
    queries = pack(columns[:1], targets, num_rows, source)
    bare = Targets(rows_per_rank=targets.rows_per_rank, row_ids_B=targets.row_ids_B)  # a loss asks the queries'
    documents = replace(pack(columns[1:], bare, num_rows, source), tower="document")
    return replace(queries, documents=documents, padded_tokens=queries.padded_tokens + documents.padded_tokens)


def _as_spans(columns: Sequence[Sequence[NDArray[np.integer]]]) -> TokenSpans:
    """All texts, column by column, as spans of one array."""
    spans = [column for column in columns if isinstance(column, TokenSpans)]
    if len(spans) == len(columns) and all(column.values is spans[0].values for column in spans):
        starts = np.concatenate([column.starts_S for column in spans])
        return TokenSpans(spans[0].values, starts, np.concatenate([column.lengths_S for column in spans]))
    texts = [np.asarray(ids) for column in columns for ids in column]
    lengths = np.array([len(ids) for ids in texts], dtype=np.int64)
    return TokenSpans(np.concatenate(texts), np.cumsum(lengths) - lengths, lengths)


def pack_texts(ids: Sequence[Sequence[int] | NDArray[np.integer]], tower: str = "query") -> PackedBatch:
    """Texts without targets, one column: what evaluation and inference embed."""
    targets = Targets(rows_per_rank=(len(ids),), row_ids_B=torch.arange(len(ids)))
    return replace(pack([[np.asarray(i, dtype=np.int64) for i in ids]], targets, num_rows=len(ids)), tower=tower)


def plan_rounds(lengths: Sequence[int], world_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Which texts each rank embeds in each forward: rounds, ranks, texts.

    Every text is in one place. All ranks have the same number of rounds, and their shares of a round differ
    by one text at most, so a rank's share is empty only where there are fewer texts than ranks. A forward
    takes max_tokens at most even if it is padded, except for a single longer text. Longest texts come first:
    what doesn't fit into memory fails at once.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    rounds: list[list[list[int]]] = []
    longest = 0
    for start in range(0, len(by_length), world_size):
        one_each = by_length[start : start + world_size]
        if not rounds or (len(rounds[-1][0]) + 1) * longest > max_tokens:
            rounds.append([[] for _ in range(world_size)])
            longest = lengths[one_each[0]]
        for share, text in zip(rounds[-1], one_each, strict=False):  # the last ranks may get none
            share.append(text)
    return rounds
