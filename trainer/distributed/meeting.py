"""Until the ranks have met: a request to stop, or the end of another rank, ends a process that waits in C++."""

from __future__ import annotations

import math
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.distributed import DistError

from trainer import interruption
from trainer.messages import cause_of

if TYPE_CHECKING:  # a command that trains nothing does without the rest of Lightning
    from lightning.fabric.strategies import Strategy as FabricStrategy
    from lightning.pytorch.strategies import Strategy

# How collectives end when a rank is no longer there, or when the time of the process group is up.
LOST_RANK = re.compile(
    "Connection (closed|reset) by peer|Broken pipe|remote process exited|Failed to recv|Timed out waiting|pair closure|"
    "(Watchdog|NCCL).*(timeout|timed out)"
)
_TICK_S = 0.2
_NOTICE_S = 60.0  # until a wait is told of
_GRACE_S = 5.0  # for the main thread to say by itself that a rank is lost
_SAME_PLACE = "do all ranks run, with the same place, and can each host reach it?"
# In the environment: the process that starts the other ranks of its machine, which inherit it.
_LAUNCHER = "TRAINER_LAUNCHER_PID"


class Meeting:
    """Looks after a rank from the moment it waits for the others until `end`.

    In that wait no signal handler of Python runs, and there are no signs of life yet.

    Args:
        strategy: whose `setup_environment` is the meeting.
        leave: is called before the process ends in here.
    """

    def __init__(self, strategy: Strategy | FabricStrategy, leave: Callable[[], None] = lambda: None) -> None:
        self._strategy, self._leave, self._join = strategy, leave, strategy.setup_environment
        self._children: list[subprocess.Popen[bytes]] = []
        self._launcher = int(os.environ.setdefault(_LAUNCHER, str(os.getpid())))
        self._met, self._over = threading.Event(), threading.Event()
        strategy.setup_environment = self._meet  # type: ignore[method-assign]

    def end(self) -> None:
        """Somebody else looks after the ranks from here on."""
        self._over.set()

    def _meet(self) -> None:
        self._children = list(getattr(self._strategy.launcher, "procs", []))
        silence_observer()
        self._met, self._over = threading.Event(), threading.Event()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer)  # C writes the signal's number there, whatever the main thread does
        if (asked := interruption.received()) is not None:
            self._end_process(interruption.EXIT_CODES[asked])
        threading.Thread(target=self._look, args=(reader, self._met, self._over), name="meeting", daemon=True).start()
        try:
            self._join()
        except DistError as error:
            self._over.set()
            if LOST_RANK.search(str(error)):
                raise
            raise ValueError(f"the ranks did not meet at {_place()}: {cause_of(error)}; {_remedy(error)}") from error
        except BaseException:
            self._over.set()
            raise
        finally:
            self._met.set()
            signal.set_wakeup_fd(before)
            os.close(writer)

    def _look(self, reader: int, met: threading.Event, over: threading.Event) -> None:
        notice_at = time.monotonic() + _NOTICE_S
        while not over.is_set():
            if time.monotonic() > notice_at and not met.is_set():
                notice_at = math.inf
                self._tell_of_wait()
            if met.is_set():
                over.wait(_TICK_S)
            elif select.select([reader], [], [], _TICK_S)[0]:
                for number in os.read(reader, 64):
                    if number in interruption.EXIT_CODES:
                        self._end_process(interruption.EXIT_CODES[signal.Signals(number)])
            self._look_at_children(met, over)
            self._look_at_launcher(over)
        os.close(reader)

    def _tell_of_wait(self) -> None:
        """A rank whose first one is not there, or the first one, which misses others; another waits for the same."""
        strategy: Any = self._strategy  # of several ranks: its base class has no number of them
        rank, host = strategy.global_rank, socket.gethostname()
        if rank == 0:
            text = f"rank 0 on host {host} still waits for others of {strategy.world_size} ranks at {_place()}"
        elif _is_answered():
            return
        else:
            text = f"rank {rank} on host {host} still waits for rank 0: nobody answers at {_place()}"
        print(f"{text} after {_NOTICE_S:g} s; {_SAME_PLACE}", file=sys.stderr, flush=True)

    def _look_at_children(self, met: threading.Event, over: threading.Event) -> None:
        for rank, child in enumerate(self._children, 1):
            code = child.poll()
            if code is None:
                continue
            asked = [status for number, status in interruption.EXIT_CODES.items() if code in (status, -number)]
            if asked and not met.is_set():  # it was asked to stop, and this one was not
                self._end_process(asked[0])
            if code == 0 or asked or over.wait(_GRACE_S):  # those that have met agree on when they leave
                continue
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"has failed with exit code {code}"
            print(f"error: rank {rank} {how} while the ranks started", file=sys.stderr)
            self._end_process(max(code, 1))

    def _look_at_launcher(self, over: threading.Event) -> None:
        rank = os.environ.get("LOCAL_RANK", "0")  # 0: of a command that such a process has called, through a shell
        if rank == "0" or self._launcher in (os.getpid(), os.getppid()) or over.wait(_GRACE_S):
            return
        if rank == "1":  # once
            print(f"error: process {self._launcher} has ended while the ranks that it started met", file=sys.stderr)
        self._end_process(1)

    def _end_process(self, code: int) -> None:
        for child in self._children:
            child.kill()  # it has nothing to save, and would wait for this one
        self._leave()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _place() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} (MASTER_ADDR, MASTER_PORT)"


def _is_answered() -> bool:
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5.0).close()
    except OSError:
        return False
    return True


def _remedy(error: DistError) -> str:
    if "EADDRINUSE" in str(error):
        return "another process has that port: start all ranks with another MASTER_PORT"
    return _SAME_PLACE


def silence_observer() -> None:
    """End Lightning's observer of the ranks that were started from here: within 5 s of the end of one it would kill
    this process without a word."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]  # then it ends
