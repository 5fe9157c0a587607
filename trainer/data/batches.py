"""The batches of a run by their step, for a loader's worker processes: light to import, light to send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from trainer.batch import PackedBatch
from trainer.data.collate import pack, targets_of
from trainer.data.order import SLICE_ROWS, WINDOW_SLICES, Order, split_rows
from trainer.data.streaming import StreamedTable
from trainer.data.teacher import TeacherTable
from trainer.data.tokens import TokenTable


class StepBatches(Dataset[PackedBatch]):
    """Item t is this rank's packed batch of global step t, counted from the start of the run."""

    def __init__(
        self,
        tables: Sequence[TokenTable | StreamedTable],
        order: Order,
        steps_per_epoch: int,
        rank: int,
        world_size: int,
        teachers: Mapping[int, TeacherTable] | None = None,
    ) -> None:
        self.tables = tables
        self.order = order
        self.steps_per_epoch = steps_per_epoch
        self.rank = rank
        self.world_size = world_size
        self.teachers = teachers or {}
        # Steps to the window behind this one: time enough to build it.
        self.steps_ahead = -(-SLICE_ROWS * WINDOW_SLICES // order.batch_size)
        self.streamed = any(isinstance(table, StreamedTable) for table in tables)

    def __getitem__(self, step: int) -> PackedBatch:
        plan = self.order.step(*divmod(step, self.steps_per_epoch))
        rows_per_rank = split_rows(len(plan.rows), self.world_size)
        first = sum(rows_per_rank[: self.rank])
        rows = plan.rows[first : first + rows_per_rank[self.rank]]
        # A rank without rows embeds one placeholder, so that every rank runs the same graph; it counts for nothing.
        embedded = rows if len(rows) else plan.rows[:1]
        table = self.tables[plan.source]
        targets = targets_of(
            rows, table.targets(rows), table.hashes(rows), table.may_lack_texts, rows_per_rank, self.rank
        )
        if plan.source in self.teachers:
            targets.extras["teacher"] = torch.from_numpy(self.teachers[plan.source].embeddings(rows))
        if isinstance(table, TokenTable) and table.candidate_scores:
            scores = np.stack([values[rows] for values in table.candidate_scores], axis=1)
            targets.extras["scores"] = torch.from_numpy(scores)
        columns = [table.ids(column, embedded) for column in table.columns]
        if self.streamed:
            self._prefetch(step + self.steps_ahead)
        return pack(columns, targets, num_rows=len(rows), source=plan.source)

    def _prefetch(self, step: int) -> None:
        plan = self.order.step(*divmod(step, self.steps_per_epoch))
        table = self.tables[plan.source]
        if isinstance(table, StreamedTable):
            table.prefetch(plan.rows)
