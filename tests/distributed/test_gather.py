"""Collectives on two ranks against the same computation in one process.

Shape suffixes: b rows of the global batch, B rows of this rank, D embedding.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.two_ranks import RankError, TwoRanks
from trainer.distributed import gather

SPLITS = [(3, 3), (3, 2), (1, 0), (0, 2)]
D = 4


def _rows(split: tuple[int, ...]) -> Tensor:
    return torch.randn(sum(split), D, generator=torch.Generator().manual_seed(1))


def _mine(x_b: Tensor, split: tuple[int, ...]) -> Tensor:
    return x_b.split(list(split))[gather.rank()].clone()


def _term(rank: int, gathered_bD: Tensor, own_BD: Tensor) -> Tensor:
    """A loss of one rank, another function on each, of all rows and of its own."""
    weights = torch.linspace(-1.0, 2.0, gathered_bD.numel()).view_as(gathered_bD) * (rank + 1)
    return (weights * gathered_bD.pow(3)).sum() + (own_BD @ gathered_bD.T).sin().sum()


def gathered_gradient(split: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    mine = _mine(_rows(split), split).requires_grad_()
    whole = gather.gather_rows(mine, split)
    _term(gather.rank(), whole, mine).backward()
    assert mine.grad is not None
    return whole.detach(), mine.grad


@pytest.mark.parametrize("split", SPLITS)
def test_gather_rows_has_the_exact_gradient(two_ranks: TwoRanks, split: tuple[int, ...]) -> None:
    """Rank r's gradient is that of the sum of all ranks' losses; the strategy's mean makes it their mean's."""
    rows = _rows(split).requires_grad_()
    own = rows.split(list(split))
    sum(_term(rank, rows, own[rank]) for rank in range(2)).backward()  # type: ignore[union-attr]
    results = two_ranks(gathered_gradient, split)
    for whole, _ in results:
        assert torch.equal(whole, rows.detach())
    assert rows.grad is not None
    assert_close(torch.cat([gradient for _, gradient in results]), rows.grad, rtol=1e-6, atol=1e-6)


def gradient_of_a_sum_of_two_gathers(split: tuple[int, ...]) -> Tensor:
    mine = _mine(_rows(split), split).requires_grad_()
    # Autograd hands one and the same gradient tensor to both.
    total = gather.gather_rows(mine, split) + gather.gather_rows(mine * 2.0, split)
    torch.nn.functional.mse_loss(total, torch.ones_like(total)).backward()
    assert mine.grad is not None
    return mine.grad


def test_a_gradient_shared_by_two_gathers_is_summed_once_each(two_ranks: TwoRanks) -> None:
    split = (3, 3)
    rows = _rows(split).requires_grad_()
    total = rows + 2.0 * rows
    (2.0 * torch.nn.functional.mse_loss(total, torch.ones_like(total))).backward()
    assert rows.grad is not None
    assert_close(torch.cat(two_ranks(gradient_of_a_sum_of_two_gathers, split)), rows.grad)


def gathered_plain(split: tuple[int, ...]) -> dict[str, Any]:
    labels = torch.arange(sum(split)) * 7
    scores = torch.arange(sum(split)) / 3.0
    with torch.no_grad():
        embeddings = gather.gather_rows(_mine(_rows(split), split).requires_grad_(), split)
    return {
        "labels": gather.gather_rows(_mine(labels, split), split),
        "scores": gather.gather_rows(_mine(scores, split), split),
        "no_grad": embeddings,
    }


@pytest.mark.parametrize("split", SPLITS)
def test_labels_and_scores_keep_rank_order(two_ranks: TwoRanks, split: tuple[int, ...]) -> None:
    labels = torch.arange(sum(split)) * 7
    for result in two_ranks(gathered_plain, split):
        assert torch.equal(result["labels"], labels)
        assert result["labels"].dtype == torch.int64
        assert torch.equal(result["scores"], torch.arange(sum(split)) / 3.0)
        assert torch.equal(result["no_grad"], _rows(split))
        assert not result["no_grad"].requires_grad


def other_collectives() -> dict[str, Any]:
    rank = gather.rank()
    mine = torch.full((2,), float(rank + 1))
    total = gather.reduce_sum(mine)
    scalar = gather.reduce_sum(torch.tensor(rank + 1, dtype=torch.float64))
    gather.barrier()
    return {
        "place": (rank, gather.world_size()),
        "total": total,
        "unchanged": mine,
        "scalar": scalar,
        "broadcast": gather.broadcast_object({"from": rank}),
        "objects": gather.gather_objects(["a"] * (rank + 1)),
    }


def test_reduce_broadcast_and_objects(two_ranks: TwoRanks) -> None:
    for rank, result in enumerate(two_ranks(other_collectives)):
        assert result["place"] == (rank, 2)
        assert result["total"].tolist() == [3.0, 3.0]
        assert result["unchanged"].tolist() == [rank + 1.0] * 2
        assert result["scalar"].shape == ()
        assert result["scalar"].item() == 3.0
        assert result["broadcast"] == {"from": 0}
        assert result["objects"] == [["a"], ["a", "a"]]


def test_without_a_group_everything_is_the_identity() -> None:
    x = torch.randn(3, D, requires_grad=True)
    assert gather.gather_rows(x, (3,)) is x
    assert gather.reduce_sum(x) is x
    assert gather.broadcast_object("it") == "it"
    assert gather.gather_objects("it") == ["it"]
    assert (gather.rank(), gather.world_size()) == (0, 1)
    gather.barrier()


# -- the fixture itself: its ranks are killed here, so it starts its own pair, which imports torch alone -----


def fail_on_rank_1() -> None:
    if gather.rank() == 1:
        raise ValueError("a number to find: 4711")
    gather.barrier()  # never ends


def die_on_rank_0() -> None:
    if gather.rank() == 0:
        os._exit(3)


def test_two_ranks_reports_failures_and_starts_again() -> None:
    ranks = TwoRanks()
    try:
        with pytest.raises(RankError) as failure:
            ranks(fail_on_rank_1)
        assert "in fail_on_rank_1" in str(failure.value)
        assert "rank 1: " in str(failure.value)
        assert "a number to find: 4711" in str(failure.value)
        assert "ranks [0] gave no answer" in str(failure.value)
        with pytest.raises(RankError, match="rank 0: died with exit code 3"):
            ranks(die_on_rank_0)
    finally:
        ranks.stop()
