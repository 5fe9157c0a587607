"""The local two-node Slurm as tests use it: starting and stopping it, submitting jobs, waiting for them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLUSTER, TRAIN = ROOT / "slurm" / "local-cluster.sh", ROOT / "slurm" / "train.sh"


@dataclass(frozen=True)
class Job:
    """What is left of a job that has ended."""

    record: str  # scontrol show job
    log: str

    def __getitem__(self, field: str) -> str:
        found = re.search(rf"\b{field}=(\S+)", self.record)
        assert found, self.record
        return found[1]


@dataclass(frozen=True)
class Slurm:
    """Our cluster, and a user's folder with data and ``configs/pairs.yaml`` from which jobs are submitted."""

    environ: dict[str, str]
    folder: Path

    def submit(self, options: str, arguments: list[str], python: Path | str = sys.executable) -> str:
        """``sbatch OPTIONS train.sh ARGUMENTS``; returns the number of the job."""
        command = ["sbatch", "--parsable", *options.split(), str(TRAIN), *arguments]
        return self._output(command, TRAINER_PYTHON=str(python)).strip()

    def finished(self, number: str, timeout_s: float = 140) -> Job:
        """Waits for the end of a job."""
        log, deadline = self.log(number), time.monotonic() + timeout_s
        while True:
            record = self._output(["scontrol", "show", "job", number])
            if re.search(r"JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)", record):
                return Job(record, log.read_text())
            assert time.monotonic() < deadline, f"{record}\n{log.read_text() if log.exists() else 'no log'}"
            time.sleep(0.2)

    def run(self, options: str, arguments: list[str], python: Path | str = sys.executable) -> Job:
        return self.finished(self.submit(options, arguments, python))

    def signal(self, number: str, name: str) -> None:
        self._output(["scancel", "--signal", name, number])

    def log(self, number: str) -> Path:
        return self.folder / f"slurm-{number}.out"

    def _output(self, command: list[str], **environ: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def cluster(command: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """``local-cluster.sh COMMAND FOLDER``."""
    arguments = [str(CLUSTER), command, str(folder)]
    return subprocess.run(
        arguments, env={**os.environ, **environ}, capture_output=True, text=True, timeout=120, check=False
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines of the processes that name the folder or work in it, as the steps of jobs do."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            works_in = os.readlink(process / "cwd")
        except OSError:  # ended meanwhile
            continue
        if str(folder) in words or Path(works_in) == folder:
            found.append(words)
    return found


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, f"not within 30 s: {what}"
        time.sleep(0.1)
