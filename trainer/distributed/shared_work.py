"""Work that is shared out while it is done: whoever is free takes the next piece, and all stop together."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from types import TracebackType

import torch.distributed as dist

from trainer import interruption
from trainer.distributed import gather

# More than any work has pieces: behind it there is no more for anybody.
_END = 1 << 40
_names = itertools.count()


class SharedWork:
    """Numbers 0 to ``num_pieces`` - 1, each for one rank only; all ranks enter and leave together.

    The count lives in the store in which the process group has met, so that no rank waits for another before the end.
    A rank that is asked to stop leaves at once; the others finish what they have begun, and stop like it::

        with SharedWork(8) as pieces:
            for piece in pieces:
                ...
    """

    def __init__(self, num_pieces: int) -> None:
        self.num_pieces = num_pieces
        self._name = f"pieces-{next(_names)}"  # the same on all ranks, which share out the same work in the same order
        self._taken = 0

    def __enter__(self) -> SharedWork:
        return self

    def __iter__(self) -> Iterator[int]:
        while (piece := self._add(1) - 1) < self.num_pieces:
            yield piece

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for all ranks.

        Raises:
            Interrupted: one of them was asked to stop.
        """
        stop: signal.Signals | None = None
        if isinstance(error, interruption.Interrupted):
            self._add(_END)
            stop = error.received
        elif error is not None:
            return
        if asked := [one for one in gather.gather_objects(stop) if one is not None]:
            raise interruption.Interrupted(asked[0])

    def _add(self, amount: int) -> int:
        if gather.is_initialized():
            return dist.distributed_c10d._get_default_store().add(self._name, amount)
        self._taken += amount
        return self._taken
