"""Warns of embeddings that become all alike, or use few directions."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from trainer.distributed import gather

logger = logging.getLogger(__name__)

ALIKE, RISE = 0.95, 0.02  # median cosine of different texts; what it has risen by since the first evaluation
KEPT_SHARE = 0.25  # of the effective rank at the first evaluation

_CAUSES = (
    "usual causes: too high a learning rate, no negatives or constant labels (trainer check names them), a loss whose "
    "scale is too small"
)


class Collapse:
    """Listens to the metrics log: one warning for each set. What counts is the change since the first evaluation of the
    run, for some encoders put all texts close to each other before any training.

    Attributes:
        first: what the first evaluation found. A restart does not evaluate before its first step, so whoever owns this
            keeps it in the checkpoint.
    """

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self._warned: set[str] = set()

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            one, _, kind = name.removeprefix("health/").rpartition("/")
            if not name.startswith("health/") or kind not in ("negative_p50", "effective_rank"):
                continue
            first = self.first.setdefault(name, value)
            if one in self._warned:
                continue
            if kind == "negative_p50" and value > ALIKE and value > first + RISE:
                what = f"half of the pairs of different texts have a cosine above {value:.3f} (at first {first:.3f})"
            elif kind == "effective_rank" and value < KEPT_SHARE * first:
                what = f"their effective rank fell from {first:.1f} to {value:.1f}"
            else:
                continue
            self._warned.add(one)
            gather.warn(logger, f"the embeddings of {one} collapse: {what} at step {step}; {_CAUSES}")
