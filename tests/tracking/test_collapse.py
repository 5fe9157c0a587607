"""The warning of embeddings that become all alike."""

from __future__ import annotations

import logging

import pytest

from trainer.tracking.collapse import Collapse


def warnings_for(rows: list[dict[str, float]], caplog: pytest.LogCaptureFixture) -> list[str]:
    listener = Collapse()
    with caplog.at_level(logging.WARNING, logger="trainer.tracking.collapse"):
        for number, row in enumerate(rows):
            listener({"train/loss": 1.0}, 10 * number)
            listener(row, 10 * number)
    return [record.message for record in caplog.records]


def test_texts_that_become_alike(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"health/dev/negative_p50": value} for value in (0.3, 0.94, 0.96, 0.99)]
    (warning,) = warnings_for(rows, caplog)
    assert warning.startswith(
        "the embeddings of dev collapse: half of the pairs of different texts have a cosine above 0.960 (at first "
        "0.300) at step 20; usual causes: too high a learning rate, no negatives or constant labels (trainer check"
    )


def test_directions_that_are_lost_of_each_set_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{f"health/{one}/effective_rank": value for one in ("a", "b")} for value in (40.0, 12.0, 9.9, 3.0)]
    first, second = warnings_for(rows, caplog)
    assert "of a collapse: their effective rank fell from 40.0 to 9.9 at step 20;" in first
    assert "of b collapse" in second


def test_an_encoder_that_starts_narrow_is_no_collapse(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"health/dev/negative_p50": value, "health/dev/effective_rank": 2.0} for value in (0.98, 0.99, 0.97)]
    assert warnings_for(rows, caplog) == []
