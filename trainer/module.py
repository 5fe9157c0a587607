"""The LightningModule: an encoder, a loss and an optimizer, nothing else."""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal, Optional, Union, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import get_scheduler

from trainer.base_weights import BaseWeights
from trainer.batch import PackedBatch
from trainer.check.rules import unfit_columns
from trainer.data.module import PairData
from trainer.data.permutation import mix
from trainer.data.sources import Source
from trainer.data.teaching import teach
from trainer.distributed import gather
from trainer.distributed.strategies import ZeRO, expect_idle_weights
from trainer.encoder import Encoder, EncoderSpec
from trainer.encoder.towers import Towers, load_encoder
from trainer.evaluation.classification import Classification
from trainer.finite import FiniteSteps
from trainer.host_memory import keep_freed_pages
from trainer.losses import Loss
from trainer.losses.base import refuse_incomplete
from trainer.memory import explained_memory
from trainer.messages import did_you_mean, refuse_not_positive
from trainer.model_refusals import (
    refuse_all_frozen,
    refuse_compiled,
    refuse_idle,
    refuse_idle_heads,
    refuse_layerdrop,
    refuse_missing_teacher,
    refuse_names,
    refuse_prompts,
    refuse_teacher_size,
)
from trainer.optimizer import clip, count_steps, gradient_norm, parameter_groups

logger = logging.getLogger(__name__)


