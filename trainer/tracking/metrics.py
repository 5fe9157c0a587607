"""The metrics of a run: means over the steps between two logs, for metrics.jsonl and the loggers."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.batch import PackedBatch
from trainer.distributed import gather
from trainer.encoder.flops import Arithmetic, count_arithmetic
from trainer.encoder.size import UNCOUNTED
from trainer.files import write_whole
from trainer.manifest import read_state
from trainer.tracking.about import names_of_sources, peak_memory, write_about
from trainer.tracking.runs import METRICS_FILE, read_row
from trainer.tracking.sums import StepSums
from trainer.tracking.wandb import RunLogger

logger = logging.getLogger(__name__)

Listener = Callable[[Mapping[str, float], int], None]


class MetricsLog(Callback):
    """Writes one JSON object per log to `metrics.jsonl` in the run directory, and the same to the loggers.

    Every `trainer.log_every_n_steps` steps, and at the end of training:

    - `step`: optimizer steps taken.
    - `train/loss`: mean over ranks, and over the steps since the last log.
    - `train/lr`: learning rate of the step.
    - `train/grad_norm`: norm of the global gradient before clipping, mean over the same steps.
    - `train/rows_seen`, `train/tokens_seen`: sums over ranks since the start of the run, kept over restarts.
    - `train/rows_per_s`, `train/tokens_per_s`: over all ranks, by the clock since the last log, without the
      time spent inside `paused()` (evaluation, checkpoints).
    - `train/padding_efficiency`: tokens of the texts divided by the tokens a padded forward would take in
      which each rank pads each column of its rows to the longest text of that column. 1 means that padding
      would have cost nothing; our own forward is packed and pays for the tokens only.
    - `train/flops_per_s`: arithmetic of forward and backward of the texts (linear layers and attention, see
      `trainer.encoder.flops`) over all ranks, by the same clock; padding and second forwards of chunks do not count.
      Not for a backbone whose config has other names for its sizes.
    - `train/data_wait`: share of the same time in which rank 0's process waited for its loader. 0.02 is nothing to
      worry about; near 1, the loader is what bounds the run: raise data.num_workers.
    - `train/wall_s`, `train/gpu_hours`: seconds since the first step, evaluation and checkpoints included, and the
      same times the devices (on CPUs the processes), both kept over restarts. What a kill took back is not in them.
    - `train/host_peak_gib`, `train/device_peak_gib` (CUDA only): most memory that rank 0 has held so far.
    - `train/loss/<source>`: with several sources, the loss over the steps of one of them.
    - what a loss finds besides its value, over the steps of that loss: `train/false_negative_rate`, the share of
      candidates that are left out because they are right.

    Rows of evaluations carry `position()`, so that every metric has the same axes. A value that is not finite is null
    in the file. Ranks and device are synchronised once per log and once
    per checkpoint, on no other step. Place it before callbacks that evaluate or save.

    Attributes:
        listeners: called on rank 0 with every logged row and its step.
    """

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self.rows_seen = 0
        self.tokens_seen = 0
        self._sums = StepSums()
        self._restored = StepSums()  # steps that another process took: their time is not on our clock
        self._lr = math.nan
        self._since = 0.0
        self._paused = 0.0
        self._waited = 0.0
        self._arithmetic: list[Arithmetic] = []  # of each encoder
        self._wall_s = 0.0
        self._gpu_hours = 0.0
        self._ticked: float | None = None
        self._sources: list[str] = []  # none where there is one
        self._unwritten: list[str] = []  # lines that the disk did not take
        self._trainer: Trainer | None = None

    # -- for other callbacks ------------------------------------------------------------------------------

    def record(self, metrics: Mapping[str, float], step: int, histograms: Mapping[str, Sequence[int]] = {}) -> None:
        """Write one row; call it on all ranks or on rank 0. (`log` is a name Lightning sets on callbacks.)

        Args:
            histograms: counts in equal bins from -1 to 1; they go into the file and to W&B.
        """
        trainer = self._trainer
        assert trainer is not None, "record() before setup()"
        if not trainer.is_global_zero:
            return
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._unwritten.append(json.dumps({"step": step, **row, **histograms}) + "\n")
        self._append_rows(_path(trainer))
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_metrics(dict(metrics), step, histograms)
            else:
                logger.log_metrics(dict(metrics), step=step)
            logger.save()
        for listener in self.listeners:
            listener(metrics, step)

    def position(self) -> dict[str, float]:
        """Where the run is on the axes that runs are compared on: rows, tokens, seconds, device hours. A collective:
        every rank must call it."""
        self._reduce()
        self._tick()
        return {
            "train/rows_seen": self.rows_seen + self._sums.rows,
            "train/tokens_seen": self.tokens_seen + self._sums.tokens,
            "train/wall_s": self._wall_s,
            "train/gpu_hours": self._gpu_hours,
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here does not count as training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    # -- hooks --------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            drop_rows_after(_path(trainer), trainer.global_step)
            about = write_about(trainer)
            for logger in trainer.loggers:
                if isinstance(logger, RunLogger):
                    logger.log_about(about)
        self._sources = names_of_sources(trainer)
        try:
            self._arithmetic = [count_arithmetic(spec) for spec in pl_module.encoder_specs]  # type: ignore
        except UNCOUNTED:
            self._arithmetic = []
        self._start_clock(trainer)
        self._ticked = self._since

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Before the step: when it ends, the scheduler has moved on to the rate of the next one.
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        loss, found = outputs["loss"].detach(), dict(getattr(pl_module, "last_metrics", {}))
        if self._sources:
            found[f"loss/{self._sources[batch.source]}"] = loss
        self._sums.add(batch, self._arithmetic, loss, getattr(pl_module, "last_grad_norm", None), found)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_last = trainer.global_step == getattr(pl_module, "num_training_steps", None)
        if every and (trainer.global_step % every == 0 or is_last):
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that stops early; the planned last step was logged in its own hook, before its checkpoint.
        if self._sums.steps and trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Counters and the sums of the steps since the last log. A collective: every rank must call it, which
        Lightning does when it saves."""
        self._reduce()
        self._tick()
        # W&B's alone: other loggers number the runs of this machine, and W&B would take two of them for one.
        runs = [logger for logger in self._trainer.loggers if isinstance(logger, RunLogger)] if self._trainer else []
        return {
            "rows_seen": self.rows_seen,
            "tokens_seen": self.tokens_seen,
            "wall_s": self._wall_s,
            "gpu_hours": self._gpu_hours,
            "sums": self._sums.as_numbers(),
            "run_id": str(runs[0].version) if runs else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows_seen, self.tokens_seen = state_dict["rows_seen"], state_dict["tokens_seen"]
        self._wall_s, self._gpu_hours = state_dict["wall_s"], state_dict["gpu_hours"]
        self._restored = StepSums(**state_dict["sums"])
        self._sums = StepSums(**state_dict["sums"])
        self._sums.leave_to_rank_0()

    # -- inside -------------------------------------------------------------------------------------------

    def _append_rows(self, path: Path) -> None:
        """Rows that the disk does not take wait for the next log: a checkpoint may have room by then, or elsewhere."""
        waited = len(self._unwritten) - 1
        size = path.stat().st_size if path.exists() else 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(self._unwritten)
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)  # or a row would stand behind the half of another
            if not waited:
                logger.warning(
                    "%s can't be written (%s): the run goes on, and its rows wait until they can be; make room before "
                    "the next checkpoint, which needs some too",
                    path,
                    error.strerror,
                )
            return
        if waited:
            logger.warning("%s: %d rows that had waited are written", path, waited)
        self._unwritten.clear()

    def _start_clock(self, trainer: Trainer) -> None:
        self._since, self._paused = time.perf_counter(), 0.0
        self._waited = _seconds_waited(trainer)

    def _tick(self) -> None:
        if self._ticked is not None:  # None: no step was taken yet
            now = time.perf_counter()
            self._wall_s += now - self._ticked
            self._gpu_hours += (now - self._ticked) * gather.world_size() / 3600
            self._ticked = now

    def _reduce(self) -> None:
        """Move all shares to rank 0. A run that saves goes on with the same sums as one that resumes."""
        self._sums.reduce(self._trainer.strategy.root_device if self._trainer else torch.device("cpu"))

    def _write(self, trainer: Trainer) -> None:
        position = self.position()
        sums, restored = self._sums, self._restored
        self.rows_seen += sums.rows
        self.tokens_seen += sums.tokens
        seconds = time.perf_counter() - self._since - self._paused
        efficiency = sums.tokens / sums.padded_tokens if sums.padded_tokens else math.nan
        self.record(
            {
                "train/loss": float(sums.loss) / sums.steps,
                "train/lr": self._lr,
                "train/grad_norm": float(sums.grad_norm) / sums.steps,
                **position,
                "train/rows_per_s": (sums.rows - restored.rows) / seconds,
                "train/tokens_per_s": (sums.tokens - restored.tokens) / seconds,
                "train/padding_efficiency": efficiency,
                **({"train/flops_per_s": (sums.flops - restored.flops) / seconds} if self._arithmetic else {}),
                "train/data_wait": (_seconds_waited(trainer) - self._waited) / seconds,
                **peak_memory(trainer.strategy.root_device),
                **{f"train/{name}": float(total) / sums.found_steps[name] for name, total in sums.found.items()},
            },
            trainer.global_step,
        )
        self._sums, self._restored = StepSums(), StepSums()
        self._start_clock(trainer)


def _seconds_waited(trainer: Trainer) -> float:
    return getattr(trainer.train_dataloader, "seconds_waited", math.nan)


def _path(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / METRICS_FILE


def run_id_in(checkpoint: Path) -> str | None:
    """The tracker's id of the run that wrote a checkpoint."""
    content = read_state(checkpoint, mmap=True)
    run_id: str | None = content.get("callbacks", {}).get(MetricsLog.__name__, {}).get("run_id")
    return run_id


def drop_rows_after(path: Path, step: int) -> None:
    """Remove what a run wrote after `step`, from where it now goes on, and what is damaged; at step 0 everything.
    Atomic."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True) if step > 0 else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # a kill may have cut it
    rows = [read_row(line) for line in lines]
    if damaged := [str(number) for number, row in enumerate(rows, 1) if row is None]:
        logger.warning("%s: damaged, and left out: line %s", path, ", ".join(damaged))
    kept = [line for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= step]
    write_whole(path, b"".join(kept).decode())
