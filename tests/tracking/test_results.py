"""The table and the file of what `trainer validate` found."""

import io
import json
import math
from pathlib import Path

from rich.console import Console

from trainer.tracking.results import RESULTS_NAME, print_results, write_results

METRICS = {
    "eval/first/ap": 0.5,
    "eval/first/f1": 0.25,
    "eval/suite/a/ap": 1.0,
    "eval/suite/a/f1": math.nan,
    "eval/other/negative_mse": -1.5,
    "eval/suite/ap": 1.0,
    "eval/suite/f1": math.nan,
}


def test_sets_with_the_same_metrics_share_a_table() -> None:
    out = io.StringIO()
    print_results(METRICS, ["first", "suite/a", "other"], Console(file=out, width=80))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines == [
        ["metric", "first", "suite/a", "suite"],
        ["ap", "0.5000", "1.0000", "1.0000"],
        ["f1", "0.2500", "nan", "nan"],
        ["metric", "other"],
        ["negative_mse", "-1.5000"],
    ]


def test_the_file_is_json_for_every_reader(tmp_path: Path) -> None:
    """No NaN, which JSON does not have."""
    write_results(METRICS, {"model": "x", "checkpoint": None}, tmp_path / "run" / RESULTS_NAME)
    text = (tmp_path / "run" / RESULTS_NAME).read_text()
    assert "NaN" not in text
    content = json.loads(text)
    assert (content["model"], content["checkpoint"]) == ("x", None)
    assert content["metrics"]["eval/suite/a/f1"] is None
    assert content["metrics"]["eval/other/negative_mse"] == -1.5
