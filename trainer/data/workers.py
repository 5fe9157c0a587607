"""Work of a pool in the order of its items, with a bounded number of them under way."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
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
