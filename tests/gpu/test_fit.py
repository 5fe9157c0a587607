"""A fit on a GPU by the command line: the metrics of a fit on a CPU, and of one that goes on from a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_recipe import write_tiny_recipe
from trainer.cli import main

ON_GPU = ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--data.num_workers", "0"]


def _rows(folder: Path) -> list[dict[str, Any]]:
    """What a run has measured of its model, by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "train/loss", "train/grad_norm", "eval/")
    return [{name: row[name] for name in row if name.startswith(kept)} for row in rows]


def _assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 5e-3)])
def test_a_fit(tiny_encoder: Path, tmp_path: Path, precision: str, tolerance: float) -> None:
    recipe = write_tiny_recipe(tmp_path, tiny_encoder)
    args = ["fit", "--config", str(recipe), "--trainer.precision", precision, "--model.encoder.dropout", "0"]
    args += ["--checkpoint.save_every_steps", "2"]
    root = "--trainer.default_root_dir"
    assert main([*args, *ON_GPU, root, str(tmp_path / "gpu")]) == 0
    environment = {name: value for name, value in os.environ.items() if name != "TRAINER_TESTS_GPU"}
    on_cpu = [sys.executable, "-m", "trainer", *args, root, str(tmp_path / "cpu")]
    subprocess.run(on_cpu, check=True, env=environment, timeout=200)
    found, expected = _rows(tmp_path / "gpu"), _rows(tmp_path / "cpu")
    assert [row["step"] for row in expected] == [0, 1, 2, 3, 3]
    _assert_close(found, expected, tolerance)
    checkpoint = tmp_path / "gpu" / "checkpoints" / "step-00000002"
    assert main([*args, *ON_GPU, root, str(tmp_path / "again"), "--ckpt_path", str(checkpoint)]) == 0
    assert _rows(tmp_path / "again") == [row for row in found if row["step"] > 2]
