"""What travels between data, encoder and loss: a packed batch and the targets of its rows.

Shape suffixes: b rows of the global batch, B rows of this rank, S segments (texts), T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _restored(of: type[Any], *values: Any) -> Any:
    return of(*(_mapped(torch.from_numpy, v, np.ndarray) for v in values))


def _mapped(function: Callable[[Any], Any], value: Any, kind: type[Any]) -> Any:
    """The function of a value of this kind, or of each such value of a dict; anything else as it is."""
    if isinstance(value, dict):
        return {key: _mapped(function, one, kind) for key, one in value.items()}
    return function(value) if isinstance(value, kind) else value


def _on_host(tensor: Tensor) -> Any:
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


class _Sent:
    """Goes to another process as bytes. Torch would open a shared file per tensor, which takes longer than a batch."""

    def __reduce__(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return _restored, (type(self), *(_mapped(_on_host, v, Tensor) for v in values))


@dataclass(frozen=True)
class Targets(_Sent):
    """What a loss may ask for about this rank's rows.

    Attributes:
        rows_per_rank: rows of the global batch that each rank holds, in rank order; they sum to b.
        row_ids_B: number of each row in its source, int64.
        labels_B: class of each row, int64, or None.
        scores_B: similarity score of each row, float32, or None.
        rank: whose rows these are.
        texts_BC: number of each text in its source, int64: equal numbers are equal texts; None: not known.
        groups_B: group of each row, int64: the positives of a group are no negatives of its anchors; or None.
        present_BC: whether the row has a text in this column, bool; where it has none, the embedding is that of a
            placeholder, which no loss may use. None: every row has all texts.
        extras: what else belongs to the rows, (B, ...) each, e.g. the embeddings of a teacher.
    """

    rows_per_rank: tuple[int, ...]
    row_ids_B: Tensor
    labels_B: Tensor | None = None
    scores_B: Tensor | None = None
    rank: int = 0
    texts_BC: Tensor | None = None
    groups_B: Tensor | None = None
    present_BC: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_global_rows(self) -> int:
        return sum(self.rows_per_rank)

    @property
    def first_row(self) -> int:
        """Place of this rank's first row in the global batch."""
        return sum(self.rows_per_rank[: self.rank])

    @property
    def weight(self) -> float:
        """W / b: the factor that makes the strategy's mean over W ranks the mean over b global rows."""
        return len(self.rows_per_rank) / self.num_global_rows

    def to(self, device: torch.device | str) -> Targets:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Targets:
        return Targets(*(_mapped(function, getattr(self, f.name), Tensor) for f in fields(self)))


@dataclass(frozen=True)
class PackedBatch(_Sent):
    """The texts of all columns of this rank's rows in one stream of tokens without padding.

    Segments are sorted by length, so that texts of equal length lie side by side: attention then works on
    slices of the stream instead of gathering.

    Attributes:
        input_ids_T: pieces of all segments, one behind the other, int64.
        positions_T: position of each piece in its segment, from 0, int64.
        lengths: pieces of each segment, ascending; kept on the host because the shapes of the attention
            depend on it and reading it from a device would stall the step.
        order_S: ``embeddings_SD[order_S]`` is column-major: column 0 row 0, row 1, ..., column 1 row 0, ...
        num_columns: texts per row.
        num_rows: rows that count. A rank without rows in a short batch carries one placeholder row, so that
            every rank runs the same graph, and num_rows 0.
        source: index of the training source all rows come from.
        padded_tokens: pieces that a padded forward of each column would hold.
        position: of a stream without an index behind this batch, for the checkpoint: loader worker and its reader's.
        documents: where queries and documents have an encoder each, the texts of all columns but the first one.
        tower: whose texts these are, query or document; one encoder takes both.
    """

    input_ids_T: Tensor
    positions_T: Tensor
    lengths: tuple[int, ...]
    order_S: Tensor
    num_columns: int
    num_rows: int
    targets: Targets
    source: int = 0
    padded_tokens: int = 0
    position: tuple[int, dict[str, Any]] | None = None
    documents: PackedBatch | None = None
    tower: str = "query"

    @property
    def streams(self) -> list[PackedBatch]:
        """One for each encoder: queries, then documents."""
        return [self] if self.documents is None else [self, self.documents]

    @property
    def num_tokens(self) -> int:
        """Pieces of the rows that count."""
        return sum(sum(stream.lengths) for stream in self.streams) if self.num_rows else 0

    def to(self, device: torch.device | str) -> PackedBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        return replace(
            self,
            input_ids_T=function(self.input_ids_T),
            positions_T=function(self.positions_T),
            order_S=function(self.order_S),
            targets=self.targets._map(function),
            documents=self.documents and self.documents._map(function),
        )
