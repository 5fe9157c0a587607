"""The two sides of every comparison: our fit and the trainer of sentence-transformers, over the same rows.

Rows of the other side are read here with gzip and json alone, so that our own reading is compared too.
"""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lightning.pytorch import Callback, LightningModule, Trainer
from sentence_transformers import (
    DefaultBatchSampler,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses as peer_losses
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback

from trainer import losses as our_losses
from trainer.data.module import PairData
from trainer.data.order import Order, Permutation
from trainer.data.sources import Source
from trainer.encoder import EncoderSpec
from trainer.module import EmbeddingModule

LEARNING_RATE = 5.0e-5
BATCH_SIZE = 16
_PEER_LOSS = {
    "CosineSimilarity": peer_losses.CosineSimilarityLoss,
    "InfoNCE": peer_losses.MultipleNegativesRankingLoss,
    "BatchHardTriplet": peer_losses.BatchHardTripletLoss,
    "CoSENT": peer_losses.CoSENTLoss,
}
_TARGETS = ("score", "label")


@dataclass(frozen=True)
class Task:
    """What both sides train on.

    Attributes:
        file: JSON lines in the folder of data.
        columns: canonical name -> name in the file, text columns first.
        loss: class name in trainer.losses.
        score_range: scores are mapped from it to 0..1.
        label_map: value in the file -> score or label.
        max_length: pieces kept of a text.
        num_labels: of Softmax.
    """

    file: str
    columns: dict[str, str]
    loss: str
    score_range: tuple[float, float] | None = None
    label_map: dict[str, float] | None = None
    max_length: int = 128
    num_labels: int = 0

    def source(self, data: Path) -> Source:
        return Source(
            path=str(data / self.file),
            columns=self.columns,
            score_range=self.score_range,
            label_map=self.label_map,
        )

    def rows(self, data: Path) -> list[dict[str, Any]]:
        """All rows, canonical names, text columns first."""
        with gzip.open(data / self.file, "rt", encoding="utf-8") as lines:
            return [self._row(json.loads(line)) for line in lines]

    def _row(self, raw: dict[str, Any]) -> dict[str, Any]:
        row = {name: raw[column] for name, column in self.columns.items()}
        for name in _TARGETS:
            if name in row:
                value = self.label_map[row[name]] if self.label_map else row[name]
                if name == "score" and self.score_range:
                    low, high = self.score_range
                    value = (value - low) / (high - low)
                row[name] = float(value) if name == "score" else int(value)
        return row


def in_our_order(rows: Sequence[dict[str, Any]], steps: int, seed: int) -> list[dict[str, Any]]:
    """The rows of our first steps, in the order in which we take them."""
    order = Order([Permutation(len(rows))], BATCH_SIZE, seed)
    picked = [order.step(*divmod(step, order.steps_per_epoch)).rows for step in range(steps)]
    assert all(len(p) == BATCH_SIZE for p in picked[:-1]), "a short batch in the middle would shift the other side"
    return [rows[i] for p in picked for i in p]


@dataclass
class Fit:
    """How both sides train; linear schedule without warm-up, AdamW (fused), no weight decay.

    Attributes:
        steps: optimizer steps; None for one epoch.
        dropout: None keeps the encoder's own.
        clip: largest gradient norm, 0 for none.
        on_step: called after every optimizer step.
        losses: value of each step, filled if record_losses.
        record_losses: read every loss (on a GPU that waits for it).
    """

    steps: int | None = None
    seed: int = 42
    precision: str = "fp32"
    dropout: float | None = None
    clip: float = 1.0
    on_step: Callable[[], None] | None = None
    record_losses: bool = False
    losses: list[float] = field(default_factory=list)


# -- ours --------------------------------------------------------------------------------------------------


class _Watch(Callback):
    def __init__(self, fit: Fit) -> None:
        self.fit = fit

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.fit.record_losses:
            self.fit.losses.append(float(outputs["loss"]))
        if self.fit.on_step:
            self.fit.on_step()


def our_data(task: Task, data: Path, spec: EncoderSpec, seed: int, cache: Path) -> PairData:
    return PairData([task.source(data)], spec, batch_size=BATCH_SIZE, seed=seed, cache_dir=str(cache))


def fit_ours(
    task: Task, data: Path, backbone: str, fit: Fit, cache: Path, callbacks: Sequence[Callback] = ()
) -> EmbeddingModule:
    """Lightning's fit over our module and data, as ``trainer fit`` runs it, without logs and checkpoints."""
    spec = EncoderSpec(backbone, max_length=task.max_length, dropout=fit.dropout)
    options: dict[str, Any] = {"num_labels": task.num_labels} if task.num_labels else {}
    if task.loss == "InfoNCE":  # theirs takes a text that stands twice in a batch for a negative
        options["mask_false_negatives"] = False
    module = EmbeddingModule(spec, getattr(our_losses, task.loss)(**options), learning_rate=LEARNING_RATE)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            max_epochs=1,
            max_steps=fit.steps or -1,
            precision="bf16-mixed" if fit.precision == "bf16" else "32-true",
            gradient_clip_val=fit.clip or None,
            use_distributed_sampler=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            devices=1,
            default_root_dir=folder,
            callbacks=[_Watch(fit), *callbacks],
        ).fit(module, datamodule=our_data(task, data, spec, fit.seed, cache))
    return module


# -- sentence-transformers ---------------------------------------------------------------------------------


class _PeerWatch(TrainerCallback):
    def __init__(self, fit: Fit) -> None:
        self.fit = fit

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.fit.on_step:
            self.fit.on_step()


def peer_loss(task: Task, model: SentenceTransformer) -> nn.Module:
    if task.loss == "Softmax":
        dimension = model.get_embedding_dimension()
        assert dimension is not None
        return peer_losses.SoftmaxLoss(model, dimension, task.num_labels)
    return _PEER_LOSS[task.loss](model)


def load_peer(task: Task, backbone: str, fit: Fit) -> SentenceTransformer:
    model = SentenceTransformer(backbone, model_kwargs={"dtype": torch.float32})
    model.max_seq_length = task.max_length
    if fit.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = fit.dropout
    return model


def fit_peer(model: SentenceTransformer, loss: nn.Module, rows: list[dict[str, Any]], fit: Fit, shuffle: bool) -> None:
    """sentence-transformers' own trainer over rows, in their order or shuffled by it."""
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)

    def record(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        fit.losses.append(float(output))

    hook = loss.register_forward_hook(record) if fit.record_losses else None
    own_order: dict[str, Any] = {} if shuffle else {"batch_sampler": _sequential}
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            max_steps=fit.steps or -1,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            optim="adamw_torch_fused",
            lr_scheduler_type="linear",
            max_grad_norm=fit.clip,
            bf16=fit.precision == "bf16",
            seed=fit.seed,
            use_cpu=not torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **own_order,
        )
        peer = SentenceTransformerTrainer(
            model, arguments, train_dataset=Dataset.from_list(rows), loss=loss, callbacks=[_PeerWatch(fit)]
        )
        peer.remove_callback(PrinterCallback)
        peer.train()
    if hook:
        hook.remove()


def _sequential(dataset: Dataset, batch_size: int, drop_last: bool, **kwargs: Any) -> DefaultBatchSampler:
    return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)
