"""Ending a fit that was asked to stop: all ranks at the same step, with a checkpoint, and nothing lost."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from trainer import interruption
from trainer.checkpoint import Checkpoints
from trainer.distributed import gather
from trainer.interruption import EXIT_CODES, Interrupted

_ROUND_S = 0.5  # between two rounds of asking all ranks
_MAX_STEPS = 1000
_SIGNALS = list(EXIT_CODES)  # a rank sends the place of its signal in here, plus one; 0 is none


class Preemption(Checkpoint):  # Lightning runs callbacks of this kind last: behind `Checkpoints`
    """Saves and leaves with status 85, 143, 130 or 129 when any rank got USR1, TERM, INT or HUP.

    The ranks agree every k steps, about twice a second: a maximum over ranks is started at one round and read at the
    next, when it has long been there, so no step waits for it. k itself comes out of the same reduction, as the fewest
    steps that any rank makes in that time. One process alone looks after every step.
    """

    def __init__(self) -> None:
        self._read: gather.Later | None = None
        self._next = 0
        self._since = (0.0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        interruption.training(True)
        if gather.world_size() > 1:
            self._since = (time.perf_counter(), trainer.global_step)
            self._ask(trainer, 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step < self._next or step == pl_module.num_training_steps:  # the last step ends the run anyway
            return
        if self._read is None:
            if (received := interruption.received()) is not None:
                self._stop(trainer, Interrupted(received))
            return
        place, minus_steps = self._read()
        if place > 0:
            self._stop(trainer, Interrupted(_SIGNALS[place - 1]))
        self._ask(trainer, -minus_steps)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        interruption.training(False)
        if self._read is not None:
            self._read()  # or it is still under way when the process group ends
            self._read = None

    def _ask(self, trainer: Trainer, steps: int) -> None:
        """Start a round; it is read ``steps`` steps from now."""
        now, step = time.perf_counter(), trainer.global_step
        taken, seconds = step - self._since[1], now - self._since[0]
        self._since = (now, step)
        wanted = min(_MAX_STEPS, max(1, int(_ROUND_S * taken / seconds)))
        received = interruption.received()
        place = 0 if received is None else _SIGNALS.index(received) + 1
        self._read = gather.start_max([place, -wanted], trainer.strategy.root_device)
        self._next = step + steps

    def _stop(self, trainer: Trainer, stop: Interrupted) -> None:
        interruption.training(False)
        self._read = None
        checkpoints = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]
        folder = checkpoints.save(trainer)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if hasattr(logger, "interrupt"):
                    logger.interrupt(int(stop.code or 1))
            print(
                f"\nstopped by {stop.received.name} at step {trainer.global_step}: {folder} (exit {stop.code})",
                flush=True,
            )
        gather.barrier()  # the first rank to leave makes Slurm end the others
        raise stop
