"""A callback that says in which part of its life a run got a request to stop (for reliability.py)."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainer import interruption
from trainer.checkpoint import Checkpoints
from trainer.evaluation.runner import Evaluation


class Phases(Callback):
    """Writes `phase-<restart>` into the run directory: the part that was under way when the request was noted.

    Parts: import (until the callbacks are made), loading (until the first step), validation, saving, and backward for
    all else in a step. Also `timeline-<restart>`: when each part but the steps began, seconds since the epoch, and
    `begun-validation-<restart>`: which evaluation is, or was last, under way.
    """

    def __init__(self) -> None:
        self.restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        self.noted = "import" if interruption.received() else ""
        self.begun = [f"loading {time.time():.3f}"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder, self.first = Path(trainer.default_root_dir), trainer.is_global_zero
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Evaluation):
                callback._evaluate_step = self._watch("validation", callback._evaluate_step)  # type: ignore
            if isinstance(callback, Checkpoints):
                callback.save = self._watch("saving", callback.save)  # type: ignore[method-assign]
        self.num_begun = 0
        self._note("loading")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note("loading")
        self.begun.append(f"steps {time.time():.3f}")

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._note("backward")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._note("backward")

    def _watch(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._note("backward")
            if name == "validation" and self.first:
                self.num_begun += 1
                (self.folder / f"begun-validation-{self.restart}").write_text(str(self.num_begun))
            try:
                return function(*args, **kwargs)
            finally:
                self._note(name)

        return watched

    def _note(self, name: str) -> None:
        if not self.noted and interruption.received():
            self.noted = name
        if self.noted and self.first and (self.folder / "checkpoints").parent.is_dir():
            (self.folder / f"phase-{self.restart}").write_text(self.noted)
        if self.first and name == "loading":
            (self.folder / f"timeline-{self.restart}").write_text("\n".join(self.begun))
