"""Worker processes: how they start and end, and their work in the order of its items."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from multiprocessing.context import SpawnContext
from typing import TypeVar

from trainer.interruption import shielded, stop_if_asked

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Results of ``function`` in the order of ``items``; at most ``ahead`` items have left their iterator unfinished.

    Raises:
        Interrupted: this process was asked to stop.
    """
    waiting: deque[Future[Result]] = deque()
    for item in items:
        with shielded():  # a process of the pool may start here
            waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
        stop_if_asked()
    while waiting:
        yield waiting.popleft().result()
        stop_if_asked()


def num_cores() -> int:
    """Cores that this process may use: Slurm often gives fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_context() -> SpawnContext:
    """How worker processes start: as new interpreters, never by a fork of this one.

    Torch, gloo and loggers keep threads. A fork while one of them holds CPython's list of threads leaves a child that
    waits for ever before its first line (seen in 1 of 8 starts of two ranks with two workers each). A fork server
    would start faster, but it and its children outlive a parent that is killed.
    """
    return multiprocessing.get_context("spawn")


def end_with(parent: int, worker: int = 0) -> None:
    """Ends this worker process once ``parent`` is gone: a killed parent can't say so, and the queue stays open.

    The number comes from the parent. Who asks for its own parent, as torch's loader does, may ask too late: a process
    takes seconds to start, and a parent that is killed meanwhile has been replaced by init, which lives for ever.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
