"""The steps of an epoch, and the loader that goes on at any of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Sampler

from trainer.batch import PackedBatch
from trainer.files import writing
from trainer.interruption import shielded

if TYPE_CHECKING:
    from trainer.data.module import PairData


class StepSampler(Sampler[list[int]]):
    """The steps that are left of the current epoch, some neighbours at a time. The position is the number of optimizer
    steps taken, nothing else: no state of workers or of iterators is needed to go on after a kill."""

    def __init__(self, data: PairData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[list[int]]:
        assert self.data.trainer is not None
        step, per_epoch = self.data.trainer.global_step, self.data.steps_per_epoch
        return step_groups(step, step - step % per_epoch + per_epoch, self.data.steps_per_message)

    def __len__(self) -> int:
        return self.data.whole_steps_per_epoch  # Lightning applies limit_train_batches to it


def step_groups(step: int, stop: int, size: int) -> Iterator[list[int]]:
    """``range(step, stop)``, cut at the multiples of ``size``."""
    while step < stop:
        end = min(stop, step - step % size + size)
        yield list(range(step, end))
        step = end


class StepLoader(DataLoader[PackedBatch]):
    """A loader that Lightning may call resumable; its state is the trainer's step, so it stores nothing.

    Workers send several steps in one message: a message takes longer than a batch of 16 rows.

    Attributes:
        seconds_waited: what this process has spent in getting batches.
    """

    seconds_waited = 0.0

    def __iter__(self) -> Any:
        with shielded(), writing(Path("/dev/shm/sem.mp-*")):  # the locks of the queues of workers
            return self._timed(chain.from_iterable(super().__iter__()))

    def _timed(self, batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def limit_steps(steps_per_epoch: int, limit: int | float) -> int:
    """What ``trainer.limit_train_batches`` (a number of steps, or a share) leaves of an epoch.

    Raises:
        ValueError: a share of less than one step.
    """
    if isinstance(limit, int) or limit > 1.0:  # a parser may have read 10 as 10.0
        return min(steps_per_epoch, int(limit))
    if limit < 1.0 and 0 < steps_per_epoch * limit < 1.0:
        raise ValueError(
            f"trainer.limit_train_batches is {limit:g}, and that share of the {steps_per_epoch:,} steps of an epoch is "
            "less than one step: give a larger share, or a whole number of steps"
        )
    return max(1, int(steps_per_epoch * limit))
