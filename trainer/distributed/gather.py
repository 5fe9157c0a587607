"""Every collective of ours. Without a process group each function is the identity.

Shape suffixes: b rows of the global batch, B rows of this rank.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

ObjectT = TypeVar("ObjectT")


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


def gather_ragged(x_B: Tensor) -> Tensor:
    """Rows of all ranks in rank order, no gradient, any number of rows per rank (0 included)."""
    if world_size() == 1:
        return x_B
    count = torch.tensor([x_B.shape[0]], device=x_B.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    with torch.no_grad():
        return torch.cat(_all_gather_rows(x_B, [int(c) for c in counts]))


def reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, no gradient; x is not changed."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def reduce_max(number: int, device: torch.device) -> int:
    """Largest number of all ranks; device is where the group's tensors live."""
    if world_size() == 1:
        return number
    most = torch.tensor(number, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def broadcast_object(obj: ObjectT) -> ObjectT:
    """Rank 0's object on every rank."""
    if world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(obj: ObjectT) -> list[ObjectT]:
    """The objects of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [obj]
    boxes: list[Any] = [None] * world_size()
    dist.all_gather_object(boxes, obj)
    return boxes


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def warn(logger: logging.Logger, message: str) -> None:
    """Log a warning once, not once per rank."""
    if rank() == 0:
        logger.warning(message)
