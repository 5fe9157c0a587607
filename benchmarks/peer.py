"""The two sides of every comparison: our fit and the trainer of sentence-transformers, over the same rows.

Rows of the other side are read here with gzip and json alone, so that our own reading is compared too.
"""

from __future__ import annotations

import gzip
import importlib.util
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
from trainer.data.order import Order
from trainer.data.parts import Permutation
from trainer.data.sources import Source
from trainer.encoder import EncoderSpec
from trainer.encoder.flops import count_arithmetic
from trainer.module import EmbeddingModule

LEARNING_RATE = 5.0e-5
_PEER_LOSS = {
    "CosineSimilarity": peer_losses.CosineSimilarityLoss,
    "InfoNCE": peer_losses.MultipleNegativesRankingLoss,
    "BatchHardTriplet": peer_losses.BatchHardTripletLoss,
    "CoSENT": peer_losses.CoSENTLoss,
}
_TARGETS = ("score", "label")


def read_rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


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
        return [self._row(raw) for raw in read_rows(data / self.file)]

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


def in_our_order(rows: Sequence[dict[str, Any]], steps: int, seed: int, batch_size: int = 16) -> list[dict[str, Any]]:
    """The rows of our first steps, in the order in which we take them."""
    order = Order([Permutation(len(rows))], batch_size, seed)
    picked = [order.step(*divmod(step, order.steps_per_epoch)).rows for step in range(steps)]
    assert all(len(p) == batch_size for p in picked[:-1]), "a short batch in the middle would shift the other side"
    return [rows[i] for p in picked for i in p]


@dataclass(frozen=True)
class PeerSettings:
    """What a user of sentence-transformers may set to make the same steps faster.

    Attributes:
        arguments: of its training arguments.
        attention: of the backbone; None: transformers' choice, which is sdpa.
        cached: of its cached loss.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None
    cached: dict[str, Any] = field(default_factory=dict)


def peer_settings(name: str, precision: str, max_tokens: int) -> PeerSettings:
    """Its defaults, its best documented settings for this machine, or those with torch.compile.

    Defaults are those of 6.2 and transformers 5: sdpa, fused AdamW, tokenizing in the training process, mini-batches
    of 32 texts in cached losses. Precision is given, for both sides take the same. Best adds:

    - loader workers, so that no step waits for the tokenizer: two that stay beside a GPU. None on a CPU, whose cores
      the step itself fills: a worker takes them from it.
    - flash attention where it is installed, for half precision on a GPU: sentence-transformers then drops the padding,
      and its cached losses fill a mini-batch by tokens: as many as ours may have in a forward. Without it a cached
      loss on a GPU takes 256 texts at a time; its manual says as many as fit, and more than these fill the device. On
      a CPU 32 stay: larger ones only pad more.
    - TF32 for what is left in fp32 beside bf16, on a GPU.
    - no look at each loss for NaN, which waits for the GPU at every step.

    Not taken: lengths grouped into batches, which its trainer does not offer and which would change the rows of a step;
    batch samplers, which choose rows too. torch.compile stands apart ("compiled"), because each new pair of lengths
    compiles again until it takes shapes as dynamic, and it can lose: on two CPU
    cores it did (LOG.md), and transformers itself says that it is for GPUs.
    """
    on_gpu, half = torch.cuda.is_available(), precision == "bf16"
    if name == "default":
        return PeerSettings()
    assert name in ("best", "compiled"), name
    flash = on_gpu and half and importlib.util.find_spec("flash_attn") is not None
    arguments: dict[str, Any] = {"torch_compile": True} if name == "compiled" else {}
    if on_gpu:
        arguments |= {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
        arguments |= {"logging_nan_inf_filter": False}
        arguments |= {"tf32": True} if half else {}
    cached: dict[str, Any] = {"mini_batch_size": 256} if on_gpu else {}
    if flash:
        cached = {"mini_batch_num_tokens": max_tokens}
    return PeerSettings(arguments, "flash_attention_2" if flash else None, cached)


@dataclass
class Fit:
    """How both sides train; linear schedule, AdamW (fused), no weight decay.

    Attributes:
        steps: optimizer steps; None for one epoch.
        batch_size: rows of a step over all ranks.
        learning_rate: peak.
        warmup_ratio: share of the steps in which it rises.
        chunked: a batch is larger than a forward: the other side takes its cached loss.
        max_tokens: of one forward of ours.
        dropout: None keeps the encoder's own.
        clip: largest gradient norm, 0 for none.
        settings: of the other side.
        ranks: processes of the run; each calls this with the environment that torchrun gives.
        on_start: called with the module that the strategy has wrapped, before the first step.
        on_step: called after every optimizer step.
        record_losses: keep the loss of each step; read at the end, so that no step waits for a GPU.
        losses: of each step on this rank, if record_losses.
        tokens: of our batches, on this rank.
        flops: arithmetic of our batches, on this rank; of the same rows for the other side.
        replayed_flops: of forwards that our chunks did a second time.
    """

    steps: int | None = None
    seed: int = 42
    precision: str = "fp32"
    batch_size: int = 16
    learning_rate: float = LEARNING_RATE
    warmup_ratio: float = 0.0
    chunked: bool = False
    max_tokens: int = 16384
    dropout: float | None = None
    clip: float = 1.0
    settings: PeerSettings = field(default_factory=PeerSettings)
    ranks: int = 1
    on_start: Callable[[nn.Module], None] | None = None
    on_step: Callable[[], None] | None = None
    record_losses: bool = False
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    replayed_flops: int = 0


# -- ours --------------------------------------------------------------------------------------------------


class _Watch(Callback):
    def __init__(self, fit: Fit, spec: EncoderSpec) -> None:
        self.fit = fit
        self.arithmetic = count_arithmetic(spec)
        self.losses: list[torch.Tensor] = []
        self.forwarded = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        module.encoder.backbone.register_forward_pre_hook(self._forward, with_kwargs=True)  # type: ignore[union-attr]
        if self.fit.on_start:
            self.fit.on_start(trainer.strategy.model)

    def _forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids")
        self.forwarded += 0 if ids is None else ids.numel()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fit = self.fit
        if fit.record_losses:
            self.losses.append(outputs["loss"].detach().clone())
        fit.tokens.append(batch.num_tokens)
        fit.flops.append(self.arithmetic.step(batch.lengths))
        replayed = self.forwarded / batch.num_tokens - 1
        fit.replayed_flops += round(max(0.0, replayed) * self.arithmetic.forward(batch.lengths))
        self.forwarded = 0
        if fit.on_step:
            fit.on_step()


def our_data(task: Task, data: Path, spec: EncoderSpec, fit: Fit, cache: Path) -> PairData:
    return PairData([task.source(data)], spec, batch_size=fit.batch_size, seed=fit.seed, cache_dir=str(cache))


def fit_ours(
    task: Task, data: Path, backbone: str, fit: Fit, cache: Path, callbacks: Sequence[Callback] = ()
) -> EmbeddingModule:
    """Lightning's fit over our module and data, as ``trainer fit`` runs it, without logs and checkpoints."""
    spec = EncoderSpec(backbone, max_length=task.max_length, dropout=fit.dropout)
    options: dict[str, Any] = {"num_labels": task.num_labels} if task.num_labels else {}
    if task.loss == "InfoNCE":  # theirs takes a text that stands twice in a batch for a negative
        options["mask_false_negatives"] = False
    loss = getattr(our_losses, task.loss)(**options)
    module = EmbeddingModule(
        spec, loss, learning_rate=fit.learning_rate, warmup_ratio=fit.warmup_ratio, max_tokens=fit.max_tokens
    )
    watch = _Watch(fit, spec)
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
            devices=fit.ranks,
            strategy="ddp" if fit.ranks > 1 else "auto",
            default_root_dir=folder,
            callbacks=[watch, *callbacks],
        ).fit(module, datamodule=our_data(task, data, spec, fit, cache))
    fit.losses += [float(loss) for loss in watch.losses]
    return module


