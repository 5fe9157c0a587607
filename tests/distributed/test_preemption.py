"""A fit that is asked to stop saves once, leaves with the right status and ends, resumed, bit for bit as if it had
never been stopped. Real processes and signals through the real command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny_recipe import write_recipe
from trainer.demo_data import read_pairs, write_pairs
from trainer.demo_encoder import write_encoder
from trainer.manifest import newest, read_state, steps
from trainer.run_lock import take_lock
from trainer.tracking.runs import read_run_dir
from trainer.tracking.wandb_runs import offline_folders, read_offline

TESTS = Path(__file__).parents[1]
LAST = 40  # steps
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preemption")
    train, dev = write_pairs(folder, num_train=80, num_dev=12, seed=1)
    texts = [pair.sentence1 for pair in read_pairs(train)]
    write_encoder(folder / "encoder", texts, hidden=16, layers=1, heads=2, vocab=200)
    return write_recipe(
        folder / "run.yaml",
        folder / "encoder",
        (train, dev),
        model={"learning_rate": 1e-3},
        trainer={"max_epochs": 2, "val_check_interval": 15},
        checkpoint={"save_every_steps": 100},
    )


def start(recipe: Path, run_dir: Path, *flags: str, terminal: str = "", **environ: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environ}
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(recipe)]
    command += ["--trainer.default_root_dir", str(run_dir), *flags]
    if terminal:  # the first that a session opens is its own
        command = ["sh", "-c", f'exec "$@" <{terminal} >{terminal} 2>&1', "sh", *command]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def slow_at(step: int) -> tuple[str, ...]:
    """A callback that takes its time at one step, so that a signal finds the run there."""
    return "--trainer.callbacks+=kill_at.WaitAt", f"--trainer.callbacks.step={step}"


def wait_until(happened: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"the run never {what}"
        time.sleep(0.02)


def when_waiting(run_dir: Path, act: Callable[[], None]) -> None:
    wait_until((run_dir / "waiting").exists, "came to the step it was to wait at", timeout_s=120)
    act()


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> dict[str, torch.Tensor]:
    code, output = end(start(recipe, recipe.parent / "undisturbed"))
    assert code == 0, output
    return weights(recipe.parent / "undisturbed")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    assert newest(run_dir) == run_dir / "checkpoints" / f"step-{LAST:08d}"
    state: dict[str, torch.Tensor] = read_state(run_dir / "checkpoints" / f"step-{LAST:08d}")["state_dict"]
    return state


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("SIGUSR1", 85),
        *(pytest.param(name, status, marks=pytest.mark.slow) for name, status in (("SIGTERM", 143), ("SIGINT", 130))),
    ],
)
def test_saved_once_and_resumed_bitwise(
    recipe: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor], name: str, status: int
) -> None:
    tracked = ("--tracking.wandb", "offline") if name == "SIGUSR1" else ()
    process = start(recipe, tmp_path, *slow_at(7), *tracked)
    number = signal.Signals[name]
    when_waiting(tmp_path, lambda: process.send_signal(number))
    if number != signal.SIGINT:  # twice is once
        process.send_signal(number)
    code, output = end(process)
    assert code == status, output
    assert list(steps(tmp_path)) == [8]
    assert f"stopped by {name} at step 8: {tmp_path}/checkpoints/step-00000008 (exit {status})" in output
    code, output = end(start(recipe, tmp_path, "--ckpt_path", "auto", *tracked))
    assert code == 0, output
    resumed = weights(tmp_path)
    assert all(torch.equal(value, resumed[key]) for key, value in undisturbed.items())
    logged = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(logged)) == [0, *range(1, LAST + 1)]
    if tracked:
        folders = offline_folders(tmp_path / "wandb")
        assert len(folders) == 2
        (run,) = read_offline(folders)
        of_file = read_run_dir(tmp_path)
        assert [row["step"] for row in run.rows] == list(range(LAST + 1))
        for metric in ("train/loss", "eval/dev/spearman_cosine", "train/wall_s"):
            tracked_values = [row[metric] for row in run.rows if metric in row]
            assert tracked_values == list({row["step"]: row[metric] for row in of_file.rows if metric in row}.values())


def test_second_ctrl_c_stops_at_once(recipe: Path, tmp_path: Path) -> None:
    process = start(recipe, tmp_path, *slow_at(7))

    def twice() -> None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)

    when_waiting(tmp_path, twice)
    code, output = end(process)
    assert code == 130, output
    assert not steps(tmp_path)
    assert "Traceback" not in output


@pytest.mark.parametrize(("rank", "workers"), [(1, 0), pytest.param(0, 1, marks=pytest.mark.slow)])
def test_one_rank_of_two_is_asked(recipe: Path, tmp_path: Path, rank: int, workers: int) -> None:
    """TERM to one process only: both agree on a step, one message, status 143."""
    long = ("--trainer.max_epochs", "100", "--check.allow", "few_rows_many_epochs", "--data.num_workers", str(workers))
    process = start(recipe, tmp_path, *TWO, *long, *slow_at(7))
    pids = {0: lambda: process.pid, 1: lambda: child_of(process.pid)}
    when_waiting(tmp_path, lambda: os.kill(pids[rank](), signal.SIGTERM))
    code, output = end(process)
    assert code == 143, output
    step = max(steps(tmp_path))
    assert output.count(f"stopped by SIGTERM at step {step}") == 1


@pytest.mark.slow
def test_a_terminal_that_is_closed(recipe: Path, tmp_path: Path) -> None:
    """The kernel sends HUP to both ranks, and nothing that they print goes anywhere: they save all the same."""
    ours, theirs = os.openpty()
    long = ("--trainer.max_epochs", "100", "--check.allow", "few_rows_many_epochs")
    process = start(recipe, tmp_path, *TWO, *long, *slow_at(7), terminal=os.ttyname(theirs))
    when_waiting(tmp_path, lambda: os.close(ours))
    assert process.wait(timeout=100) == 129
    assert max(steps(tmp_path)) >= 8
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("taken", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_folder_that_is_removed_under_a_run(recipe: Path, tmp_path: Path, taken: bool) -> None:
    """The run holds it again from its next checkpoint on; where another has begun there, it writes none."""
    run_dir = tmp_path / "run"
    process = start(recipe, run_dir, *slow_at(7))

    def remove() -> None:
        shutil.rmtree(run_dir)
        if taken:
            take_lock(run_dir, {})

    when_waiting(run_dir, remove)
    code, output = end(process)
    assert code == int(taken), output
    if taken:
        said = (
            f"error: nothing is saved, for {run_dir} was removed while this run went on: {run_dir} is in use by process"
        )
        assert f"{said} {os.getpid()} on" in output
        assert not steps(run_dir)
    else:
        assert output.count(f"note: {run_dir}/run.lock was removed while this run held it; it is there again") == 1
        assert (run_dir / "config.yaml").exists()
        assert (run_dir / "model" / "modules.json").exists()
        assert not (run_dir / "run.lock").exists()


def child_of(pid: int) -> int:
    """The rank that Lightning started."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            command = status.with_name("cmdline").read_bytes()
            if f"\nPPid:\t{pid}\n" in status.read_text() and b"trainer.__main__" in command:
                return int(status.parent.name)
        except OSError:
            continue
    raise AssertionError(f"process {pid} has no second rank")


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: before Python has started, any ends it."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert caught is not None
    return bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("delay", [0.0, pytest.param(2.0, marks=pytest.mark.slow)])
def test_asked_before_the_first_step(recipe: Path, tmp_path: Path, delay: float) -> None:
    """During imports and loading: nothing to save, so at most the step that was reached is, and the status asks for
    another start."""
    process = start(recipe, tmp_path)
    wait_until(
        lambda: process.poll() is not None or catches(process.pid, signal.SIGUSR1), "had a handler", timeout_s=60
    )
    assert process.poll() is None
    time.sleep(delay)
    process.send_signal(signal.SIGUSR1)
    code, output = end(process)
    assert code == 85, output
    assert "Traceback" not in output
