"""Callbacks for tests: end the process as SIGKILL does at a chosen step, wait there for a signal, note all rows."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class KillAt(Callback):
    """Kills this rank when ``step`` optimizer steps are done and the next batch is at hand."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class WaitAt(Callback):
    """Says that it has come to a step by a file in the run directory, and takes two seconds there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            Path(trainer.default_root_dir, "waiting").touch()
            deadline = time.monotonic() + 2.0
            while time.monotonic() < deadline:  # in pieces: a handler runs between two of them
                time.sleep(0.05)


class NoteRows(Callback):
    """Writes the rows of each step of this rank into the run directory, before it is taken."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        line = json.dumps([trainer.global_step, batch.targets.row_ids_B.tolist()])
        with Path(trainer.default_root_dir, f"rows-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(line + "\n")