# -- sentence-transformers ---------------------------------------------------------------------------------


class _PeerWatch(TrainerCallback):
    def __init__(self, fit: Fit) -> None:
        self.fit = fit
        self.peer: SentenceTransformerTrainer | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.fit.on_start and self.peer is not None:
            self.fit.on_start(self.peer.model_wrapped)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.fit.on_step:
            self.fit.on_step()


def peer_loss(task: Task, model: SentenceTransformer, fit: Fit | None = None) -> nn.Module:
    if task.loss == "Softmax":
        dimension = model.get_embedding_dimension()
        assert dimension is not None
        return peer_losses.SoftmaxLoss(model, dimension, task.num_labels)
    gathers = {"gather_across_devices": True} if fit and fit.ranks > 1 and task.loss == "InfoNCE" else {}
    if fit and fit.chunked:
        return peer_losses.CachedMultipleNegativesRankingLoss(model, **fit.settings.cached, **gathers)
    return _PEER_LOSS[task.loss](model, **gathers)


def load_peer(backbone: str, max_length: int, fit: Fit) -> SentenceTransformer:
    options = {"attn_implementation": fit.settings.attention} if fit.settings.attention else {}
    model = SentenceTransformer(backbone, model_kwargs={"dtype": torch.float32, **options})
    model.max_seq_length = max_length
    if fit.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = fit.dropout
    return model


def fit_peer(model: SentenceTransformer, loss: nn.Module, rows: list[dict[str, Any]], fit: Fit, shuffle: bool) -> None:
    """sentence-transformers' own trainer over rows, in their order or shuffled by it."""
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    losses: list[torch.Tensor] = []

    def record(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        losses.append(output.detach().clone())

    hook = loss.register_forward_hook(record) if fit.record_losses else None
    own_order: dict[str, Any] = {} if shuffle else {"batch_sampler": _sequential}
    watch = _PeerWatch(fit)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            max_steps=fit.steps or -1,
            per_device_train_batch_size=fit.batch_size // fit.ranks,
            learning_rate=fit.learning_rate,
            warmup_ratio=fit.warmup_ratio,
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
            ddp_backend=None if fit.ranks == 1 else "nccl" if torch.cuda.is_available() else "gloo",
            **own_order,
            **fit.settings.arguments,
        )
        peer = SentenceTransformerTrainer(
            model, arguments, train_dataset=Dataset.from_list(rows), loss=loss, callbacks=[watch]
        )
        peer.remove_callback(PrinterCallback)
        watch.peer = peer
        peer.train()
    fit.losses += [float(value) for value in losses]
    if hook:
        hook.remove()


def _sequential(dataset: Dataset, batch_size: int, drop_last: bool, **kwargs: Any) -> DefaultBatchSampler:
    return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)
