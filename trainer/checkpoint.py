"""Checkpoints: when they are written, how, and which one a run goes on from.

All are written at a step boundary, in ``on_train_batch_end``: the one place from which Lightning resumes exactly.
"""

import os
import pickle
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from trainer.evaluation.runner import Evaluation
from trainer.tracking.metrics import MetricsLog

_STEP_NAME = re.compile(r"step-(\d+)\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, then renames: a kill at any moment leaves either the old file
    or the new one. (Lightning's own save copies across file systems when TMPDIR is on another one, #21253.)"""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: Any = None) -> dict[str, Any]:
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is refused: it holds more than tensors and plain types, which could run code; "
                "take a checkpoint that a fit wrote"
            ) from error


def newest(run_dir: Path) -> Optional[Path]:
    """The checkpoint with the highest step in a run directory, None where there is none."""
    return next(reversed(_step_checkpoints(run_dir / "checkpoints")), None)


def best(run_dir: Path) -> Optional[Path]:
    """The checkpoint with the best monitored metric, None where nothing was monitored."""
    path = run_dir / "checkpoints" / "best.ckpt"
    return path if path.is_file() else None


def _step_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints of a directory, by step; the best one is not among them."""
    found = [(int(m[1]), path) for path in directory.glob("*.ckpt") if (m := _STEP_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.directory = Path(trainer.default_root_dir) / "checkpoints"
        if self.monitor == "auto":
            sets = trainer.datamodule.validation_sets  # type: ignore[attr-defined]
            self.monitor = f"eval/{sets[0].name}/{sets[0].evaluator.primary}" if sets else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._update_best(trainer)
        if step % self.save_every_steps == 0 or step == pl_module.num_training_steps:
            self._saved_step = step
            self._save(trainer, f"step-{step:08d}.ckpt")
            if trainer.is_global_zero:
                self._drop_old()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An early stop ends at a step that nobody could plan for.
        if trainer.global_step and trainer.global_step != self._saved_step:
            self._save(trainer, f"step-{trainer.global_step:08d}.ckpt")

    def _save(self, trainer: Trainer, name: str) -> None:
        log = next((c for c in trainer.callbacks if isinstance(c, MetricsLog)), None)  # type: ignore[attr-defined]
        with log.paused() if log else nullcontext():  # rows per second leave out what is not training
            trainer.save_checkpoint(self.directory / name)

    def _evaluation(self, trainer: Trainer) -> Evaluation:
        return next(c for c in trainer.callbacks if isinstance(c, Evaluation))  # type: ignore[attr-defined]

    def _update_best(self, trainer: Trainer) -> None:
        evaluation = self._evaluation(trainer)
        if self.monitor is None or evaluation.last_step != trainer.global_step:
            return
        metrics = evaluation.last_metrics
        if self.monitor not in metrics:
            raise ValueError(
                f"checkpoint.monitor '{self.monitor}' was not measured; there are: {', '.join(sorted(metrics))}"
            )
        value = metrics[self.monitor]
        better = self.best_value is None or (value > self.best_value if self.mode == "max" else value < self.best_value)
        if better:
            self.best_value, self.best_step = value, trainer.global_step
            self._save(trainer, "best.ckpt")

    def _drop_old(self) -> None:
        if self.keep > 0:
            for path in _step_checkpoints(self.directory)[: -self.keep]:
                path.unlink()

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "best_step": self.best_step, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value, self.best_step = state_dict["best_value"], state_dict["best_step"]
