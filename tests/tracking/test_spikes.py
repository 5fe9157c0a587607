"""The warning of a loss that jumps."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from trainer.tracking.spikes import LossSpikes


def warnings_for(losses: list[float], caplog: pytest.LogCaptureFixture) -> list[str]:
    listener = LossSpikes()
    with caplog.at_level(logging.WARNING, logger="trainer.tracking.spikes"):
        for number, loss in enumerate(losses):
            listener({"train/loss": loss}, step=10 * number)
            listener({"eval/dev/spearman_cosine": 9.0}, step=10 * number)
    return [record.message for record in caplog.records]


def test_one_warning_for_one_jump(caplog: pytest.LogCaptureFixture) -> None:
    """Against NumPy: just above the limit, with what was measured; the high values that follow are no news."""
    losses = np.random.default_rng(0).normal(1.0, 0.1, size=70)
    last = losses[20:]
    limit = last.mean() + 6.0 * last.std()
    (warning,) = warnings_for([*losses, limit + 0.001, limit + 0.5], caplog)
    assert warning.startswith(
        f"loss spike: {limit + 0.001:.4g} at step 700, after {last.mean():.4g} on average over 50 logs "
        f"(standard deviation {last.std():.2g}); usual causes: "
    )


def test_no_warning_below_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    losses = np.random.default_rng(0).normal(1.0, 0.1, size=70)
    limit = losses[20:].mean() + 6.0 * losses[20:].std()
    assert not warnings_for([*losses, limit - 0.001, -5.0, math.nan], caplog)


@pytest.mark.parametrize(
    ("still", "rise", "warned"),
    [(0.0, 0.002, 0), (2.0, 1e-7, 0), (2.0, 0.01, 0), (2.0, 0.5, 1), (1e-3, 4e-3, 1), (0.0, 2.0, 1), (-2.0, 0.5, 1)],
)
def test_a_loss_that_stands_still_does_not_jump_by_rounding(
    still: float, rise: float, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    """25 logs without any deviation, then one above them: of a solved task, or of collapsed embeddings."""
    assert len(warnings_for([still] * 25 + [still + rise], caplog)) == warned


def test_no_warning_before_there_are_enough_logs(caplog: pytest.LogCaptureFixture) -> None:
    losses = list(np.random.default_rng(0).normal(1.0, 0.1, size=19))
    assert not warnings_for([*losses, 100.0], caplog)
    assert len(warnings_for([*losses, 1.0, 100.0], caplog)) == 1
