"""Pieces of work on two ranks: each is done once, and a rank that is asked to stop stops both."""

from __future__ import annotations

import signal
import time

from tests.two_ranks import TwoRanks
from trainer.distributed import gather
from trainer.distributed.shared_work import SharedWork
from trainer.interruption import Interrupted


def take(num_pieces: int, stop_after: int | None) -> tuple[list[int], object]:
    """The pieces of this rank, and the exit status with which it was stopped; rank 0 is asked to."""
    taken: list[int] = []
    gather.barrier()
    try:
        with SharedWork(num_pieces) as pieces:
            for piece in pieces:
                if gather.rank() == 0 and len(taken) == stop_after:
                    raise Interrupted(signal.SIGUSR1)
                taken.append(piece)
                time.sleep(0.01)
    except Interrupted as stop:
        return taken, stop.code
    return taken, None


def test_each_piece_goes_to_one_rank(two_ranks: TwoRanks) -> None:
    (first, _), (second, _) = two_ranks(take, 60, None)
    assert sorted(first + second) == list(range(60))
    assert first == sorted(first)
    assert first
    assert second, "both have taken part"
    assert take(5, None) == ([0, 1, 2, 3, 4], None), "without a group one rank has it all"


def test_both_stop_with_the_status_of_the_one_that_was_asked(two_ranks: TwoRanks) -> None:
    (first, code), (second, other) = two_ranks(take, 1000, 3)
    assert (code, other) == (85, 85)
    assert len(first) == 3
    assert not set(first) & set(second)
    assert len(first + second) < 990
