"""The warning of embeddings that become all alike."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests.tracking.small_run import SaveAt, make_parts, make_trainer, read_metrics, write_rows
from trainer.distributed.watch import Watch
from trainer.evaluation.runner import Evaluation
from trainer.tracking.collapse import Collapse
from trainer.tracking.metrics import MetricsLog


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


def test_a_rise_of_less_than_two_hundredths_is_none(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"health/dev/negative_p50": value} for value in (0.94, 0.955, 0.959)]
    assert warnings_for(rows, caplog) == []
    rows = [{"health/dev/negative_p50": value} for value in (0.94, 0.955, 0.961)]
    assert len(warnings_for(rows, caplog)) == 1


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "of an older version"])
def test_the_first_evaluation_of_the_run_counts_after_a_restart(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], caplog: pytest.LogCaptureFixture, is_kept: bool
) -> None:
    """The checkpoint has what the log says of step 0. Where that was far above, the first evaluation after the restart
    warns; a checkpoint that has nothing still loads, and compares with what it sees."""
    rows, path = write_rows(tmp_path, demo_texts), tmp_path / "step-4.ckpt"
    name = "health/dev0/effective_rank"

    def fit(folder: Path, ckpt_path: Path | None) -> list[float]:
        module, data = make_parts(tiny_encoder, rows, [rows])
        callbacks = [MetricsLog(), Watch(), Evaluation(), SaveAt(4, path)]
        make_trainer(folder, callbacks).fit(module, data, ckpt_path=ckpt_path)
        return [row[name] for row in read_metrics(folder) if name in row]

    first = fit(tmp_path / "first", None)[0]
    assert not any("collapse" in message for message in caplog.messages)
    content = torch.load(path, weights_only=True)
    assert content["callbacks"]["Watch"]["first_health"][name] == first
    content["callbacks"]["Watch"]["first_health"][name] = 100 * first
    if not is_kept:
        del content["callbacks"]["Watch"]
    torch.save(content, path)
    caplog.clear()
    now = fit(tmp_path / "second", path)[0]
    warned = [message for message in caplog.messages if "the embeddings of dev0 collapse" in message]
    assert len(warned) == is_kept
    if is_kept:
        assert f"their effective rank fell from {100 * first:.1f} to {now:.1f} at step 6;" in warned[0]
