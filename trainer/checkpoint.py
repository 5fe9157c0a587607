"""Checkpoints: when they are written, and through which door they pass.

All are written at a step boundary: in ``on_train_batch_end``, from which Lightning resumes exactly, or in
``on_train_end`` where a run stops early. There Lightning has counted the epoch as a whole one, so steps end a run, not
its epochs (`EmbeddingModule.on_fit_start`).
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from trainer import manifest
from trainer.data.validation import ValidationSet
from trainer.distributed import gather
from trainer.evaluation.runner import Evaluation, not_measured, refuse_monitor
from trainer.tracking.metrics import MetricsLog

logger = logging.getLogger(__name__)


class DirectoryCheckpointIO(TorchCheckpointIO):
    """Checkpoint directories in place of Lightning's file, whose save copies across file systems when TMPDIR is on
    another one and can leave the older file empty (#21253).

    Attributes:
        identity: what the run is, written into every manifest.
        before_save: is called before each, on the rank that writes.
    """

    identity: Optional[dict[str, Any]] = None
    before_save: Optional[Callable[[], None]] = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        about = {"step": checkpoint["global_step"], "ranks": gather.world_size(), "identity": self.identity}
        _refuse_non_finite(checkpoint)
        if self.before_save:
            self.before_save()
        manifest.write_checkpoint(checkpoint, Path(path), about)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: Any = None) -> dict[str, Any]:
        return manifest.read_state(Path(path), map_location=map_location)


class Checkpoints(Checkpoint):
    """Saves every N steps, at the end and at the best value of a metric.

    Args:
        save_every_steps: optimizer steps between checkpoints.
        keep: newest checkpoints kept besides the best one; all with -1.
        monitor: metric of the best one, eval/<name>/<metric>; auto takes the first validation set's first.
        mode: whether more or less of it is better.
    """

    def __init__(
        self,
        save_every_steps: int = 500,
        keep: int = 2,
        monitor: Optional[str] = "auto",
        mode: Literal["max", "min"] = "max",
    ) -> None:
        if save_every_steps < 1:
            raise ValueError(f"checkpoint.save_every_steps is {save_every_steps}; it must be 1 or more")
        if keep == 0 or keep < -1:
            raise ValueError(f"checkpoint.keep is {keep}; it must be 1 or more, or -1 for all")
        self.save_every_steps = save_every_steps
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.best_value: Optional[float] = None
        self.best_step: Optional[int] = None
        self._saved_step = -1
        self._restored_ranks: Optional[int] = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.run_dir = Path(trainer.default_root_dir)
        if self.monitor == "auto":
            sets = trainer.datamodule.validation_sets  # type: ignore[attr-defined]
            self.monitor = sets[0].primary_metric if sets else None
        if stage == "fit":
            self.refuse_monitor(trainer.datamodule.validation_sets)  # type: ignore[attr-defined]
        if stage == "fit" and trainer.is_global_zero:
            manifest.clean_up(self.run_dir)

    def refuse_monitor(self, sets: Sequence[ValidationSet]) -> None:
        """Raises ValueError where none of the sets gives the metric, as far as that is known before they are scored.

        Args:
            sets: to evaluate on.
        """
        if self.monitor is not None and self.monitor != "auto":
            refuse_monitor("checkpoint.monitor", self.monitor, sets)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resumed, step = trainer.ckpt_path, trainer.global_step
        if resumed is not None and Path(resumed).resolve() == self._folder(step).resolve():
            self._saved_step = step  # a run that ends where it begins leaves the only checkpoint as it is
        measured = self._evaluation(trainer).last_metrics
        if trainer.global_step == 0 and self.monitor and measured and self.monitor not in measured:
            raise not_measured("checkpoint.monitor", self.monitor, measured)
        # The best step of another run, whose checkpoint this one began from, does not lie here. One rank looks: another
        # may look when later steps are set aside.
        if not gather.broadcast_object(self.best_step in manifest.steps(self.run_dir)):
            self.best_value = self.best_step = None
        if trainer.is_global_zero:
            self._leave_later_steps(trainer.global_step)
        ranks = gather.world_size()
        if self._restored_ranks not in (None, ranks):
            gather.warn(
                logger,
                f"{self._restored_ranks} rank(s) saved this checkpoint, {ranks} go on: the same rows in the same "
                "order; the dropout masks of each rank follow from (seed, step, rank)",
            )

    def _leave_later_steps(self, step: int) -> None:
        """A run that went back to this step writes the later ones anew: the old ones must neither count as newest nor
        as best."""
        aside = manifest.set_aside(self.run_dir, step)
        if aside:
            logger.warning(
                "going on from step %d: %d later checkpoint(s) are now in %s; remove it when they are not needed",
                step,
                len(aside),
                aside[0].parent,
            )
        # Also after a kill between a checkpoint and its mark.
        manifest.mark_best(self.run_dir, self.best_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        better = self._is_better(trainer)
        if better or step % self.save_every_steps == 0 or step == pl_module.num_training_steps:
            self.save(trainer, better)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An early stop ends at a step that nobody could plan for; it was evaluated just now.
        if trainer.global_step:
            self.save(trainer, self._is_better(trainer))

    def save(self, trainer: Trainer, better: bool = False) -> Path:
        """Save this step, once unless it turned out to be the best; on all ranks. ``better``: it is the best so far.

        Raises:
            ValueError: it can't be written, or a weight is not finite; on all ranks alike.
        """
        step = trainer.global_step
        folder = self._folder(step)
        if step == self._saved_step and not better:
            return folder
        log = next((c for c in trainer.callbacks if isinstance(c, MetricsLog)), None)  # type: ignore[attr-defined]
        with log.paused() if log else nullcontext():  # rows per second leave out what is not training
            failure = None
            try:
                trainer.save_checkpoint(folder)
            except ValueError as error:
                failure = str(error)
                trainer.strategy.barrier()  # one rank writes, and the others wait there for it to have written
            if failure := gather.broadcast_object(failure):
                raise gather.SharedError(failure)
        self._saved_step = step
        if trainer.is_global_zero:
            if better:
                manifest.mark_best(self.run_dir, step)
            self._drop_old()
        return folder

    def _folder(self, step: int) -> Path:
        return self.run_dir / "checkpoints" / f"step-{step:08d}"

    def _evaluation(self, trainer: Trainer) -> Evaluation:
        return next(c for c in trainer.callbacks if isinstance(c, Evaluation))  # type: ignore[attr-defined]

    def _is_better(self, trainer: Trainer) -> bool:
        """Whether this step was evaluated and is the best so far."""
        evaluation = self._evaluation(trainer)
        if self.monitor is None or evaluation.last_step != trainer.global_step:
            return False
        metrics = evaluation.last_metrics
        if self.monitor not in metrics:
            raise not_measured("checkpoint.monitor", self.monitor, metrics)
        value = metrics[self.monitor]
        if not math.isfinite(value):
            return False
        better = self.best_value is None or (value > self.best_value if self.mode == "max" else value < self.best_value)
        if better:
            self.best_value, self.best_step = value, trainer.global_step
        return better

    def _drop_old(self) -> None:
        if self.keep > 0:
            kept = manifest.best(self.run_dir)
            for path in list(manifest.steps(self.run_dir).values())[: -self.keep]:
                if path != kept:
                    manifest.drop(path)

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_value": self.best_value,
            "best_step": self.best_step,
            "monitor": self.monitor,
            "mode": self.mode,
            "ranks": gather.world_size(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        watched = state_dict["monitor"], state_dict["mode"]
        if watched == (self.monitor, self.mode):
            self.best_value, self.best_step = state_dict["best_value"], state_dict["best_step"]
        elif state_dict["best_step"] is not None:
            gather.warn(
                logger,
                f"the checkpoint watched {watched[0]} ({watched[1]}), this run watches {self.monitor} ({self.mode}): "
                "the best step is looked for from here on",
            )
        self._restored_ranks = state_dict["ranks"]


def _refuse_non_finite(checkpoint: dict[str, Any]) -> None:
    bad = [name for name, value in checkpoint["state_dict"].items() if not _is_finite(value)]
    if bad:
        raise ValueError(
            f"step {checkpoint['global_step']}: {len(bad)} weights are not finite ({', '.join(bad[:3])}): nothing is "
            "saved; go on from the last checkpoint with a lower learning_rate, or with gradient_clip_val set"
        )


def _is_finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())
