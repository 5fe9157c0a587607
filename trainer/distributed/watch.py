"""The watch: a rank that dies, stops or fails ends the run of all, and is named; a run that hangs shows its stacks."""

from __future__ import annotations

import faulthandler
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.distributed import gather
from trainer.distributed.heartbeat import BEAT_S, SILENT_S, Heartbeats
from trainer.distributed.meeting import LOST_RANK, Meeting
from trainer.manifest import newest
from trainer.messages import refuse_not_positive
from trainer.tracking.collapse import Collapse
from trainer.tracking.metrics import MetricsLog
from trainer.tracking.spikes import LossSpikes

SAID = "which rank was lost is said above"  # the note on an exception whose cause the watch has named
_TICK_S = 0.5
_NAMING_S = 10.0  # longest wait for the name of a lost rank
_GRACE_S = 5.0  # for the main thread to notice by itself that a rank is lost
_LEAVING_S = 30.0  # from a failure to the end of the process, whatever its main thread waits for
_CHILDREN_S = 12.0  # more than a beat and the grace: children end by themselves


class Watch(Callback):
    """Ends the run on every rank when one has died or nothing moves any more, and says which rank, where and since
    when. Also warns of jumps of the loss.

    Ranks exchange signs of life through the store of the process group. A failure of a collective is explained by
    them; where this rank waits for something else than a collective, a thread ends the process.

    Args:
        timeout_s: seconds without progress until a run counts as hung; from its first step on. A step, one
            forward of an evaluation, the scoring of one set and a checkpoint must each be faster.
    """

    def __init__(self, timeout_s: float = 300.0) -> None:
        refuse_not_positive("watch.timeout_s", timeout_s)
        self.timeout_s = timeout_s
        self.meeting: Meeting | None = None  # looks after the ranks until then
        self._collapse = Collapse()
        self._beats: Heartbeats | None = None
        self._armed = False
        self._hung = False
        self._leaving_at: float | None = None
        self._stop = threading.Event()
        self._children: list[subprocess.Popen[bytes]] = []
        self._run_dir = Path()

    # -- hooks --------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._run_dir = Path(trainer.default_root_dir)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if stage == "fit" and isinstance(callback, MetricsLog):
                callback.listeners += [LossSpikes(), self._collapse]
        self._children = list(getattr(trainer.strategy.launcher, "procs", []))  # those that Lightning started from here
        if self.meeting is not None:
            self.meeting.end()
        self._armed, self._hung, self._leaving_at = False, False, None
        if gather.world_size() > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._beats = Heartbeats(gather.rank(), gather.world_size(), store.clone)
        self._stop = threading.Event()
        threading.Thread(target=self._watch, args=(self._stop,), name="watch", daemon=True).start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gather.activity.step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        gather.enter("forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        gather.enter("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gather.enter("the optimizer step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        gather.activity.step = trainer.global_step
        gather.enter("work between steps")
        if not self._armed:  # until now ranks may have waited long for one that reads, downloads or compiles
            self._armed = True
            if gather.is_initialized():
                # A little longer than ours: the stacks are to show who waits, not how the wait has ended.
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout_s + 5))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        gather.enter("saving a checkpoint")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._armed = False
        self._stop.set()
        if self._beats:
            self._beats.end("")

    def state_dict(self) -> dict[str, Any]:
        return {"first_health": dict(self._collapse.first)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._collapse.first = dict(state_dict["first_health"])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._beats is None:
            self._stop.set()
            return
        self._leaving_at = time.monotonic()
        if isinstance(exception, (KeyboardInterrupt, SystemExit)):
            self._beats.end("")  # asked for, not a failure
            return
        if isinstance(exception, RuntimeError) and LOST_RANK.search(str(exception)):
            exception.__notes__ = [SAID]  # add_note, as Python 3.10 has none yet
            if not self._hung:
                self._name(self._wait_for_name())
            self._beats.end("")
        else:
            self._beats.end(f"{type(exception).__name__}: {str(exception).strip().partition(os.linesep)[0]}")
        self._end_children()

    # -- the thread ---------------------------------------------------------------------------------------

    def _watch(self, stop: threading.Event) -> None:
        beats, activity = self._beats, gather.activity
        changes, progress_at = activity.changes, time.monotonic()
        tick_at, lost_at = progress_at, None
        while not stop.wait(_TICK_S):
            now = time.monotonic()
            asleep, tick_at = now - tick_at - _TICK_S, now
            if asleep > 1.0:  # stopped, or starved: the silence of the others was ours
                progress_at += asleep
                if beats:
                    beats.forgive(asleep)
            if activity.changes != changes or not self._armed:
                changes, progress_at = activity.changes, now
            if self._leaving_at:
                if now - self._leaving_at > _LEAVING_S:
                    self._end_process()
            elif now - progress_at > self.timeout_s:
                self._end_hung(stop)
            elif beats and (lost := beats.lost(SILENT_S)):
                lost_at = lost_at or now
                if now - lost_at > _GRACE_S:
                    self._name(lost)
                    self._end_process()

    def _end_hung(self, stop: threading.Event) -> None:
        self._hung = True
        silent = self._beats.silent(2 * BEAT_S) if self._beats else {}
        signs = self._beats.signs() if self._beats else []
        others = [f"rank {sign.rank} is in {sign.doing} at step {sign.step}" for sign in signs[:8]]
        path = self._run_dir / f"hang-rank{gather.rank()}.txt"
        where = f"{path.name} holds the stacks of all threads; {self._checkpoint()}"
        text = (
            f"error: rank {gather.rank()} on host {socket.gethostname()} (pid {os.getpid()}): no progress for "
            f"{self.timeout_s:g} s (watch.timeout_s) at step {gather.activity.step}; it waits in {_waiting()}; "
            f"{'; '.join(silent.values() or others or ['there is no other rank'])}. {where}"
        )
        _say(text)
        faulthandler.dump_traceback(file=2)
        _soon(lambda: _write_stacks(path, text))
        stop.wait(_NAMING_S)  # the collective's own timeout lets the main thread out, which closes loggers
        self._end_process()

    def _end_process(self) -> None:
        """The main thread may wait in C++ for ever, so no exception is raised: the process ends here."""
        if self._beats:
            self._beats.end("")
        self._end_children()
        os._exit(1)

    # -- naming -------------------------------------------------------------------------------------------

    def _wait_for_name(self) -> Mapping[int, str]:
        """Which ranks are lost; the process of a dead one may be found at once, another host only falls silent."""
        assert self._beats is not None
        deadline = time.monotonic() + _NAMING_S
        self._beats.refresh()  # a rank that has failed in order has left its reason just now
        while time.monotonic() < deadline:
            if found := self._beats.lost(0.0) or self._beats.silent(SILENT_S):
                return found
            time.sleep(0.1)
        return {}

    def _name(self, lost: Mapping[int, str]) -> None:
        """Say it once: the lowest of the ranks that are left."""
        rank = gather.rank()
        if all(lower in lost for lower in range(rank)):
            names = "; ".join(lost.values()) or "another rank has ended, it is not known which"
            here = f"this rank is at step {gather.activity.step}, in {_waiting()}"
            _say(f"error{f' (rank {rank})' if rank else ''}: {names}; {here}; {self._checkpoint()}")

    def _checkpoint(self) -> str:
        path = _soon(lambda: newest(self._run_dir))
        return f"last checkpoint: {path}, go on from it with --ckpt_path auto" if path else "there is no checkpoint yet"

    # -- the processes that this one started --------------------------------------------------------------

    def _end_children(self) -> None:
        """They end by themselves, except one that is stopped or hangs; SIGKILL ends those too."""
        deadline = time.monotonic() + (0.0 if self._hung else _CHILDREN_S)
        while any(child.poll() is None for child in self._children) and time.monotonic() < deadline:
            time.sleep(0.1)
        for child in self._children:
            child.kill()  # nothing, where it has ended


def _waiting() -> str:
    activity = gather.activity
    if activity.collective:
        return f"{activity.collective} in {activity.phase}"
    if activity.phase == "backward" and gather.world_size() > 1:
        return "gradient all-reduce in backward"
    return activity.phase


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write_stacks(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n\n")
        file.flush()
        faulthandler.dump_traceback(file=file)


def _soon(function: Callable[[], Any]) -> Any:
    """The result within 5 s, else None: a file system that hangs may be what is to be reported."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(5.0)
    return results[0] if results else None
