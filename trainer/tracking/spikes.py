"""Warns of a training loss that jumps."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping

from trainer.distributed import gather

logger = logging.getLogger(__name__)

NUM_LOGS, MIN_LOGS, NUM_DEVIATIONS = 50, 20, 6.0
# Of the mean, of a mean of 0 the value itself: a loss that stands still has no deviation, and rounding would count.
LEAST_RISE = 0.01


class LossSpikes:
    """Listens to the metrics log: one warning when `train/loss` leaves the mean of the last 50 logs by more than
    6 standard deviations and a hundredth of itself upwards, and none again before it has come back."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=NUM_LOGS)
        self._high = False

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        loss = metrics.get("train/loss")
        if loss is None or not math.isfinite(loss):
            return
        if len(self._losses) >= MIN_LOGS:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            limit = mean + max(NUM_DEVIATIONS * deviation, LEAST_RISE * (abs(mean) or 1.0))
            was_high, self._high = self._high, loss > limit
            if self._high and not was_high:
                gather.warn(
                    logger,
                    f"loss spike: {loss:.4g} at step {step}, after {mean:.4g} on average over {len(self._losses)} logs "
                    f"(standard deviation {deviation:.2g}); usual causes: a learning rate that is too high or has no "
                    "warm-up (model.learning_rate, model.warmup_ratio), or rows of another kind in the data",
                )
        self._losses.append(loss)
