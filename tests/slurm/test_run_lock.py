"""What the lock of a run directory makes of the states that a real Slurm gives a job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.slurm.jobs import NEEDS_SLURM, Slurm, wait_until
from trainer.config_files import ConfigError
from trainer.run_lock import FILE_NAME, take_lock

pytestmark = NEEDS_SLURM


def held_by(job: str, run_dir: Path) -> Path:
    """A run directory that a process of this job holds, on a node whose processes can't be seen from here."""
    run_dir.mkdir()
    holder = {"host": "elsewhere", "pid": 1, "started": "1", "job": job, "restart": 0}
    (run_dir / FILE_NAME).write_text(json.dumps(holder))
    return run_dir


def wait_for(slurm: Slurm, number: str, state: str) -> None:
    asked = ["scontrol", "show", "job", number]
    wait_until(lambda: f"JobId={number} " in (said := slurm.output(asked)) and f"JobState={state}" in said, state)


def test_a_stopped_job_still_holds_its_directory(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
    number = slurm.output(["sbatch", "--parsable", "--wrap", "sleep 100"]).strip()
    run_dir = held_by(number, tmp_path / "run")
    wait_for(slurm, number, "RUNNING")
    slurm.signal(number, "STOP")
    wait_until(lambda: slurm.output(["squeue", "--noheader", "--format=%T", "-j", number]) == "STOPPED\n", "STOPPED")
    with pytest.raises(ConfigError, match=f"Slurm job {number}; wait for it"):
        take_lock(run_dir, {})
    slurm.output(["scancel", number])
    wait_for(slurm, number, "CANCELLED")
    assert f"Slurm job {number}, which has ended" in str(take_lock(run_dir, {}))


def test_a_task_of_an_array_is_judged_by_itself(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last task has the number of the array, under which Slurm names all of them, the waiting ones first."""
    monkeypatch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
    number = slurm.output(["sbatch", "--parsable", "--array=1-2", "--requeue", "--wrap", "sleep 100"]).strip()
    first, last = slurm.numbers(number)
    assert last == number
    run_dir = held_by(last, tmp_path / "run")
    wait_for(slurm, first, "RUNNING")
    slurm.output(["scontrol", "requeue", first])
    slurm.requeued(first)
    states = slurm.output(["squeue", "--noheader", "--states=all", "--format=%T", "-j", number])
    assert states.split() == ["PENDING", "RUNNING"]
    with pytest.raises(ConfigError, match=f"Slurm job {last}; wait for it"):
        take_lock(run_dir, {})
    slurm.output(["scancel", number])
