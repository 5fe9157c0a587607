"""Words that errors share: what a library says, and which name was meant."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches


def cause_of(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error) or "no reason given").splitlines()[0]


def did_you_mean(name: str, known: Collection[str], cutoff: float = 0.5) -> str:
    """The sentence `` Did you mean 'x'?``, or nothing where no known name is near (1: only the same one)."""
    lowered = {k.lower(): k for k in known}
    near = get_close_matches(name.lower(), lowered, n=1, cutoff=cutoff)
    return f" Did you mean '{lowered[near[0]]}'?" if near else ""
