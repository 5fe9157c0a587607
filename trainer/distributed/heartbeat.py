"""Signs of life: each rank tells the others, through the store of the process group, that it lives and where it is."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from trainer.distributed import gather

BEAT_S = 2.0
SILENT_S = 6.0  # three missed beats
_FIRST_BEATS_S = 0.2  # until every rank has been heard of


@dataclass(frozen=True)
class Sign:
    """What one rank last said of itself.

    Attributes:
        beat: number of the sign; a new one means that the rank lives.
        end: None while it works; then why it ended, empty where it is not to blame.
    """

    rank: int
    host: str
    pid: int
    step: int
    doing: str
    beat: int
    end: str | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host} (pid {self.pid})"


class Heartbeats:
    """Sends this rank's sign every BEAT_S and keeps the last sign of every other rank, in a thread of its own: a
    request to a store whose process is stopped never returns.

    Args:
        connect: opens a connection to the store that nobody else uses.
    """

    def __init__(self, rank: int, world_size: int, connect: Callable[[], dist.Store]) -> None:
        self.rank = rank
        self.world_size = world_size
        self.store_gone = False
        self._connect = connect
        self._heard: dict[int, tuple[Sign, float]] = {}  # and when, by this rank's clock
        self._answered_at = time.monotonic()
        self._beat = 0
        self._answered = 0  # the last beat that the store has answered
        self._end: str | None = None
        self._wake = threading.Event()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def end(self, reason: str) -> None:
        """Leave the reason of the end as the last sign; waits a second at most for it to go out."""
        self._end = reason
        self._wake.set()
        self._ended.wait(1.0)

    def refresh(self) -> None:
        """Ask the store anew; waits a second at most for the answer."""
        wanted, deadline = self._beat + 1, time.monotonic() + 1.0
        self._wake.set()
        while self._answered < wanted and not self.store_gone and time.monotonic() < deadline:
            time.sleep(0.02)

    def forgive(self, seconds: float) -> None:
        """Count as silence of nobody what this process itself was stopped."""
        self._answered_at += seconds
        self._heard = {rank: (sign, at + seconds) for rank, (sign, at) in self._heard.items()}

    # -- what is known of the others ----------------------------------------------------------------------

    def signs(self) -> list[Sign]:
        """The last sign of every other rank that was ever heard of."""
        return [sign for _, (sign, _) in sorted(self._heard.items())]

    def lost(self, silent_s: float) -> dict[int, str]:
        """Ranks that have certainly failed, with a sentence on each.

        Args:
            silent_s: seconds of silence after which a process that is not found on this host counts as dead.
        """
        found = {}
        for sign in self.signs():
            if sign.end:
                found[sign.rank] = f"{sign} ended: {sign.end}"
            elif sign.end is None and self._silence(sign.rank) > silent_s and _is_dead(sign):
                found[sign.rank] = self._last_heard(sign)
        first = self._heard.get(0)
        if self.store_gone and 0 not in found and (first is None or first[0].end is None):
            found[0] = self._about_store("is gone")
        return found

    def silent(self, silent_s: float) -> dict[int, str]:
        """Ranks that have given no sign for so many seconds, with a sentence on each."""
        since = time.monotonic() - self._answered_at
        if since > silent_s:  # without the store nothing is known of the others
            return {} if self.rank == 0 else {0: self._about_store(f"has not answered for {since:.0f} s")}
        alive = [sign for sign in self.signs() if sign.end is None]
        found = {sign.rank: self._last_heard(sign) for sign in alive if self._silence(sign.rank) > silent_s}
        return found | {rank: f"rank {rank} was never heard of" for rank in self._unheard()}

    def _unheard(self) -> list[int]:
        return sorted(set(range(self.world_size)) - self._heard.keys() - {self.rank})

    def _silence(self, rank: int) -> float:
        return time.monotonic() - self._heard[rank][1]

    def _last_heard(self, sign: Sign) -> str:
        seconds = self._silence(sign.rank)
        return f"{sign} was last heard of {seconds:.0f} s ago at step {sign.step} (in {sign.doing})"

    def _about_store(self, state: str) -> str:
        name = str(self._heard[0][0]) if 0 in self._heard else "rank 0"
        return f"{name}, which holds the store, {state}"

    # -- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            store = self._connect()
            while not self._ended.is_set():
                ending = self._end is not None
                self._exchange(store)
                if ending:
                    self._ended.set()
                self._wake.wait(_FIRST_BEATS_S if self._unheard() else BEAT_S)
                self._wake.clear()
        except RuntimeError:  # what the store raises when its process has died
            self.store_gone = True
            self._ended.set()

    def _exchange(self, store: dist.Store) -> None:
        self._beat += 1
        activity = gather.activity
        doing = activity.collective or activity.phase
        sign = Sign(self.rank, socket.gethostname(), os.getpid(), activity.step, doing, self._beat, self._end)
        store.set(_key(self.rank), json.dumps(asdict(sign)))
        # A get would wait for a key that is not there yet.
        ranks = [*self._heard, *(rank for rank in self._unheard() if store.check([_key(rank)]))]
        answers = store.multi_get([_key(rank) for rank in ranks]) if ranks else []
        now = time.monotonic()
        for answer in answers:
            other = Sign(**json.loads(answer))
            if other.rank not in self._heard or self._heard[other.rank][0] != other:
                self._heard = self._heard | {other.rank: (other, now)}  # other threads read the old one
        self._answered, self._answered_at = self._beat, now


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _is_dead(sign: Sign) -> bool:
    """Whether the process of a rank on this host has ended; of another host nothing is known."""
    if sign.host != socket.gethostname():
        return False
    try:
        os.kill(sign.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    stat = Path(f"/proc/{sign.pid}/stat")  # a dead child that nobody has waited for is still in the table
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] in ("Z", "X")
