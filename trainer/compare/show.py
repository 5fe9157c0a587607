"""How values are written, in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from trainer.compare.fold import MISSING, Cost, Group, Spread, differences
from trainer.tracking.direction import direction

ARROWS = {"max": "↑", "min": "↓", None: ""}


def metric(value: Optional[Spread]) -> str:
    """Four decimals, as metrics are published."""
    if value is None:
        return "–"
    return f"{value.mean:.4f}" + (f" ± {value.deviation:.4f}" if value.deviation is not None else "")


def amount(value: Optional[Spread]) -> str:
    """Three or more figures, and the spread where it shows."""
    if value is None:
        return "–"
    digits = 0 if abs(value.mean) >= 100 else 1 if abs(value.mean) >= 10 else 2 if abs(value.mean) >= 0.1 else 4
    spread = f"{value.deviation:,.{digits}f}" if value.deviation else ""
    return f"{value.mean:,.{digits}f}" + (f" ± {spread}" if spread.strip("0.,") else "")


def duration(value: Optional[Spread]) -> str:
    if value is None:
        return "–"
    if value.mean < 60:
        return f"{value.mean:.1f} s"
    minutes, seconds = divmod(round(value.mean), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def setting(value: Any) -> str:
    """A value of a config; of a class its name."""
    if value is MISSING:
        return "–"
    if isinstance(value, str):
        is_class = value.startswith(("trainer.", "tests.", "torch.", "lightning.")) and "/" not in value
        return value.rpartition(".")[2] if is_class else value
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(setting, value)) or "[]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def heading(name: str, short: Optional[str] = None) -> str:
    """A metric, or a shorter name of it, with the way in which it is better."""
    return f"{short or name} {ARROWS[direction(name)]}".rstrip()


def has_other_losses(groups: Sequence[Group]) -> bool:
    """Whether the groups train with different losses, whose values are numbers of different kinds."""
    return any(key.startswith("model.loss") for key in differences(groups))


def winners(groups: Sequence[Group], name: str) -> set[int]:
    """The groups with the best mean of a metric; none where all are equal or can't be compared."""
    which = direction(name)
    if name.startswith("train/loss") and has_other_losses(groups):
        return set()
    means = {number: found.mean for number, group in enumerate(groups) if (found := group.best(name))}
    if which is None or len(set(means.values())) < 2:
        return set()
    top = (max if which == "max" else min)(means.values())
    return {number for number, mean in means.items() if mean == top}


COST_ROWS = (
    "seeds",
    "device",
    "steps",
    "rows",
    "tokens",
    "rows/s",
    "tokens/s",
    "wall time",
    "device hours",
    "peak GiB",
)


def cost_cells(group: Group, cost: Cost) -> list[str]:
    """In the order of COST_ROWS."""
    known = [str(seed) for seed in group.seeds if seed is not None]
    seeds = f"{len(group.runs)} ({', '.join(known)})" if known else str(len(group.runs))
    totals = [amount(one) for one in (cost.steps, cost.rows, cost.tokens, cost.rows_per_s, cost.tokens_per_s)]
    return [seeds, cost.device, *totals, duration(cost.wall_s), amount(cost.gpu_hours), amount(cost.peak_gib)]
