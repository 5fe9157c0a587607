"""The loops of benchmarks/reliability.py, short: killed and preempted runs end as if nothing had happened.

The long ones, and what they gave, stand in docs/reliability.md."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LOOPS = Path(__file__).parents[2] / "benchmarks" / "reliability.py"


def run(tmp_path: Path, loop: str, count: int) -> list[dict]:
    path = tmp_path / "result.json"
    command = [sys.executable, str(LOOPS), loop, "--count", str(count), "--json", str(path), "--seed", "3"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes: list[dict] = json.loads(path.read_text())["outcomes"]
    return outcomes


@pytest.mark.timeout(600)
def test_five_kills(tmp_path: Path) -> None:
    outcomes = run(tmp_path, "kill-saving", 5)
    assert all(outcome["bitwise_equal"] and outcome["steps_lost"] <= 5 for outcome in outcomes)


@pytest.mark.slurm
@pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is not installed")
@pytest.mark.timeout(600)
def test_three_preemptions(tmp_path: Path) -> None:
    outcomes = run(tmp_path, "preempt-steps", 3)
    assert all(outcome["restarts"] == 1 and outcome["exit_codes"] == ["85", "0"] for outcome in outcomes)
