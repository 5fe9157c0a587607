"""What the report says of a batch: right answers among the negatives, rows without a place, rows of each label."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.check.test_command import common, names, run, source, write
from trainer.check.batches import count_false_negatives
from trainer.data.hashes import NO_TEXT


@pytest.mark.parametrize("shape", [(1, 2), (30, 2), (40, 4)])
def test_right_answers_among_the_candidates_are_those_that_two_loops_count(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[0])
    for _ in range(20):
        texts = rng.integers(0, 25, shape)
        texts[:, 2:][rng.random((shape[0], shape[1] - 2)) < 0.3] = NO_TEXT
        found = 0
        for i, row in enumerate(texts.tolist()):
            for j, other in enumerate(texts.tolist()):
                for column, text in enumerate(other[1:]):
                    found += i != j and (text == row[1] or (column == 0 and other[0] == row[0]))
        assert count_false_negatives(texts) == found


def test_a_check_counts_what_no_duplicates_takes_away(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every positive stands in four rows: of 31 others in a batch 3 * 31 / 127 share it."""
    texts = list(dict.fromkeys(demo_texts))
    rows = [{"a": texts[i], "b": texts[200 + i % 32]} for i in range(128)]
    path = write(tmp_path / "x.jsonl", rows)
    args = [*common(tmp_path, tiny_encoder, "InfoNCE"), "--data.batch_size", "32", "--data.train"]
    args.append(source(path, {"anchor": "a", "positive": "b"}))
    _, report = run(capsys, *args, "--model.loss.mask_false_negatives", "false")
    assert "false_negatives" in names(report, "warning")
    assert report["plan"]["false_negatives"][0] == pytest.approx(3 * 31 / 127, rel=0.3)
    _, report = run(capsys, *args)
    assert "false_negatives" not in names(report, "warning"), "InfoNCE masks them"
    assert report["plan"]["false_negatives"][0] > 0.0
    _, report = run(capsys, *args, "--data.no_duplicates", "true")
    assert "false_negatives" not in names(report, "warning")
    assert report["plan"]["false_negatives"] == [0.0]
    # The hardest case there is: all are placed only if each batch holds each positive once.
    assert report["plan"]["num_left_out"][0] <= 8


def test_a_check_tells_how_to_draw_labelled_texts(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = list(dict.fromkeys(demo_texts))[:120]
    path = write(tmp_path / "x.jsonl", [{"t": text, "y": i % 41} for i, text in enumerate(texts)])
    args = [*common(tmp_path, tiny_encoder, "BatchHardTriplet"), "--data.batch_size", "12", "--data.train"]
    _, report = run(capsys, *args, source(path, {"text": "t", "label": "y"}))
    (found,) = [f for f in report["findings"] if f["name"] == "few_positives"]
    assert "rows_per_label" in found["recipe"]
    _, report = run(capsys, *args, source(path, {"text": "t", "label": "y"}, rows_per_label=2))
    warnings = {f["name"]: f["cause"] for f in report["findings"]}
    assert "few_positives" not in warnings
    # 41 labels of two or three rows: a third row is left over.
    assert warnings["rows_without_place"].startswith("38 of 120 rows (31.7%) find no place in an epoch, others in each")
    assert report["plan"]["num_left_out"] == [38]
    assert json.dumps(report["plan"]["false_negatives"]) == "[null]"
