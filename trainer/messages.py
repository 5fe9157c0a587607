"""What errors share: what a library says, which name was meant, which numbers mean something."""

from __future__ import annotations

import math
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


def refuse_infinite(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` is a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value:g}; it must be a finite number")


def refuse_not_positive(name: str, value: float, or_zero: bool = False) -> None:
    """Raises ValueError unless ``value`` is finite and above 0, or 0 where that means something."""
    # Written so that NaN, which compares as false, is refused.
    if not (0.0 < value < math.inf or (or_zero and value == 0.0)):
        raise ValueError(f"{name} is {value:g}; it must be {'0 or more' if or_zero else 'above 0'}, and finite")
