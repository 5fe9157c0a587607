"""A callback for tests that lets one rank fail at a chosen step, in a chosen way."""

import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class FaultAt(Callback):
    """When ``step`` optimizer steps are done and the next batch is at hand, on rank ``rank``:

    - kill, stop: the process gets SIGKILL or SIGSTOP; kill-launcher: rank 0 gets SIGKILL.
    - raise, mend: an error of the program, and one that the user can mend.
    - wait: nothing happens any more, outside of any collective.
    - nan: the loss of this one step is NaN.
    - memory: 16 MB more are to be had, and not one byte more; early-memory: before the first evaluation already.
    """

    def __init__(
        self,
        step: int,
        how: Literal["kill", "stop", "kill-launcher", "raise", "mend", "wait", "nan", "memory", "early-memory"],
        rank: int = 1,
    ) -> None:
        self.step, self.how, self.rank = step, how, rank

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.how == "early-memory":
            _leave_little_memory()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.step or trainer.global_rank != self.rank:
            return
        (Path(trainer.default_root_dir) / "fault").touch()
        if self.how in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if self.how == "kill" else signal.SIGSTOP)
        elif self.how == "kill-launcher":
            os.kill(os.getppid(), signal.SIGKILL)
            threading.Event().wait()
        elif self.how == "raise":
            raise KeyError("a bug on this rank")
        elif self.how == "mend":
            raise ValueError("a row on this rank is bad")
        elif self.how == "memory":
            _leave_little_memory()
        elif self.how == "wait":
            threading.Event().wait()
        else:
            loss: Any = pl_module.loss
            forward = loss.forward
            loss.forward = lambda *args: forward(*args) * torch.nan

            def restore() -> None:
                loss.forward = forward

            self.restore = restore

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if hasattr(self, "restore"):
            self.restore()


def _leave_little_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 16 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
