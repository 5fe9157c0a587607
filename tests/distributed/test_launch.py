"""How many ranks a command names, who numbers them, and how those of `trainer predict` end while they start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.fabric.utilities.device_parser import _normalize_parse_gpu_string_input as of_lightning

from tests.distributed.test_meeting import children_of
from trainer.distributed.launch import device_count, numbering


@pytest.mark.parametrize("written", ["0,1", "3,", " 0, 5,7", "4", "-1"])
def test_devices_are_counted_as_lightning_reads_them(written: str) -> None:
    found = of_lightning(written)
    expected = len(found) if isinstance(found, list) else found if found > 0 else None
    assert device_count(written) == expected


def test_devices_of_a_recipe() -> None:
    assert [device_count(one) for one in (2, [0, 3, 5], "[0, 3]", "auto", -1)] == [2, 3, 2, None, None]


# What a real Slurm sets: in a job's script, in a step of two tasks under salloc, in its shell, behind srun --pty.
SCRIPT = "SLURM_JOB_NAME=train SLURM_NTASKS=1 SLURM_PROCID=0"
STEP = "SLURM_JOB_NAME=interactive SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_PROCID=1"
SHELL = "SLURM_JOB_NAME=train SLURM_NTASKS=2"
TERMINAL = "SLURM_JOB_NAME=interactive SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=0 SLURM_PTY_PORT=40001"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", []),
        (SCRIPT, [SLURMEnvironment]),
        (f"{SCRIPT} TORCHELASTIC_RUN_ID=none", []),
        (STEP, [SLURMEnvironment]),
        (SHELL, [LightningEnvironment]),
        (TERMINAL, []),
    ],
)
def test_ranks_are_numbered_by_who_started_them(
    said: str, expected: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in said.split():
        monkeypatch.setenv(*variable.split("=", 1))
    assert [type(one) for one in numbering()] == expected


def test_tasks_without_their_number_on_a_node_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in STEP.split():
        monkeypatch.setenv(*variable.split("=", 1))
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ValueError, match="has started 2 tasks on 1 nodes; ask for them with --ntasks-per-node"):
        numbering()


def test_a_job_script_of_several_tasks_does_not_wait_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only srun starts them."""
    for variable in (*SCRIPT.split(), "SLURM_NTASKS=2", "SLURM_NTASKS_PER_NODE=2"):
        monkeypatch.setenv(*variable.split("=", 1))
    with pytest.raises(
        ValueError, match=r"^the job has 2 tasks, but its script is one process, .*start this with srun"
    ):
        numbering()


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_NNODES"])
def test_an_empty_number_of_tasks_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*STEP.split(), f"{name}="):
        monkeypatch.setenv(*variable.split("=", 1))
    with pytest.raises(ValueError, match=f"^{name} is '' in the environment of a task of Slurm; it must be a number: "):
        numbering()


@pytest.mark.parametrize(
    ("number", "of_first", "status", "says"),
    [
        pytest.param(signal.SIGTERM, True, 143, "", marks=pytest.mark.slow),
        (signal.SIGKILL, False, 1, "error: rank 1 was ended by SIGKILL while the ranks started\n"),
        pytest.param(signal.SIGUSR1, True, 85, "", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, 130, "", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_waits_for_another_ends_at_once(
    tiny_encoder: Path, tmp_path: Path, number: signal.Signals, of_first: bool, status: int, says: str
) -> None:
    """Rank 1 is held still, so that rank 0 would wait for it for a day."""
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"body": "a text"}) + "\n")
    command = [sys.executable, "-m", "trainer", "predict", "--model", str(tiny_encoder), "--text", "body"]
    command += ["--data", str(tmp_path / "corpus.jsonl"), "--out", str(tmp_path / "out"), "--devices", "2"]
    process = subprocess.Popen([*command, "--accelerator", "cpu"], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while not children_of(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        (other,) = children_of(process.pid)
        os.kill(other, signal.SIGSTOP)
        time.sleep(1.0)  # rank 0 is in the meeting
        os.kill(process.pid if of_first else other, number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, said) == (status, says)
    assert not Path(f"/proc/{other}").exists() or Path(f"/proc/{other}/stat").read_text().split()[2] == "Z"
