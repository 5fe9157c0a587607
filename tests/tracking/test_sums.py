"""Sums over steps, on two ranks against one process that takes the same global batches."""

from __future__ import annotations

from typing import Any

import torch

from tests.batches import build_batch
from tests.two_ranks import TwoRanks
from trainer.distributed import gather
from trainer.tracking.sums import StepSums

STEPS = [[[5, 6], [7], [8, 9], [4]], [[5], [6, 7, 8]], [[9]]]  # the last is one row, so rank 1 has none


def add_and_reduce(times: int = 1) -> dict[str, Any]:
    """All steps, and shares that are moved to rank 0 behind each of them, ``times`` in turn, and by a restart."""
    sums = StepSums()
    for texts in STEPS:
        batch = build_batch([texts], world_size=gather.world_size(), rank=gather.rank())
        share = batch.num_rows * gather.world_size() / len(texts)  # the mean over ranks is 1
        loss = torch.tensor(share)
        found = {"rate": loss} if len(texts) > 1 else {}
        sums.add(batch, [], loss, torch.tensor(2.0), found)
        for _ in range(times):
            sums.reduce(torch.device("cpu"))
            sums = StepSums(**gather.broadcast_object(sums.as_numbers()))
            sums.leave_to_rank_0()
    sums.reduce(torch.device("cpu"))
    return sums.as_numbers()


def test_shares_move_to_rank_0_once(two_ranks: TwoRanks) -> None:
    alone = add_and_reduce()
    assert (alone["steps"], alone["rows"], alone["tokens"]) == (3, 7, 11)
    assert (alone["loss"], alone["grad_norm"]) == (3.0, 6.0)
    assert (alone["found"], alone["found_steps"]) == ({"rate": 2.0}, {"rate": 2})
    for times in (0, 1, 2):
        first, other = two_ranks(add_and_reduce, times)
        del first["padded_tokens"]  # a rank pads its own rows
        assert first.items() <= alone.items()
        shares = {"tokens": 0, "padded_tokens": 0, "loss": 0.0, "found": {"rate": 0.0}}
        assert other == {**alone, **shares}
