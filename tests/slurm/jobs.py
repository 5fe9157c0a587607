"""The local two-node Slurm as tests use it: starting and stopping it, submitting jobs, waiting for them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm"
CLUSTER = SCRIPTS / "local-cluster.sh"
MISSING = [
    name for name in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(name, path="/usr/sbin:/usr/bin")
]
NEEDS_SLURM = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed ({', '.join(MISSING)} not found)"),
]


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

    def submit(
        self,
        options: str,
        arguments: list[str],
        python: Path | str = sys.executable,
        script: str = "train.sh",
        **environ: str,
    ) -> str:
        """``sbatch OPTIONS SCRIPT ARGUMENTS``; returns the number of the job."""
        command = ["sbatch", "--parsable", *options.split(), str(SCRIPTS / script), *arguments]
        return self.output(command, **{"TRAINER_PYTHON": str(python), **environ}).strip()

    def finished(self, number: str, timeout_s: float = 240) -> Job:
        """Waits for the end of a job."""
        log, deadline = self.log(number), time.monotonic() + timeout_s
        while True:
            records = self.output(["scontrol", "show", "job", number]).split("\n\n")  # of an array, that of each task
            record = next(record for record in records if record.startswith(f"JobId={number} "))
            if re.search(r"JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)", record):
                return Job(record, log.read_text())
            assert time.monotonic() < deadline, f"{record}\n{log.read_text() if log.exists() else 'no log'}"
            time.sleep(0.2)

    def run(self, options: str, arguments: list[str], python: Path | str = sys.executable, **environ: str) -> Job:
        return self.finished(self.submit(options, arguments, python, **environ))

    def signal(self, number: str, name: str) -> None:
        self.output(["scancel", "--signal", name, number])

    def requeued(self, number: str) -> None:
        """Waits until a job is back in the queue."""
        wait_until(lambda: "Reason=BeginTime" in self.output(["scontrol", "show", "job", number]), "back in the queue")

    def start_again(self, number: str) -> None:
        """Spares a job that comes back the two minutes that Slurm lets it wait in the queue."""
        self.requeued(number)
        time.sleep(3)  # Slurm refuses a job that starts in the second in which it came back: "Job credential revoked"
        self.output(["scontrol", "update", f"JobId={number}", "StartTime=now"])

    def numbers(self, array: str) -> list[str]:
        """The job number of each task of an array, once all have one."""
        wait_until(lambda: "PENDING" not in self.output(["scontrol", "show", "job", array]), "tasks of the array")
        found = re.findall(r"JobId=(\d+) .*ArrayTaskId=(\d+)", self.output(["scontrol", "show", "job", "-o", array]))
        return [number for number, task in sorted(found, key=lambda pair: int(pair[1]))]

    def log(self, number: str) -> Path:
        return self.folder / f"slurm-{number}.out"

    def output(self, command: list[str], **environ: str) -> str:
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


def wait_until(happened: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


def stand_in(folder: Path, script: str, name: str = "python") -> Path:
    """A program in Python's place, for what happens around it; it passes the checks before the run."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n[[ ${{3:-}} == preflight ]] && exit\n{script}\n")
    path.chmod(0o755)
    return path
