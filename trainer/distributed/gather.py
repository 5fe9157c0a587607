"""Every collective of ours. Without a process group each function is the identity.

Shape suffixes: b rows of the global batch, B rows of this rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

ObjectT = TypeVar("ObjectT")
Later = Callable[[], list[int]]


class SharedError(ValueError):
    """What all ranks raise together, with the same text: one of them says it."""


@dataclass
class Activity:
    """What this rank does, for whoever watches it.

    Attributes:
        step: optimizer steps taken.
        phase: part of the work.
        collective: the collective of ours that it is in.
        changes: grows with each change of the above; as long as it grows, nothing hangs.
    """

    step: int = 0
    phase: str = "loading"
    collective: str = ""
    changes: int = 0


activity = Activity()


def enter(phase: str) -> None:
    """Note what this rank does from now on."""
    activity.phase = phase
    activity.changes += 1


@contextmanager
def _collective(name: str) -> Iterator[None]:
    """Note the collective that this rank waits in."""
    activity.collective = name
    activity.changes += 1
    try:
        yield
    finally:
        activity.collective = ""
        activity.changes += 1


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if is_initialized() else 1


def _all_gather_rows(x_B: Tensor, rows_per_rank: Sequence[int]) -> list[Tensor]:
    """Rows of every rank, in rank order; ranks may hold different numbers of rows, so they are padded and cut."""
    most = max(rows_per_rank)
    padded = x_B.new_zeros((most, *x_B.shape[1:]))
    padded[: x_B.shape[0]] = x_B
    parts = [torch.empty_like(padded) for _ in rows_per_rank]
    with _collective("gather of rows"):
        dist.all_gather(parts, padded)
    return [part[:n] for part, n in zip(parts, rows_per_rank, strict=True)]


class _GatherRows(torch.autograd.Function):
    """Forward all-gather, backward reduce-scatter with SUM.

    Rank r's rows enter the loss L_s of every rank s, so their gradient is the sum over s of dL_s/dx_r. With the
    mean over ranks that the strategy takes of parameter gradients this is exactly the gradient of mean_s L_s,
    which is what one process computes on the global batch.
    """

    @staticmethod
    def forward(ctx: Any, x_B: Tensor, rows_per_rank: tuple[int, ...]) -> Tensor:
        ctx.rows_per_rank = rows_per_rank
        return torch.cat(_all_gather_rows(x_B.contiguous(), rows_per_rank))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may hand the same tensor to other functions, and the all-reduce writes into it.
        grad_b = grads[0].clone(memory_format=torch.contiguous_format)
        # All-reduce and cut is reduce-scatter for ragged rows, and gloo has no reduce-scatter of its own.
        # The gradient is (b, D): small beside the parameters.
        with _collective("sum of the gradients of gathered rows"):
            dist.all_reduce(grad_b, op=dist.ReduceOp.SUM)
        start = sum(ctx.rows_per_rank[: rank()])
        return grad_b[start : start + ctx.rows_per_rank[rank()]], None


def gather_rows(x_B: Tensor, rows_per_rank: Sequence[int]) -> Tensor:
    """Rows of all ranks in rank order, (B, ...) -> (b, ...), with the exact gradient.

    Args:
        x_B: this rank's rows, ``rows_per_rank[rank]`` of them (may be 0).
        rows_per_rank: rows of every rank; one entry means one process, and x_B is returned as it is.
    """
    if len(rows_per_rank) == 1:
        return x_B
    assert len(rows_per_rank) == world_size(), (rows_per_rank, world_size())
    assert x_B.shape[0] == rows_per_rank[rank()], (x_B.shape, rows_per_rank)
    if x_B.requires_grad:
        return _GatherRows.apply(x_B, tuple(rows_per_rank))
    return torch.cat(_all_gather_rows(x_B, rows_per_rank))


def gather_columns(columns_BD: Sequence[Tensor], rows_per_rank: Sequence[int]) -> list[Tensor]:
    """``gather_rows`` of several tensors of one width in one collective, (B, D) -> (b, D) each."""
    if len(rows_per_rank) == 1 or len(columns_BD) == 1:
        return [gather_rows(column, rows_per_rank) for column in columns_BD]
    width = columns_BD[0].shape[1]
    return list(gather_rows(torch.cat(list(columns_BD), dim=1), rows_per_rank).split(width, dim=1))


def reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, no gradient; x is not changed."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    with _collective("sum over ranks"):
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def start_max(values: Sequence[int], device: torch.device) -> Later:
    """Start a maximum over ranks of each value and go on; the answer is read by calling what is returned."""
    largest = torch.tensor(list(values), dtype=torch.int64, device=device)
    work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, async_op=True) if world_size() > 1 else None

    def read() -> list[int]:
        if work is not None:
            with _collective("maximum over ranks"):
                work.wait()
        return [int(value) for value in largest.tolist()]

    return read


def broadcast_object(obj: ObjectT) -> ObjectT:
    """Rank 0's object on every rank."""
    if world_size() == 1:
        return obj
    box = [obj]
    with _collective("broadcast from rank 0"):
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(obj: ObjectT) -> list[ObjectT]:
    """The objects of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [obj]
    boxes: list[Any] = [None] * world_size()
    with _collective("gather of objects"):
        dist.all_gather_object(boxes, obj)
    return boxes


def barrier() -> None:
    if world_size() > 1:
        with _collective("barrier"):
            dist.barrier()


def warn(logger: logging.Logger, message: str) -> None:
    """Log a warning once, not once per rank."""
    if rank() == 0:
        logger.warning(message)
