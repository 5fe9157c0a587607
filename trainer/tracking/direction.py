"""Which way a metric is better, by its name; nothing heavy is imported."""

from __future__ import annotations

from typing import Literal, Optional


def direction(metric: str) -> Optional[Literal["max", "min"]]:
    """Evaluators log what is better when it is higher, losses the opposite; None where neither is better."""
    if metric.startswith("eval/"):
        return None if "threshold" in metric.rpartition("/")[2] else "max"
    return "min" if metric == "train/loss" or metric.startswith("train/loss/") else None
