"""Ranks that are stopped, or end, while one waits for the other: real processes, through the real command line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_recipe import write_tiny_recipe

ORPHAN = """
import os, subprocess, sys, time
from types import SimpleNamespace
from trainer.distributed import meeting

meeting._GRACE_S = 0.1
first = meeting.Meeting(SimpleNamespace(setup_environment=lambda: None, launcher=None))
if sys.argv[1:] != ["rank 1"]:
    rank = subprocess.Popen([sys.executable, __file__, "rank 1"], env={**os.environ, "LOCAL_RANK": "1"})
    print(rank.pid, flush=True)
    os.kill(os.getpid(), 9)
strategy = SimpleNamespace(setup_environment=lambda: time.sleep(60), launcher=None)
meeting.Meeting(strategy)
strategy.setup_environment()
"""


ALONE = """
import os, sys
from types import SimpleNamespace
import torch.distributed as dist
from datetime import timedelta
from trainer.distributed import meeting

meeting._NOTICE_S = 1.0
rank = int(sys.argv[1])
join = lambda: dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=3))
strategy = SimpleNamespace(setup_environment=join, launcher=None, global_rank=rank, world_size=2)
meeting.Meeting(strategy)
strategy.setup_environment()
"""


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("number", "of_first", "status", "says"),
    [
        (signal.SIGUSR1, True, 85, ""),
        pytest.param(signal.SIGTERM, True, 143, "", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, 130, "", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, False, 85, "", marks=pytest.mark.slow),
        pytest.param(
            signal.SIGKILL,
            False,
            1,
            "error: rank 1 was ended by SIGKILL while the ranks started\n",
            marks=pytest.mark.slow,  # as of predict, in test_launch
        ),
    ],
)
def test_a_rank_that_waits_for_another_ends_with_the_status_of_the_request(
    tiny_encoder: Path, tmp_path: Path, number: signal.Signals, of_first: bool, status: int, says: str
) -> None:
    """Rank 1 is held still, so that rank 0 would wait for it for half an hour; the lock is let go of."""
    recipe = write_tiny_recipe(tmp_path, tiny_encoder)
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(recipe), "--trainer.devices", "2"]
    command += ["--trainer.default_root_dir", str(tmp_path / "run")]
    out, err = tmp_path / "out", tmp_path / "err"
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
    other = 0
    try:
        deadline = time.monotonic() + 90
        while "GLOBAL_RANK: 0" not in out.read_text() + err.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        (other,) = children_of(process.pid)
        os.kill(other, signal.SIGSTOP)
        assert (tmp_path / "run/run.lock").exists()
        time.sleep(1.0)  # it is in the meeting
        os.kill(process.pid if of_first else other, number)
        if not of_first:
            os.kill(other, signal.SIGCONT)
        assert process.wait(30) == status
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "run/run.lock").exists()
    assert not Path(f"/proc/{other}").exists() or Path(f"/proc/{other}/stat").read_text().split()[2] == "Z"
    said = err.read_text()
    assert said.endswith(says)
    assert "Traceback" not in said
    assert "zombies" not in said


def test_a_rank_whose_launcher_was_killed_ends(tmp_path: Path) -> None:
    """Nobody comes to where it waits; by then it may be too late to see its parent change."""
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    with open(tmp_path / "err", "wb") as stderr:
        launcher = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=stderr, text=True)
        out, _ = launcher.communicate(timeout=30)
    orphan = Path(f"/proc/{out.strip()}/stat")
    deadline = time.monotonic() + 30
    while orphan.exists() and orphan.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline
    said = f"error: process {launcher.pid} has ended while the ranks that it started met\n"
    assert (tmp_path / "err").read_text() == said


@pytest.mark.parametrize(("rank", "waits"), [(0, "for others of 2 ranks at"), (1, "for rank 0: nobody answers at")])
def test_a_rank_that_was_started_alone_says_for_whom_it_waits(tmp_path: Path, rank: int, waits: str) -> None:
    """By hand, or on a node that can't reach the first: nobody else would see that a rank is missing."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    environ = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, script, str(rank)]
    said = subprocess.run(command, env=environ, stderr=subprocess.PIPE, text=True, timeout=60, check=False).stderr
    place = f"127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT)"
    assert f"rank {rank} on host {socket.gethostname()} still waits {waits} {place} after 1 s; do all ranks run" in said
    assert f"ValueError: the ranks did not meet at {place}: " in said


def test_a_port_that_is_in_use_is_one_sentence(tiny_encoder: Path, tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path, tiny_encoder)
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(recipe), "--trainer.devices", "2"]
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        ours = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environ = {**os.environ, **ours}
        done = subprocess.run(
            command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
        )
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"error: the ranks did not meet at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT): ")
    assert said.endswith("; another process has that port: start all ranks with another MASTER_PORT")
