"""The data module: sources, token tables, order and loaders of a run."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from trainer.batch import PackedBatch
from trainer.data.batches import StepBatches
from trainer.data.bylabel import LabelBatches
from trainer.data.cache import default_cache_dir
from trainer.data.distinct import DistinctTexts
from trainer.data.evalsource import EvalSource
from trainer.data.loading import load
from trainer.data.opaque import OpaqueBatches, OpaqueStream
from trainer.data.order import Order
from trainer.data.parts import Part, steps_per_window
from trainer.data.refusals import refuse_full, refuse_held_out, refuse_training
from trainer.data.retrieval import load_collections
from trainer.data.rowgroups import group_files
from trainer.data.sources import Source
from trainer.data.steps import StepLoader, StepSampler, limit_steps
from trainer.data.streaming import GIB, StreamedTable
from trainer.data.table import TokenTable
from trainer.data.teacher import TeacherTable
from trainer.data.tokens import tokenize
from trainer.data.validation import ValidationSet, open_validation
from trainer.data.workers import end_with, worker_context
from trainer.distributed import gather
from trainer.encoder.spec import EncoderSpec
from trainer.encoder.text import TextPreparation
from trainer.encoder.towers import load_texts
from trainer.interruption import stop_if_asked
from trainer.messages import refuse_not_positive

logger = logging.getLogger(__name__)


class PairData(LightningDataModule):
    """Training and validation sets.

    Args:
        train: training sources; a step takes rows of one of them.
        validation: sets to evaluate on.
        batch_size: rows per optimizer step over all ranks.
        no_duplicates: no text stands twice in a batch, in no column: it would be its own negative.
        mixing: of several sources, one per step: proportional to their rows, round_robin until the smallest is used up,
            or weighted by their weight.
        num_workers: loader processes per rank.
        max_rows: use only the first rows of each training source (debugging).
        cache_dir: of tokenised data; unset: $TRAINER_CACHE or ~/.cache/siamese-trainer.
        stream_cache_gib: most disk space for the tokens of each source with streaming.
        encoder: linked from model.encoder.
        document_encoder: linked from model.document_encoder.
        seed: of the order, linked from seed_everything.
    """

    def __init__(
        self,
        train: list[Source],
        encoder: EncoderSpec,
        validation: Optional[list[EvalSource]] = None,
        batch_size: int = 16,
        no_duplicates: bool = False,
        mixing: Literal["proportional", "round_robin", "weighted"] = "proportional",
        num_workers: int = 0,
        max_rows: Optional[int] = None,
        cache_dir: Optional[str] = None,
        stream_cache_gib: float = 20.0,
        seed: int = 42,
        document_encoder: Optional[EncoderSpec] = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size is {batch_size}; it must be 1 or more")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"data.max_rows is {max_rows}; it must be 1 or more, or left out for all rows")
        refuse_not_positive("data.stream_cache_gib", stream_cache_gib, or_zero=True)
        if num_workers < 0:
            raise ValueError(f"data.num_workers is {num_workers}; it must be 0 or more")
        self.train_sources = train
        self.validation_sources = validation or []
        self.encoder_spec = encoder
        self.document_spec = document_encoder
        for source in train:
            refuse_training(source, no_duplicates, mixing, has_documents=document_encoder is not None)
        refuse_held_out(self.validation_sources)
        self.batch_size = batch_size
        self.no_duplicates = no_duplicates
        self.mixing = mixing
        self.num_workers = num_workers
        self.max_rows = max_rows
        self.cache_dir = Path(cache_dir or default_cache_dir())
        self.stream_cache_gib = stream_cache_gib
        self.seed = seed
        self.tables: list[TokenTable | StreamedTable] = []
        self.parts: list[Part] = []
        self.stream: Optional[OpaqueStream] = None
        self.num_labels: list[Optional[int]] = []  # classes that the loss of each training source has
        self.teachers: dict[int, TeacherTable] = {}  # of the training sources that have one, by their number
        self._positions: dict[int, dict[str, Any]] = {}  # of this rank's readers of the stream
        self.validation_sets: list[ValidationSet] = []
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @cached_property
    def text(self) -> TextPreparation:
        """Of the encoder, or of both; reading a vocabulary of 250,000 pieces takes a second, so it is read once."""
        return load_texts(self.encoder_spec, self.document_spec)

    def text_of(self, source: Source) -> TextPreparation:
        """That of the encoder, with the shorter lengths of a source's columns.

        Raises:
            ValueError: one is no length, or longer than the encoder's, or the prompt of a column leaves no text.
        """
        for column, length in (source.max_lengths or {}).items():
            whole = self.text.of_column(column)
            if not whole.shortest < length <= whole.max_length:
                key = "encoder" if self.text.tower_of(column) == "query" else "document_encoder"
                raise ValueError(
                    f"{source.path}: max_lengths gives '{column}' {length} pieces; give {whole.shortest + 1} to "
                    f"{whole.max_length}, which is model.{key}.max_length"
                )
        lengths = {column: source.max_length_of(column) for column in source.text_columns}
        text = replace(self.text, max_lengths={c: length for c, length in lengths.items() if length is not None})
        for column in source.text_columns:
            refuse_full(source, column, text.of_column(column))
        return text

    def prepare_data(self) -> None:
        """Build the caches, once per node; the other ranks wait and open them."""
        # What only evaluates reads no training data: it may not even be there.
        reads_training = self.trainer is None or self.trainer.state.fn in (None, "fit")
        for source in self.train_sources if reads_training else ():
            if not source.streaming:
                tokenize(source, self.text_of(source), self.cache_dir, verify=True)
            stop_if_asked()
        for source in self.validation_sources:
            if source.searches:
                load_collections(source, self.cache_dir, verify=True)
            else:
                load(source, self.cache_dir, verify=True)
            stop_if_asked()

    def _open_training(self) -> None:
        if not self.train_sources:  # not sooner: what only evaluates needs none
            raise ValueError("data.train is empty: there is nothing to train on; name a source")
        opaque = [source for source in self.train_sources if source.streaming and group_files(source) is None]
        if opaque:
            self._open_stream(opaque[0])
            return
        max_bytes = int(self.stream_cache_gib * GIB)
        self.tables = [
            StreamedTable(source, self.text_of(source), self.cache_dir, max_bytes)
            if source.streaming
            else tokenize(source, self.text_of(source), self.cache_dir)
            for source in self.train_sources
        ]
        self.parts = [self._part(*both) for both in zip(self.train_sources, self.tables, strict=True)]

    def _part(self, source: Source, table: TokenTable | StreamedTable) -> Part:
        """Which rows form the batches of a source."""
        if source.rows_per_label:
            assert isinstance(table, TokenTable)
            by_label = LabelBatches(table, source.rows_per_label, self.max_rows)
            by_label.refuse_unfit(self.batch_size, source.path)
            return by_label
        shuffle = table.shuffle(self.max_rows)
        return DistinctTexts(shuffle, table.hashes) if self.no_duplicates else shuffle

    def _open_stream(self, source: Source) -> None:
        what = f"{source.path}: a stream that is no Parquet or Arrow has no index and no length"
        if len(self.train_sources) > 1:
            raise ValueError(f"{what}, so it can't be mixed with other sources; convert it to Parquet")
        if self.trainer is not None and self.trainer.max_steps < 1:
            raise ValueError(f"{what}; set trainer.max_steps")
        # Now: what ends the run is less where limit_train_batches leaves a part of it.
        self._stream_steps = self.trainer.max_steps if self.trainer is not None else -1
        self.stream = OpaqueStream(source, self.text_of(source), self.seed, self.max_rows)
        self.stream.look()

    def setup(self, stage: Optional[str] = None) -> None:
        if self.validation_sets or self.inputs:
            return
        if stage in (None, "fit"):
            self._open_training()
            self._check_sizes()
        for source in self.validation_sources:
            for column in source.text_columns:
                refuse_full(source, column, self.text.of_column("anchor" if column == "query" else column))
        self.validation_sets = [
            one for source in self.validation_sources for one in open_validation(source, self.text, self.cache_dir)
        ]

    def refuse_ranks(self, num_ranks: int) -> None:
        """Raises ValueError where a step has fewer rows than there are ranks to share it."""
        if self.batch_size < num_ranks:
            raise ValueError(
                f"data.batch_size is {self.batch_size} rows over all ranks, but there are {num_ranks} ranks; "
                f"raise data.batch_size to {num_ranks} or more, or use fewer devices"
            )

    def _check_sizes(self) -> None:
        self.refuse_ranks(gather.world_size())
        if self.stream is not None:
            return
        if left_out := self.order.rows_left_out:
            gather.warn(
                logger,
                f"data.mixing round_robin: {left_out:,} of {sum(self.sizes):,} rows are left out of an epoch, "
                "others in each: the source with the fewest steps ends it",
            )
        if gather.rank() == 0:  # counting takes a moment
            for source, part, num_rows in zip(self.train_sources, self.parts, self.rows_without_place, strict=True):
                if num_rows:
                    logger.warning("%s: %s", source.path, part.tell_left_out(num_rows))

    @cached_property
    def rows_without_place(self) -> list[int]:
        """For each source the rows that no batch of the first epoch can hold."""
        return [self.order.rows_without_place(source) for source in range(len(self.parts))]

    @property
    def inputs(self) -> Sequence[TokenTable | StreamedTable | OpaqueStream]:
        """What each training source is read from."""
        return self.tables if self.stream is None else [self.stream]

    @property
    def sizes(self) -> list[int]:
        """Rows of each training source; none of a stream."""
        return [part.size for part in self.parts]

    @property
    def order(self) -> Order:
        if self.stream is not None:
            raise ValueError(f"{self.stream.source.path}: the rows of a stream have no order that can be planned")
        weights = tuple(source.weight for source in self.train_sources)
        return Order(self.parts, self.batch_size, self.seed, self.mixing, weights)

    @property
    def whole_steps_per_epoch(self) -> int:
        """Steps that the rows give; of a stream, which has no end, those of the run."""
        if self.stream is None:
            return self.order.steps_per_epoch
        return self._stream_steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch, ``trainer.limit_train_batches`` considered."""
        limit = self.trainer.limit_train_batches if self.trainer is not None else 1.0
        return limit_steps(self.whole_steps_per_epoch, limit)

    @property
    def steps_per_message(self) -> int:
        """Steps that a loader's worker sends at once."""
        return steps_per_window(self.batch_size) if self.num_workers else 1

    def used_ids(self, tower: str = "query") -> Optional[torch.Tensor]:
        """Pieces that any training text uses, ascending, int64; None with streaming: nobody knows before the end.

        Args:
            tower: where documents have an encoder of their own, whose texts: query or document.
        """
        known = [table.used_ids(tower) for table in self.tables if isinstance(table, TokenTable)]
        if self.stream is not None or len(known) < len(self.tables):
            return None
        return torch.from_numpy(np.unique(np.concatenate(known)))

    def train_dataloader(self) -> StepLoader:
        rank, world_size = gather.rank(), gather.world_size()
        batches: StepBatches | OpaqueBatches
        if self.stream is not None:
            batches = OpaqueBatches(
                self.stream,
                self.batch_size,
                rank,
                world_size,
                self.num_workers,
                self.steps_per_message,
                self._positions,  # itself: workers start anew in every epoch, where the one before ended
            )
        else:
            # As the module sets it for the whole run; -1 where there is no run.
            last = getattr(self.trainer, "max_steps", -1)
            batches = StepBatches(self.tables, self.order, self.steps_per_epoch, rank, world_size, self.teachers, last)
        return StepLoader(
            batches,
            batch_sampler=StepSampler(self),
            collate_fn=list,
            num_workers=self.num_workers,
            multiprocessing_context=worker_context() if self.num_workers else None,
            worker_init_fn=partial(end_with, os.getpid()) if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    # -- the place in a stream, which no step number tells ---------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning calls it with each batch before its step: not when a worker has it ready."""
        if isinstance(batch, PackedBatch):
            if batch.position is not None:
                worker, position = batch.position
                self._positions[worker] = position
            self._refuse_label(batch)
        return batch

    def _refuse_label(self, batch: PackedBatch) -> None:
        """Labels of a stream, which nobody has seen before the loss, and most losses would train on any."""
        source, limit, labels_B = self.train_sources[batch.source], self.num_labels, batch.targets.labels_B
        num_labels = limit[batch.source] if limit and source.streaming else None
        if num_labels is None or labels_B is None or not len(labels_B):
            return
        row = int(labels_B.argmax())
        if int(labels_B[row]) >= num_labels:
            raise ValueError(
                f"{source.path}: row {int(batch.targets.row_ids_B[row])} (from 0) has label {int(labels_B[row])}, but "
                f"its loss has {num_labels} classes 0 to {num_labels - 1}; set num_labels or a label_map"
            )

    def state_dict(self) -> dict[str, Any]:
        if self.stream is None:
            return {}  # the step says it all
        return {"workers": max(1, self.num_workers), "positions": gather.gather_objects(self._positions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        ranks, workers = len(state["positions"]), state["workers"]
        if (ranks, workers) != (gather.world_size(), max(1, self.num_workers)):
            raise ValueError(
                f"the stream was read by {ranks} ranks with {workers} loader workers each, now there are "
                f"{gather.world_size()} with {max(1, self.num_workers)}: a stream without an index goes on with the "
                "same numbers only; convert it to Parquet to change them"
            )
        self._positions = dict(state["positions"][gather.rank()])

    def val_dataloader(self) -> DataLoader[int]:
        """One item: it makes ``trainer validate`` run once; the evaluation callback does the work."""
        return DataLoader([0], batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[int]:
        return self.val_dataloader()
