"""Requests to stop: noted from the start of the process, acted on where the run can stop without loss.

A signal handler only notes. What happens next is decided at a step boundary that all ranks agree on
(`distributed.preemption`), or, before training, between two pieces of work (`stop_if_asked`).
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# Signal -> exit status. 85 asks whoever started the run to start it again (slurm/train.sh requeues); the others are
# what a shell shows for a process that the signal ended.
EXIT_CODES = {signal.SIGUSR1: 85, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
_received: signal.Signals | None = None
_training = False


class Interrupted(SystemExit):
    """The run ends because it was asked to; `code` is its exit status."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(EXIT_CODES[received])
        self.received = received


def listen() -> None:
    """Note USR1, TERM, INT and HUP from here on; before any heavy import, for a signal may come at once."""
    for number in EXIT_CODES:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # what nohup is for
            signal.signal(number, _note)
    atexit.register(_ignore)


def _ignore() -> None:
    """All is saved, and the exit status is known; while Python shuts down no handler would note a request, and it would
    end the process with a status of its own."""
    for number in EXIT_CODES.keys() - {signal.SIGINT}:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    again = _received == signal.SIGINT
    if _received is None:  # the first one says why: a TERM behind a USR1 is the cluster losing patience
        _received = signal.Signals(number)
    if number == signal.SIGINT:
        if again or not _training:  # someone waits at the keyboard, and there is no step to finish
            raise KeyboardInterrupt
        with suppress(OSError):  # nobody may read it: Ctrl-C ends a `tee` behind this process too
            os.write(2, b"\nstopping after this step and a checkpoint; Ctrl-C once more stops at once\n")


def received() -> signal.Signals | None:
    """The first request that came, None where none did."""
    return _received


def stop_if_asked() -> None:
    """Ends the process where nothing would be lost: before the first step.

    Raises:
        Interrupted: a request came.
    """
    if _received is not None:
        raise Interrupted(_received)


def training(now: bool) -> None:
    """Whether steps are being taken: Ctrl-C then waits for a checkpoint."""
    global _training
    _training = now


@contextmanager
def shielded() -> Iterator[None]:
    """Processes that start in here never see these signals, which Slurm sends to every process of a job.

    The mask is inherited: a loader worker, or a tracker's service, would otherwise die of a USR1 that is not meant
    for it. This process gets what came meanwhile on leaving.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
