"""What travels between data, encoder and loss: a packed batch and the targets of its rows.

Shape suffixes: b rows of the global batch, B rows of this rank, S segments (texts), T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _restored(of: type[Any], *values: Any) -> Any:
    return of(*(torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values))


class _Sent:
    """Goes to another process as bytes. Torch would open a shared file per tensor, which takes longer than a batch."""

    def __reduce__(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        on_host = (v.numpy() if isinstance(v, Tensor) and v.device.type == "cpu" else v for v in values)
        return _restored, (type(self), *on_host)


@dataclass(frozen=True)
class Targets(_Sent):
    """What a loss may ask for about this rank's rows.

    Attributes:
        rows_per_rank: rows of the global batch that each rank holds, in rank order; they sum to b.
        row_ids_B: number of each row in its source, int64.
        labels_B: class of each row, int64, or None.
        scores_B: similarity score of each row, float32, or None.
        rank: whose rows these are.
    """

    rows_per_rank: tuple[int, ...]
    row_ids_B: Tensor
    labels_B: Tensor | None = None
    scores_B: Tensor | None = None
    rank: int = 0

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
        return replace(
            self,
            row_ids_B=self.row_ids_B.to(device, non_blocking=True),
            labels_B=None if self.labels_B is None else self.labels_B.to(device, non_blocking=True),
            scores_B=None if self.scores_B is None else self.scores_B.to(device, non_blocking=True),
        )


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

    @property
    def num_tokens(self) -> int:
        """Pieces of the rows that count."""
        return sum(self.lengths) if self.num_rows else 0

    def to(self, device: torch.device | str) -> PackedBatch:
        return replace(
            self,
            input_ids_T=self.input_ids_T.to(device, non_blocking=True),
            positions_T=self.positions_T.to(device, non_blocking=True),
            order_S=self.order_S.to(device, non_blocking=True),
            targets=self.targets.to(device),
        )

    def pin_memory(self) -> PackedBatch:
        pin = torch.Tensor.pin_memory
        targets = self.targets
        return replace(
            self,
            input_ids_T=pin(self.input_ids_T),
            positions_T=pin(self.positions_T),
            order_S=pin(self.order_S),
            targets=replace(
                targets,
                row_ids_B=pin(targets.row_ids_B),
                labels_B=None if targets.labels_B is None else pin(targets.labels_B),
                scores_B=None if targets.scores_B is None else pin(targets.scores_B),
            ),
        )
