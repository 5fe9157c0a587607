"""Bytes that a rank hands to collectives: DDP's gradient buckets, and what else goes through torch.distributed."""

# No "from __future__ import annotations": DDP looks at the types of a hook.
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

# A collective -> where its larger tensor, or list of them, stands among its arguments.
_COLLECTIVES = {
    "all_reduce": 0,
    "all_gather": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter_tensor": 1,
    "broadcast": 0,
    "all_to_all_single": 0,
}


class Traffic:
    """Counts from the first step on.

    Attributes:
        gradient: bytes of DDP's buckets.
        all: bytes of every collective, those included.
    """

    def __init__(self) -> None:
        self.gradient = self.all = 0
        for name, place in _COLLECTIVES.items():
            setattr(dist, name, self._counted(getattr(dist, name), place))

    def _counted(self, function: Callable[..., Any], place: int) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            largest = args[place] if len(args) > place else next(iter(kwargs.values()))
            tensors = [largest] if isinstance(largest, Tensor) else largest
            self.all += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return function(*args, **kwargs)

        return counted

    def watch(self, model: nn.Module) -> None:
        """Send the buckets of ``model`` through a function of Python, which does what DDP does without one."""
        wrapped = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        assert len(wrapped) == 1, f"{len(wrapped)} DDP modules in {type(model).__name__}"
        wrapped[0].register_comm_hook(None, self._reduce)
        self.gradient = self.all = 0

    def _reduce(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.gradient += bucket.buffer().numel() * bucket.buffer().element_size()
        return allreduce_hook(dist.group.WORLD, bucket)


def as_rank(rank: int, ranks: int, port: int) -> None:
    """Set what torchrun sets; both sides read it."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in values.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="benchmark")
    if sys.platform == "linux" and not torch.cuda.is_available():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
