"""What is seen when a rank dies, stops, fails or runs out of memory: real processes, through the real command line.

These tests start processes of their own, because what is tested is how processes end.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tiny_recipe import write_recipe
from trainer.demo_data import read_pairs, write_pairs
from trainer.demo_encoder import write_encoder
from trainer.distributed.watch import Watch

TESTS = Path(__file__).parents[1]
ROWS, BATCH = 48, 24  # 2 steps an epoch
DDP = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    train, dev = write_pairs(folder, num_train=ROWS, num_dev=300, seed=1)
    texts = [text for pair in read_pairs(train) for text in (pair.sentence1, pair.sentence2)]
    write_encoder(folder / "encoder", texts, hidden=128, layers=2, heads=2, vocab=300)
    return write_recipe(
        folder / "run.yaml",
        folder / "encoder",
        (train, dev),
        data={"batch_size": BATCH},
        trainer={"max_epochs": 4, "val_check_interval": 100},
        checkpoint={"save_every_steps": 2},
    )


class Runs:
    """Starts runs with a fault in them; every process of theirs carries a mark in its environment."""

    def __init__(self, config: Path, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.mark = f"TRAINER_TEST_MARK={uuid.uuid4()}"

    @contextmanager
    def started(self, how: str, *flags: str, step: int = 3, rank: int = 1) -> Iterator[subprocess.Popen[bytes]]:
        name, _, mark = self.mark.partition("=")
        environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", name: mark}
        command = [sys.executable, "-m", "trainer", "fit", "--config", str(self.config)]
        command += ["--trainer.default_root_dir", str(self.run_dir), *flags, "--trainer.callbacks+=fault_at.FaultAt"]
        for key, value in (("step", step), ("how", how), ("rank", rank)):
            command.append(f"--trainer.callbacks.{key}={value}")
        with open(self._path, "wb") as file:  # a pipe would keep us waiting for orphans
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def __call__(self, how: str, *flags: str, step: int = 3, rank: int = 1) -> int:
        """The exit code of the process that was started first."""
        with self.started(how, *flags, step=step, rank=rank) as process:
            return process.wait(timeout=120.0)

    @property
    def said(self) -> str:
        return self._path.read_text(encoding="utf-8")

    @property
    def _path(self) -> Path:
        return self.run_dir.with_suffix(".err")

    def seconds_since_fault(self) -> float:
        return time.time() - (self.run_dir / "fault").stat().st_mtime

    def alive(self) -> list[int]:
        """Processes of the runs that have not ended."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                marked = self.mark.encode() in (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile, or is a zombie
                continue
            if marked:
                found.append(int(entry.name))
        return found

    def wait_for_end(self, timeout_s: float) -> list[int]:
        """What is alive when all have ended or the time is up."""
        deadline = time.monotonic() + timeout_s
        while (alive := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return alive


@pytest.fixture
def runs(config: Path, tmp_path: Path) -> Iterator[Runs]:
    started = Runs(config, tmp_path / "run")
    yield started
    for pid in started.alive():
        os.kill(pid, signal.SIGKILL)


def lines(text: str, start: str) -> list[str]:
    return re.findall(rf"^{start}.*", text, re.MULTILINE)


CHECKPOINT = r"last checkpoint: \S+step-00000002\S*, go on from it with --ckpt_path auto"


# -- a rank that is gone ----------------------------------------------------------------------------------


def test_a_killed_rank_is_named(runs: Runs) -> None:
    """The other ends at once, by itself, with the last checkpoint; no traceback of the collective that failed."""
    assert runs("kill", *DDP) == 1
    assert not runs.wait_for_end(20.0)
    assert runs.seconds_since_fault() < 30.0
    (line,) = lines(runs.said, "error")
    assert re.fullmatch(
        r"error: rank 1 on host \S+ \(pid \d+\) was last heard of \d+ s ago at step \d+ \(in [\w ]+\); "
        rf"this rank is at step 3, in gradient all-reduce in backward; {CHECKPOINT}",
        line,
    )
    assert "Traceback" not in runs.said
    assert "frame #" not in runs.said


def test_orphans_end(runs: Runs) -> None:
    """Rank 0, which started the other, is killed while rank 1 waits for something that is no collective; its loader
    workers end too."""
    assert runs("kill-launcher", *DDP, "--data.num_workers", "1") == -signal.SIGKILL
    assert not runs.wait_for_end(60.0)
    assert runs.seconds_since_fault() < 60.0
    (line,) = lines(runs.said, "error")
    assert re.match(
        r"error \(rank 1\): rank 0 on host \S+ \(pid \d+\)(, which holds the store, is gone| was last)", line
    )
    assert re.search(CHECKPOINT, line)


def test_a_failing_rank_is_named(runs: Runs) -> None:
    """Its traceback once; of the other one sentence."""
    assert runs("raise", *DDP) == 1
    assert not runs.wait_for_end(10.0)
    assert runs.said.count("Traceback (most recent call last)") == 1
    (line,) = lines(runs.said, "error")
    assert re.match(r"error: rank 1 on host \S+ \(pid \d+\) ended: KeyError: 'a bug on this rank'; this rank is", line)


# -- a run that hangs -------------------------------------------------------------------------------------


def test_a_stopped_rank_ends_the_run_with_stacks(runs: Runs) -> None:
    assert runs("stop", *DDP, "--watch.timeout_s", "6") == 1
    assert not runs.wait_for_end(10.0), "the stopped process must end with the one that started it"
    (line,) = lines(runs.said, "error")
    assert re.match(
        r"error: rank 0 on host \S+ \(pid \d+\): no progress for 6 s \(watch.timeout_s\) at step 3; it waits in "
        r"gradient all-reduce in backward; rank 1 on host \S+ \(pid \d+\) was last heard of \d+ s ago at step",
        line,
    )
    stacks = (runs.run_dir / "hang-rank0.txt").read_text()
    assert stacks.startswith(line)
    for text in (stacks, runs.said):
        assert re.search(r'File ".*graph.py", line \d+ in _engine_run_backward', text)


@pytest.mark.slow  # the other rank stopped, and the first one killed, are quick enough
def test_a_stopped_first_rank_ends_the_other(runs: Runs) -> None:
    """The store stands still with it."""
    with runs.started("stop", *DDP, "--watch.timeout_s", "6", rank=0) as first:
        deadline = time.monotonic() + 100.0
        hung = runs.run_dir / "hang-rank1.txt"
        while not (hung.exists() and len(runs.alive()) == 1) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert runs.alive() == [first.pid], "the second rank must end, after it has written its stacks"
    (line,) = lines(runs.said, "error")
    assert re.search(r"waits in gradient all-reduce in backward; rank 0 on host \S+ \(pid \d+\), which holds the", line)


def test_a_single_process_that_hangs(runs: Runs) -> None:
    assert runs("wait", "--watch.timeout_s", "4", rank=0) == 1
    (line,) = lines(runs.said, "error")
    assert re.search(r"no progress for 4 s \(watch.timeout_s\) at step 3; it waits in loading the next batch", line)
    assert re.search(r'fault_at.py", line \d+ in on_train_batch_start', (runs.run_dir / "hang-rank0.txt").read_text())


@pytest.mark.parametrize("timeout_s", [0.0, math.nan, math.inf])
def test_timeout_out_of_range(timeout_s: float) -> None:
    """No time is more than NaN: a run that hangs would hang on."""
    with pytest.raises(ValueError, match=f"^watch.timeout_s is {timeout_s:g}; it must be above 0, and finite$"):
        Watch(timeout_s)


# -- numbers and memory -----------------------------------------------------------------------------------


def test_nan_on_one_rank_stops_all(runs: Runs) -> None:
    """Before the optimizer's step, with the rows of that rank, said once."""
    assert runs("nan", *DDP) == 1
    assert not runs.wait_for_end(10.0)
    (line,) = lines(runs.said, "error")
    report = json.loads((runs.run_dir / "nonfinite-step-4.json").read_text())
    assert report["ranks_with_bad_loss"] == [1]
    assert [len(rows) for rows in report["rows"]] == [BATCH // 2] * 2
    rows = ", ".join(map(str, report["rows"][1][:10]))
    assert f"step 4: the loss of rank 1 is not finite; no weight was changed. Rows of {report['source']}" in line
    assert f"counted from 0: {rows}, ... (12 in all)" in line
    assert "Traceback" not in runs.said
    assert not list(runs.run_dir.glob("checkpoints/*4*"))


@pytest.mark.parametrize(
    ("how", "flags", "batch"),
    [
        (
            "memory",
            ("--data.batch_size", "480", "--trainer.limit_val_batches", "0"),
            "training, with a batch of 480",
        ),
        pytest.param("early-memory", (), r"evaluation, with a batch of \d+", marks=pytest.mark.slow),
    ],
)
def test_out_of_memory(runs: Runs, tmp_path: Path, how: str, flags: tuple[str, ...], batch: str) -> None:
    """The limit on the address space makes the allocator fail as on a full machine; the batch needs over 200 MB."""
    train, _ = write_pairs(tmp_path, num_train=480, num_dev=1, seed=2)
    assert runs(how, "--data.train.path", str(train), *flags, step=0, rank=0) == 1
    (line,) = lines(runs.said, "error")
    assert re.fullmatch(
        rf"error: out of memory in {batch} rows, \d+ texts, \d+ tokens, longest text \d+ tokens: "
        r"model.max_tokens is 16384 now; try \d+",
        line,
    )
    assert "Traceback" not in runs.said
