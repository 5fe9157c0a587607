"""When and how a run is evaluated: the callback around `evaluate`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from torch import Tensor, nn

from trainer.batch import PackedBatch
from trainer.distributed import gather
from trainer.encoder import Encoder
from trainer.encoder.towers import Towers
from trainer.encoder.weights import refuse_missing_weights
from trainer.evaluation.health import measure
from trainer.evaluation.scoring import Observe, evaluate
from trainer.evaluation.sharded import Encode, TokenizedSet, ask_teacher, tokenize_set
from trainer.memory import explained_memory
from trainer.messages import did_you_mean
from trainer.module import EmbeddingModule
from trainer.tracking.metrics import MetricsLog

if TYPE_CHECKING:
    from trainer.data.validation import ValidationSet

__all__ = ["Evaluation", "evaluate", "is_due"]

logger = logging.getLogger(__name__)

# Said of trainer.val_check_interval.
NO_CLOCK = "is a time, but clocks differ between ranks. Give a number of steps (500) or a fraction of an epoch (0.5)."


def not_measured(key: str, name: str, metrics: Collection[str]) -> ValueError:
    """The error about a metric that a setting asks for, and no set gives."""
    guess = did_you_mean(name, list(metrics))
    if not metrics:
        return ValueError(
            f"{key} '{name}' is not measured, for no set is: only eval/... can be watched; name a set in "
            "data.validation, and leave trainer.limit_val_batches out"
        )
    return ValueError(f"{key} '{name}' is not measured; there are: {', '.join(sorted(metrics))}.{guess}")


def refuse_monitor(key: str, name: str, sets: Sequence[ValidationSet]) -> None:
    """Raises ValueError where none of the sets gives the metric, as far as that is known before they are scored.

    Args:
        key: the setting that asks for it.
        name: of the metric.
        sets: to evaluate on.
    """
    if not sets:
        raise not_measured(key, name, ())
    metrics_of: dict[str, list[str]] = {}  # by what their names start with
    for one in sets:
        for start in filter(None, (one.suite, one.name)):
            metrics_of[f"eval/{start}/"] = [f"eval/{start}/{metric}" for metric in one.evaluator.metrics]
    meant = max((start for start in metrics_of if name.startswith(start)), key=len, default=None)
    if meant is None:
        starts = dict.fromkeys(f"eval/{one.suite or one.name}/..." for one in sets)
        raise ValueError(
            f"{key} '{name}' is of no set in data.validation; there are: {', '.join(starts)}."
            f"{did_you_mean(name, [one.primary_metric for one in sets])}"
        )
    if (known := metrics_of[meant]) and name not in known:
        raise not_measured(key, name, known)


def refuse_monitors(trainer: Trainer, sets: Sequence[ValidationSet]) -> None:
    """`refuse_monitor` for the callbacks of Lightning that watch a metric."""
    scored = sets if trainer.limit_val_batches else ()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.strict:
            refuse_monitor("EarlyStopping: monitor", callback.monitor, scored)
        # It asks at the ends of epochs: what a callback of the user's has logged is there by then.
        elif isinstance(callback, ModelCheckpoint) and callback.monitor and callback.monitor.startswith("eval/"):
            refuse_monitor("ModelCheckpoint: monitor", callback.monitor, scored)


@contextmanager
def _evaluation_mode(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Every submodule in evaluation mode, then each in its own mode again; the random state is left alone."""
    training = [(part, part.training) for part in module.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        module.eval()
        try:
            yield
        finally:
            for part, mode in training:
                part.training = mode


class Evaluation(Callback):
    """Evaluates before training, every `trainer.val_check_interval` and at the end of training.

    An int interval counts optimizer steps of the run, a float is a fraction of an epoch (1.0: at the end of
    each). `trainer.check_val_every_n_epoch` leaves out epochs, `trainer.limit_val_batches=0` everything.
    Lightning's own validation loop is off during `fit`, because its position does not survive a restart in
    the middle of an epoch. Metrics go to `trainer.callback_metrics`, where early stopping and checkpoints
    find them, and to `MetricsLog`, beside the health of the embeddings (`health/<set>/...`, see `Health`; for a
    search of its queries). `trainer.validate` and `trainer.test` return them.

    Place it behind `MetricsLog` and before checkpoint callbacks, so that a checkpoint holds the metrics of
    its own step.
    """

    def __init__(self) -> None:
        self.sets: list[TokenizedSet] = []
        self.last_step = -1
        self.last_metrics: dict[str, float] = {}
        self._limit_val_batches: int | float | None = None
        self._patience: list[int] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            if not hasattr(trainer, "val_check_interval"):  # Lightning has made a time of it
                raise ValueError(f"trainer.val_check_interval {NO_CLOCK}")
            refuse_monitors(trainer, trainer.datamodule.validation_sets)  # type: ignore[attr-defined]
            self._limit_val_batches = trainer.limit_val_batches
            trainer.limit_val_batches = 0
            self._patience = [callback.patience for callback in trainer.early_stopping_callbacks]
        if self._limit_val_batches == 0 or self.sets:
            return
        self.sets = [tokenize_set(one) for one in trainer.datamodule.validation_sets]  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self._limit_val_batches is not None:
            trainer.limit_val_batches = self._limit_val_batches
            self._limit_val_batches = None

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.last_step, "metrics": self.last_metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step, self.last_metrics = state_dict["step"], state_dict["metrics"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.val_check_interval == 1.0:
            # Lightning would ask them behind the checkpoint of the epoch's last step, which then lacks their answer.
            for callback in trainer.early_stopping_callbacks:
                callback._check_on_train_epoch_end = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._evaluate_step(trainer, pl_module)
            for callback in trainer.early_stopping_callbacks:
                if callback.strict and callback.monitor not in trainer.callback_metrics:
                    raise not_measured("EarlyStopping: monitor", callback.monitor, self.last_metrics)
            return
        trainer.callback_metrics.update(_as_tensors(self.last_metrics))
        for callback, patience in zip(trainer.early_stopping_callbacks, self._patience, strict=True):
            callback.patience = patience  # a checkpoint would bring its own
            callback.stopping_reason = EarlyStoppingReason.NOT_STOPPED  # and why the run had ended
            if callback.wait_count >= patience:
                trainer.should_stop = True  # it was decided at this step
                gather.warn(
                    logger,
                    f"EarlyStopping ended the run at step {trainer.global_step}: {callback.monitor} was not better for "
                    f"{callback.wait_count} evaluations; to go on, raise patience, {patience}",
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._is_due(trainer, pl_module):
            return
        self._evaluate_step(trainer, pl_module)
        # They would wait for the end of Lightning's validation loop, which does not run.
        for callback in trainer.early_stopping_callbacks:
            callback.on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that stops early; the planned last step was evaluated in its own hook, before its checkpoint.
        if self.last_step != trainer.global_step:
            self._evaluate_step(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.early_stopping_callbacks if trainer.is_global_zero else ():
            if callback.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED:
                said = (
                    f"{callback.monitor} was not better than {callback.best_score:.4f} for {callback.wait_count} "
                    f"evaluations (patience {callback.patience})"
                )
            elif callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
                said = str(callback.stopping_reason_message).removesuffix(" Signaling Trainer to stop.")
            else:
                continue
            print(f"EarlyStopping ended the run at step {trainer.global_step}: {said}")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" and self.sets:
            self.last_metrics = self._run(trainer, pl_module)
            # Equal on all ranks: sync_dist only keeps Lightning from warning that they might not be.
            pl_module.log_dict(self.last_metrics, sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start

    def _is_due(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        assert isinstance(pl_module, EmbeddingModule)
        if trainer.global_step == self.last_step:
            return False
        if trainer.global_step == pl_module.num_training_steps:
            return True
        return is_due(
            trainer.global_step,
            trainer.val_check_interval,
            pl_module.data.steps_per_epoch,
            trainer.check_val_every_n_epoch or 1,
        )

    def _run(self, trainer: Trainer, pl_module: LightningModule, observe: Observe | None = None) -> dict[str, float]:
        assert isinstance(pl_module, EmbeddingModule)
        device, max_tokens = pl_module.device, pl_module.max_tokens
        encode = _encode_with(pl_module.encoder, device, max_tokens)
        ranks = gather.rank(), gather.world_size()
        with _evaluation_mode(pl_module, device):
            # In float32 whatever the precision of the run, once: a teacher does not change.
            self.sets = [_taught(one, device, *ranks, max_tokens) if one.teacher else one for one in self.sets]
            with trainer.precision_plugin.val_step_context():
                return evaluate(encode, self.sets, *ranks, max_tokens, pl_module.classify, observe)

    def _evaluate_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.sets:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        log = next((callback for callback in callbacks if isinstance(callback, MetricsLog)), None)
        health: dict[str, float] = {}
        histograms: dict[str, list[int]] = {}

        def observe(one: TokenizedSet, embeddings_UD: Tensor, text_N: Tensor) -> None:
            found = measure(one.evaluator, one.rows, embeddings_UD, text_N)
            health.update({f"health/{one.name}/{name}": value for name, value in found.metrics.items()})
            histograms.update({f"health/{one.name}/{name}": counts for name, counts in found.histograms.items()})

        with log.paused() if log else nullcontext():
            self.last_metrics = self._run(trainer, pl_module, observe if log else None)
        self.last_step = trainer.global_step
        trainer.callback_metrics.update(_as_tensors(self.last_metrics))
        if log:
            log.record({**self.last_metrics, **health, **log.position()}, self.last_step, histograms)


def _encode_with(encoder: Encoder | Towers, device: torch.device, max_tokens: int) -> Encode:
    def encode(batch: PackedBatch) -> Tensor:
        with explained_memory("evaluation", batch, max_tokens):
            return encoder.embed(batch.to(device))

    return encode


def _taught(one: TokenizedSet, device: torch.device, rank: int, world_size: int, max_tokens: int) -> TokenizedSet:
    """The set with its teacher's embeddings; the teacher is on the device as long as it embeds."""
    assert one.teacher is not None
    gather.enter(f"embeddings of the teacher of {one.name}")
    teacher = Encoder(one.teacher, max_tokens).eval().to(device)
    refuse_missing_weights(one.teacher, teacher.backbone)
    encode = _encode_with(teacher, device, max_tokens)
    return ask_teacher(encode, teacher.text, one, rank, world_size, max_tokens)


def is_due(step: int, interval: int | float, steps_per_epoch: int, every_n_epoch: int = 1) -> bool:
    """Whether to evaluate after optimizer step `step` (counted from 1 over the whole run)."""
    epoch, position = divmod(step - 1, steps_per_epoch)
    if (epoch + 1) % every_n_epoch:
        return False
    if isinstance(interval, int):
        return step % interval == 0
    # The k-th evaluation of an epoch is at the first step at or behind the fraction k * interval of it, so an
    # interval of 1/k always meets the end of the epoch. The small number absorbs rounding (3 * 0.1 > 0.3).
    gap = interval * steps_per_epoch
    return int((position + 1) / gap + 1e-9) > int(position / gap + 1e-9)


def _as_tensors(metrics: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