class EmbeddingModule(LightningModule):
    """Fine-tunes a siamese encoder, or two of them.

    Args:
        encoder: the encoder to fine-tune.
        document_encoder: an encoder of its own for the documents, which are all columns but anchor; the first one then
            takes the queries, anchor, alone.
        loss: function of the embeddings, by class name.
        losses: others by a name of yours, for the training sources whose loss is that name.
        teacher: frozen encoder whose embeddings a loss wants (MSE, EmbedDistill; the guide of GISTEmbed); it embeds
            every training text once, before the training.
        learning_rate: peak of the schedule.
        weight_decay: per unit of the learning rate; never on biases, norms and single numbers unless decay_all.
        warmup_ratio: share of the steps in which the learning rate rises from 0.
        schedule: course of the learning rate after the warm-up.
        optimizer: AdamW, or plain SGD (no momentum).
        max_tokens: memory budget of one forward on one device, in tokens; a longer batch runs in chunks.
        decay_all: weight decay on biases and norms too.
        print_first_batch: decode and print the first batch (debugging).
    """

    def __init__(
        self,
        encoder: EncoderSpec,
        loss: Loss,
        losses: Optional[dict[str, Loss]] = None,
        teacher: Optional[EncoderSpec] = None,
        learning_rate: float = 5.0e-5,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.0,
        schedule: Literal["linear", "cosine", "constant"] = "linear",
        optimizer: Literal["adamw", "sgd"] = "adamw",
        max_tokens: int = 16384,
        decay_all: bool = False,
        print_first_batch: bool = False,
        document_encoder: Optional[EncoderSpec] = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= warmup_ratio < 1.0:
            raise ValueError(f"model.warmup_ratio is {warmup_ratio}; it is a share of the steps, 0 to below 1")
        if max_tokens < 1:
            raise ValueError(f"model.max_tokens is {max_tokens}; it must be 1 or more")
        refuse_not_positive("model.learning_rate", learning_rate)
        refuse_not_positive("model.weight_decay", weight_decay, or_zero=True)
        self.encoder_spec = encoder
        self.document_spec = document_encoder
        self.loss = loss
        refuse_names(losses or {})
        self.losses = nn.ModuleDict(losses or {})
        for one in self.all_losses:
            refuse_incomplete(one)
        self.teacher_spec = teacher
        refuse_missing_teacher(self.all_losses, teacher)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.schedule = schedule
        self.optimizer_name = optimizer
        self.max_tokens = max_tokens
        self.decay_all = decay_all
        self.print_first_batch = print_first_batch
        self.last_grad_norm: Optional[Tensor] = None
        self.last_metrics: dict[str, Tensor] = {}
        self.finite_steps = FiniteSteps()
        self.encoder: Union[Encoder, Towers]

    # -- building -----------------------------------------------------------------------------------------

    @property
    def encoder_specs(self) -> list[EncoderSpec]:
        """Of all texts; or of queries, and of documents."""
        return [self.encoder_spec] if self.document_spec is None else [self.encoder_spec, self.document_spec]

    @property
    def all_losses(self) -> list[Loss]:
        return [self.loss, *(cast(Loss, loss) for loss in self.losses.values())]

    def loss_of(self, source: Source) -> Loss:
        """The loss that trains on ``source``.

        Raises:
            ValueError: the source names one that model.losses does not have.
        """
        if source.loss is None:
            return self.loss
        if source.loss not in self.losses:
            known = ", ".join(self.losses) or "nothing"
            raise ValueError(
                f"{source.path}: loss is '{source.loss}', but model.losses has {known}."
                f"{did_you_mean(source.loss, list(self.losses))}"
            )
        return cast(Loss, self.losses[source.loss])

    def classifier_of(self, loss: Optional[str]) -> Any:
        """The loss whose head tells classes.

        Args:
            loss: its name in model.losses; None: model.loss.

        Raises:
            ValueError: there is no such loss, or it has no such head.
        """
        if loss is not None and loss not in self.losses:
            known = ", ".join(self.losses) or "nothing"
            raise ValueError(f"LabelAccuracy: loss is '{loss}', but model.losses has {known}")
        head: Any = self.loss if loss is None else self.losses[loss]
        if not hasattr(head, "logits"):
            raise ValueError(
                f"LabelAccuracy asks {type(head).__name__} for classes, which it does not tell; train with Softmax, or "
                "name the Softmax of model.losses: evaluator: {class_path: LabelAccuracy, init_args: {loss: ...}}"
            )
        return head

    def refuse_classifiers(self, data: PairData) -> None:
        """Raises ValueError where a validation set asks a loss for classes that it does not tell."""
        for held_out in data.validation_sets:
            if isinstance(held_out.evaluator, Classification):
                num_classes = self.classifier_of(held_out.evaluator.loss).num_labels
                if num_classes is None or "label" not in held_out.rows.column_names:
                    continue  # of a loss of one's own; a lacking column is told with the others
                try:
                    held_out.evaluator.refuse_labels(held_out.rows, num_classes)
                except ValueError as error:
                    raise ValueError(f"{held_out.name}: {error}") from error

    def classify(self, loss: Optional[str], columns: Sequence[Tensor]) -> Tensor:
        """Logits (B, classes) that the head of a loss gives to columns of (B, D) embeddings."""
        return self.classifier_of(loss).logits(columns)

    @property
    def data(self) -> PairData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, PairData)
        return data

    def prepare_data(self) -> None:
        """Let the teacher embed, once per node; the other ranks wait and open its files. Lightning calls this for
        validate and test, too, which read no training data."""
        if self.trainer.state.fn == "fit":
            self.open_teachers(self.data, self.trainer.strategy.root_device, verify=True)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            device = self.trainer.strategy.root_device
            if device.type == "cpu":
                keep_freed_pages()
            self.open_teachers(self.data, device)
            self.data.num_labels = [self.loss_of(source).num_labels for source in self.data.train_sources]

    def open_teachers(self, data: PairData, device: torch.device, verify: bool = False) -> None:
        """Give ``data`` the teacher's embeddings of the sources whose loss wants them; the first call makes them.

        Args:
            data: of the run.
            device: of the teacher.
            verify: make them again where a file of them is damaged.

        Raises:
            ValueError: such a source is streamed, or a loss can't compare with a teacher of this size.
        """
        if self.teacher_spec is None:
            return
        refuse_teacher_size(self.all_losses, self.encoder_spec, self.teacher_spec)
        for number, source in enumerate(data.train_sources):
            if "teacher" in self.loss_of(source).needs:
                data.teachers[number] = teach(
                    source, self.teacher_spec, data.cache_dir, self.max_tokens, device, verify
                )

    def configure_model(self) -> None:
        """Load the encoder and make the heads, on the host; the strategy moves them to its device."""
        if hasattr(self, "encoder"):
            return
        # Lightning would have tensors made on the GPU in here, and transformers load onto it, which takes accelerate.
        with torch.device("cpu"):
            self._make_model()

    def _make_model(self) -> None:
        strategy = self.trainer.strategy
        lockstep = isinstance(strategy, ZeRO) and strategy.stage == 3
        if lockstep:
            refuse_compiled(self.encoder_specs)
        self.encoder = load_encoder(self.encoder_spec, self.document_spec, self.max_tokens, self.data.text)
        self._base = BaseWeights(self.encoder_specs, self.encoder.parts)
        for loss in self.all_losses:
            loss.build(self.encoder.embedding_dimension)
        if lockstep:
            refuse_idle_heads(self.all_losses)
        if isinstance(strategy, ZeRO):
            refuse_layerdrop(self.encoder.parts.values())
        elif not all(part.packed for part in self.encoder.parts.values()):
            expect_idle_weights(strategy)
        for part in self.encoder.parts.values():
            part.lockstep = lockstep
        self.train()  # transformers loads in evaluation mode, in which dropout is off
        self.refuse_classifiers(self.data)  # now, not after hours
        if self.trainer.training:
            data = self.data
            for source, table in zip(data.train_sources, data.inputs, strict=True):
                for finding in unfit_columns(self.loss_of(source), source, table):
                    raise ValueError(str(finding))
            refuse_prompts(data.train_sources, self.encoder_specs, list(self.encoder.parts.values()))
            refuse_idle(self.losses, data.train_sources)
            refuse_all_frozen(self, self.encoder_specs, self.all_losses)
            # The loss scaler of fp16 leaves out steps, and would not tell us to leave out their decay.
            known_decay = not self.weight_decay or str(self.trainer.precision) != "16-mixed"
            if known_decay and not self.compact_vocabularies(self.data):
                gather.warn(logger, "streaming: the pieces to come are not known, so the whole vocabulary is trained")
        # No buffer of ours changes from batch to batch differently on different ranks. DDP would broadcast all of
        # them before every forward, the frozen embedding matrix (hundreds of MB) included.
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self, [name for name, _ in self.named_buffers()]
        )

    def compact_vocabularies(self, data: PairData) -> bool:
        """Train only the pieces that each encoder's training texts use, where its spec allows it; False where it
        does and nobody knows them."""
        are_known = True
        for tower, spec, part in zip(data.text.towers, self.encoder_specs, self.encoder.parts.values(), strict=True):
            if spec.compact_vocabulary == "auto":
                used_ids = data.used_ids(tower)
                if used_ids is None:
                    are_known = False
                else:
                    part.compact_vocabulary(used_ids)
        return are_known

    @property
    def num_training_steps(self) -> int:
        """Optimizer steps of the whole run, known from our own order. Asking Lightning for its estimate would
        drop the loader's state on resume (Lightning #20550)."""
        trainer = self.trainer
        return count_steps(self.data.steps_per_epoch, trainer.max_epochs or 1, trainer.max_steps)

    def make_optimizer(self, precision: str) -> torch.optim.Optimizer:
        """The optimizer of a run with this trainer.precision, without a schedule."""
        groups = parameter_groups(self, self.weight_decay, self.decay_all)
        # Under fp16 the loss scaler must unscale before we clip, which a fused step would do itself.
        fused = precision != "16-mixed"
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(groups, lr=self.learning_rate, fused=fused and self.device.type == "cuda")
        return torch.optim.AdamW(groups, lr=self.learning_rate, fused=fused)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(str(self.trainer.precision))
        self._weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        steps = self.num_training_steps
        if steps == 1 and self.warmup_ratio:
            gather.warn(
                logger,
                f"model.warmup_ratio is {self.warmup_ratio:g} and the run has 1 step, the first of the warm-up, at a "
                "learning rate of 0: nothing is trained. Set warmup_ratio to 0, or take more steps",
            )
        scheduler = get_scheduler(
            "constant_with_warmup" if self.schedule == "constant" else self.schedule,
            optimizer,
            num_warmup_steps=math.ceil(steps * self.warmup_ratio),
            num_training_steps=steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Steps end a run, and Lightning counts no epochs: an epoch that an early stop has cut counts as a whole one in
        its checkpoints, and one of another batch size has another length."""
        loop, steps = self.trainer.fit_loop, self.num_training_steps
        loop.max_epochs, loop.epoch_loop.max_steps = -1, steps

    def on_train_start(self) -> None:
        """What the config says about the optimizer counts, not what a checkpoint says: a resume refuses differences,
        and those that are allowed must not vanish in silence. The same config gives the same numbers, bit for bit."""
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            scheduler.base_lrs = [self.learning_rate for _ in scheduler.base_lrs]
            rates = [self.learning_rate * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            groups = scheduler.optimizer.param_groups
            for group, rate, decay in zip(groups, rates, self._weight_decays, strict=True):
                group.update(lr=rate, initial_lr=self.learning_rate, weight_decay=decay)
            scheduler._last_lr = rates

    # -- one step -----------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        # Dropout of a step is a function of (seed, step, rank): it is the same after a kill, without saved
        # generator states, and needs no rule for ranks that come or go.
        self._batch = batch
        torch.manual_seed(mix(self.data.seed, self.trainer.global_step, gather.rank()) >> 1)
        if self.print_first_batch and batch_idx == 0 and self.trainer.global_step == 0 and gather.rank() == 0:
            self._print(batch)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        used = self.loss_of(self.data.train_sources[batch.source])
        loss = used(self.encoder(batch), batch.targets)
        if loss.dim() != 0:
            raise ValueError(
                f"{type(used).__name__} gives a tensor of shape {tuple(loss.shape)}, but a loss is a single number: "
                "return targets.weight times the sum of its rows' terms"
            )
        self.last_metrics = used.last_metrics
        # The gradient of this step's loss with respect to the heads of the others: strategies wait for all of them.
        idle = [p.sum() for other in self.all_losses if other is not used for p in other.parameters()]
        if idle:
            loss = loss + 0.0 * torch.stack(idle).sum()
        return self.finite_steps.watch_loss(loss, self.trainer.global_step)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm and keep the norm before clipping for the log."""
        if isinstance(self.trainer.strategy, ZeRO):
            self.last_grad_norm = self.trainer.strategy.gradient_norm()  # its step clips
            # Read on the host: its step is not torch's, and can't be left out on the device.
            self.finite_steps.check(self.last_grad_norm.cpu(), optimizer, self.trainer)
            return
        by_norm = gradient_clip_algorithm in (None, "norm")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.last_grad_norm = gradient_norm(parameters)
        if by_norm and gradient_clip_val:
            clip(optimizer, parameters, gradient_clip_val, self.last_grad_norm)
        elif gradient_clip_val:
            # Lightning's own way refuses fused optimizers under bf16: it takes them for ones that unscale.
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        self.finite_steps.check(self.last_grad_norm, optimizer, self.trainer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        with explained_memory("training", self._batch, self.max_tokens):  # forward and backward run in here
            super().optimizer_step(*args, **kwargs)
        for part in self.encoder.parts.values():
            vocabulary = part.vocabulary
            if vocabulary is not None and self.weight_decay:
                vocabulary.decay_unused(1.0 - rate * self.weight_decay)

    def on_train_batch_end(self, outputs: Any, batch: PackedBatch, batch_idx: int) -> None:
        gather.enter("loading the next batch")  # all callbacks have had their turn
        # The log has waited for the device just now.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.trainer.global_step % every == 0:
            self.finite_steps.read(self.trainer)

    def on_train_end(self) -> None:
        self.finite_steps.read(self.trainer)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the evaluation callback embeds and scores."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the evaluation callback embeds and scores."""

    # -- checkpoints --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finite_steps.read(self.trainer)
        self._base.leave_out(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the vocabulary fit the checkpoint's, and fill in what its backbone has, before weights are loaded."""
        self._base.fill_in(checkpoint, self.trainer.training)

    def _print(self, batch: PackedBatch) -> None:
        columns: list[list[str]] = []
        for stream, part in zip(batch.streams, self.encoder.parts.values(), strict=True):
            segments = torch.split(stream.input_ids_T.cpu(), list(stream.lengths))
            texts = [str(part.text.tokenizer.decode(segments[place])) for place in stream.order_S.tolist()]
            columns += [texts[i : i + batch.num_rows] for i in range(0, len(texts), batch.num_rows)]
        targets = batch.targets
        for row in range(batch.num_rows):
            score = "" if targets.scores_B is None else f" score {float(targets.scores_B[row]):.3f}"
            label = "" if targets.labels_B is None else f" label {int(targets.labels_B[row])}"
            print(f"row {int(targets.row_ids_B[row])}{score}{label}: " + " | ".join(column[row] for column in columns))
