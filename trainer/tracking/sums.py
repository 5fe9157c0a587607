"""What the steps between two logs add up to: on this rank, and, reduced, over all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.batch import PackedBatch
from trainer.distributed import gather
from trainer.encoder.flops import Arithmetic


@dataclass
class StepSums:
    """Sums over the steps since the last log. Tokens, FLOPs, loss and what losses found are this rank's share of the
    sum over ranks; steps, rows and the norm of the global gradient are the same on every rank."""

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    flops: int = 0
    loss: float | Tensor = 0.0
    grad_norm: float | Tensor = 0.0
    found: dict[str, float | Tensor] = field(default_factory=dict)  # of losses, by name
    found_steps: dict[str, int] = field(default_factory=dict)  # steps whose loss had it

    def add(
        self,
        batch: PackedBatch,
        arithmetic: Sequence[Arithmetic],
        loss: Tensor,
        grad_norm: Tensor | None,
        found: Mapping[str, Tensor],
    ) -> None:
        """A step on this rank.

        Args:
            batch: this rank's part of it.
            arithmetic: of each encoder; none where it is not known.
            loss: of this rank; the mean over ranks is that of the step.
            grad_norm: of the global gradient.
            found: by the loss, besides its value; averaged as that is.
        """
        self.steps += 1
        self.rows += batch.targets.num_global_rows
        self.tokens += batch.num_tokens
        self.padded_tokens += batch.padded_tokens
        if arithmetic and batch.num_rows:
            for one, stream in zip(arithmetic, batch.streams, strict=True):
                self.flops += one.step(stream.lengths)
        # On the device and without reading the value: a read would wait for the step.
        self.loss = self.loss + loss.double() / gather.world_size()
        self.grad_norm = self.grad_norm + (math.nan if grad_norm is None else grad_norm.detach().double())
        for name, value in found.items():
            self.found[name] = self.found.get(name, 0.0) + value.double() / gather.world_size()
            self.found_steps[name] = self.found_steps.get(name, 0) + 1

    def reduce(self, device: torch.device) -> None:
        """Move all shares to rank 0, and read what lies on the device. A collective: every rank must call it."""
        if gather.world_size() > 1:
            # The same names on every rank, for all take a step with the same loss.
            shares = [self.tokens, self.padded_tokens, self.flops, self.loss, *self.found.values()]
            share = torch.zeros(len(shares), dtype=torch.float64, device=device)
            for place, value in enumerate(shares):
                share[place] = value
            tokens, padded_tokens, flops, self.loss, *found = gather.reduce_sum(share).tolist()
            self.tokens, self.padded_tokens, self.flops = int(tokens), int(padded_tokens), int(flops)
            self.found = dict(zip(self.found, found, strict=True))
            self.leave_to_rank_0()
        vars(self).update(self.as_numbers())

    def leave_to_rank_0(self) -> None:
        """Drop this rank's share where rank 0 holds those of all."""
        if gather.rank() != 0:
            self.loss, self.tokens, self.padded_tokens, self.flops = 0.0, 0, 0, 0
            self.found = dict.fromkeys(self.found, 0.0)

    def as_numbers(self) -> dict[str, Any]:
        """Its fields, read from the device."""
        numbers = {name: _number(value) for name, value in vars(self).items() if name != "found"}
        return {**numbers, "found": {name: _number(value) for name, value in self.found.items()}}


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
