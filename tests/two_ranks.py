"""Two processes with a gloo group that stay alive and run the functions that tests ship to them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

WORLD_SIZE = 2
_GRACE_S = 3.0  # after one rank has failed the other may wait in a collective for ever


class RankError(AssertionError):
    """A shipped function raised, or its process died or hung; carries the remote traceback."""


def message_of(function: Callable[..., Any], *args: Any) -> str:
    """What the function refuses with, for a rank that is to live on; empty where it returns."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


class TwoRanks:
    """Call it with a function of a test module and its arguments; both ranks run it inside one process group.

    The function is pickled by reference, so it stands at module level. The results come back in rank order.
    After a failure both processes are killed, and the next call starts fresh ones.
    """

    def __init__(self) -> None:
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        if not self._processes:
            self._start()
        message = pickle.dumps((function, args))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        results: list[Any] = [None] * WORLD_SIZE
        failures: list[str] = []
        waiting = dict(zip(self._pipes, range(WORLD_SIZE), strict=True))
        deadline = time.monotonic() + timeout_s
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.append(f"ranks {sorted(waiting.values())} gave no answer")
                break
            for pipe in [ours for ours in self._pipes if ours in ready]:
                rank = waiting.pop(pipe)
                try:
                    done, results[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._processes[rank].join(_GRACE_S)
                    done, results[rank] = False, f"died with exit code {self._processes[rank].exitcode}"
                if not done:
                    failures.append(f"rank {rank}: {results[rank]}")
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            self.stop()
            raise RankError("\n".join(failures))
        return results

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        context = multiprocessing.get_context("spawn")
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a dead rank closes the pipe
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        """Kill both processes; a later call starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()


def _serve(rank: int, store: str, pipe: Connection) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, WORLD_SIZE),
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=100),
    )
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, args = pickle.loads(message)
            answer = pickle.dumps((True, function(*args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
