"""The data module: sources, token tables, order and loaders of a run."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from datasets import Dataset as Rows
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from trainer.batch import PackedBatch
from trainer.data.batches import StepBatches
from trainer.data.order import Order
from trainer.data.sources import EvalSource, Source, load
from trainer.data.tokens import TokenTable, tokenize, worker_context
from trainer.distributed import gather
from trainer.encoder.spec import EncoderSpec
from trainer.encoder.text import TextPreparation, load_text_preparation
from trainer.evaluation.base import Evaluator
from trainer.interruption import shielded, stop_if_asked


@dataclass
class ValidationSet:
    """A set that an evaluator scores."""

    name: str
    rows: Rows
    evaluator: Evaluator
    text: TextPreparation


class StepSampler(Sampler[int]):
    """The steps that are left of the current epoch. The position is the number of optimizer steps taken, nothing
    else: no state of workers or of iterators is needed to go on after a kill."""

    def __init__(self, data: "PairData") -> None:
        self.data = data

    def __iter__(self) -> Iterator[int]:
        assert self.data.trainer is not None
        step, per_epoch = self.data.trainer.global_step, self.data.steps_per_epoch
        return iter(range(step, step - step % per_epoch + per_epoch))

    def __len__(self) -> int:
        return self.data.order.steps_per_epoch  # Lightning applies limit_train_batches to it


class StepLoader(DataLoader[PackedBatch]):
    """A loader that Lightning may call resumable; its state is the trainer's step, so it stores nothing."""

    def __iter__(self) -> Any:
        with shielded():
            return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class PairData(LightningDataModule):
    """Training and validation sets.

    Args:
        train: training sources; a step takes rows of one of them.
        validation: sets to evaluate on.
        batch_size: rows per optimizer step over all ranks.
        num_workers: loader processes per rank.
        max_rows: use only the first rows of each training source (debugging).
        cache_dir: of tokenised data; unset: $TRAINER_CACHE or ~/.cache/siamese-trainer.
        encoder: linked from model.encoder.
        seed: of the order, linked from seed_everything.
    """

    def __init__(
        self,
        train: list[Source],
        encoder: EncoderSpec,
        validation: Optional[list[EvalSource]] = None,
        batch_size: int = 16,
        num_workers: int = 0,
        max_rows: Optional[int] = None,
        cache_dir: Optional[str] = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size is {batch_size}; it must be 1 or more")
        self.train_sources = train
        self.validation_sources = validation or []
        self.encoder_spec = encoder
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_rows = max_rows
        default_cache = os.environ.get("TRAINER_CACHE") or Path.home() / ".cache" / "siamese-trainer"
        self.cache_dir = Path(cache_dir or default_cache)
        self.seed = seed
        self.tables: list[TokenTable] = []
        self.validation_sets: list[ValidationSet] = []
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @cached_property
    def text(self) -> TextPreparation:
        """Of the encoder; reading a vocabulary of 250,000 pieces takes a second, so it is read once."""
        return load_text_preparation(self.encoder_spec)

    def prepare_data(self) -> None:
        """Build the caches, once per node; the other ranks wait and open them."""
        for source in self.train_sources:
            tokenize(source, self.text, self.cache_dir)
            stop_if_asked()
        for source in self.validation_sources:
            load(source, self.cache_dir)
            stop_if_asked()

    def setup(self, stage: Optional[str] = None) -> None:
        if self.validation_sets or self.tables:
            return
        if stage in (None, "fit"):
            self.tables = [tokenize(source, self.text, self.cache_dir) for source in self.train_sources]
            self._check_sizes()
        self.validation_sets = [
            ValidationSet(source.name, load(source, self.cache_dir), source.evaluator, self.text)
            for source in self.validation_sources
        ]

    def _check_sizes(self) -> None:
        ranks = gather.world_size()
        if self.batch_size < ranks:
            raise ValueError(
                f"data.batch_size is {self.batch_size} rows over all ranks, but there are {ranks} ranks; "
                f"raise data.batch_size to {ranks} or more, or use fewer devices"
            )

    @property
    def sizes(self) -> list[int]:
        """Rows of each training source."""
        return [min(table.num_rows, self.max_rows or table.num_rows) for table in self.tables]

    @property
    def order(self) -> Order:
        return Order(tuple(self.sizes), self.batch_size, self.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch, ``trainer.limit_train_batches`` considered."""
        limit = self.trainer.limit_train_batches if self.trainer is not None else 1.0
        return limit_steps(self.order.steps_per_epoch, limit)

    def used_ids(self) -> torch.Tensor:
        """Pieces that any training text uses, ascending, int64."""
        return torch.from_numpy(np.unique(np.concatenate([table.used_ids() for table in self.tables])))

    def train_dataloader(self) -> StepLoader:
        batches = StepBatches(self.tables, self.order, self.steps_per_epoch, gather.rank(), gather.world_size())
        return StepLoader(
            batches,
            batch_size=None,
            sampler=StepSampler(self),
            num_workers=self.num_workers,
            multiprocessing_context=worker_context() if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[int]:
        """One item: it makes ``trainer validate`` run once; the evaluation callback does the work."""
        return DataLoader([0], batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[int]:
        return self.val_dataloader()


def limit_steps(steps_per_epoch: int, limit: Union[int, float]) -> int:
    """What ``trainer.limit_train_batches`` (a number of steps, or a share) leaves of an epoch."""
    if isinstance(limit, int) or limit > 1.0:  # a parser may have read 10 as 10.0
        return min(steps_per_epoch, int(limit))
    return max(1, int(steps_per_epoch * limit))
