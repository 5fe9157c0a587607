from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from trainer.checkpoint_path import find_checkpoint
from trainer.config_files import ConfigError
from trainer.manifest import STATE, mark_best, write_checkpoint
from trainer.run_lock import release_lock, take_lock

FIRST, SECOND_RANK, SLURM = {}, {"LOCAL_RANK": "1"}, {"SLURM_JOB_ID": "7"}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3; the second one is the best."""
    folder = tmp_path / "runs" / "a"
    for step in (1, 2, 3):
        write_checkpoint({"w": torch.ones(1)}, folder / f"checkpoints/step-{step:08}", {"step": step})
    mark_best(folder, 2)
    return folder


def _step(found: str | None) -> int | None:
    return None if found is None else int(found[-8:])


def test_words_for_checkpoints(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fit", "validate", "test"):
        assert _step(find_checkpoint("auto", command, run_dir, FIRST)) == 3
        assert _step(find_checkpoint("best", command, run_dir, FIRST)) == 2
        path = run_dir / "checkpoints/step-00000001"
        assert find_checkpoint(str(path), command, run_dir, FIRST) == str(path)
    assert find_checkpoint(None, "validate", run_dir, SLURM) is None
    assert _step(find_checkpoint(None, "fit", run_dir, SLURM)) == 3
    capsys.readouterr()
    assert _step(find_checkpoint("best", "test", run_dir, SECOND_RANK)) == 2
    assert capsys.readouterr().out == "", "one rank says it"


def test_what_is_damaged_is_never_taken(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = [run_dir / f"checkpoints/step-{step:08}" / STATE for step in (1, 2, 3)]
    for state in states[1:]:
        state.write_bytes(state.read_bytes()[:-1])
    assert _step(find_checkpoint("auto", "fit", run_dir, FIRST)) == 1
    assert capsys.readouterr().out.count("is left out: ") == 2
    with pytest.raises(ConfigError, match=r"--ckpt_path best \(.*step-00000002\): .*; auto takes the newest valid one"):
        find_checkpoint("best", "test", run_dir, FIRST)
    states[0].unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint of .* can be trusted: "):
        find_checkpoint("auto", "fit", run_dir, FIRST)


def test_a_checkpoint_of_another_run_wants_a_fresh_directory(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "runs" / "b"
    write_checkpoint({"w": torch.ones(1)}, other / "checkpoints/step-00000007", {"step": 7})
    taken = str(other / "checkpoints/step-00000007")
    with pytest.raises(
        ConfigError, match=rf"^{run_dir} already holds a run; .*: --trainer.default_root_dir {run_dir}-2"
    ):
        find_checkpoint(taken, "fit", run_dir, FIRST)
    for command, folder in (("fit", tmp_path / "fresh"), ("validate", run_dir), ("test", run_dir)):
        assert find_checkpoint(taken, command, folder, FIRST) == taken
    # A requeued job is started by the same words, and has gone on since.
    requeued = {**SLURM, "SLURM_RESTART_COUNT": "1"}
    assert _step(find_checkpoint(taken, "fit", run_dir, requeued)) == 3
    assert find_checkpoint(taken, "fit", tmp_path / "fresh", requeued) == taken
    with pytest.raises(ConfigError, match="already holds a run"):
        find_checkpoint(taken, "fit", run_dir, SLURM)


def test_a_requeued_fit_does_not_go_back_again(run_dir: Path, tmp_path: Path) -> None:
    """Started with a checkpoint of its own run, it goes there once; each requeue goes on from what came behind it."""
    first = str(run_dir / "checkpoints/step-00000001")
    for count in ("", "0"):
        assert _step(find_checkpoint(first, "fit", run_dir, {**SLURM, "SLURM_RESTART_COUNT": count})) == 1
    requeued = {**SLURM, "SLURM_RESTART_COUNT": "1"}
    for wanted in (first, "best", "auto", None):
        assert _step(find_checkpoint(wanted, "fit", run_dir, requeued)) == 3
        assert _step(find_checkpoint(wanted, "fit", run_dir, {**requeued, **SECOND_RANK})) == 3
    assert _step(find_checkpoint("best", "test", run_dir, requeued)) == 2
    with pytest.raises(ConfigError, match="--ckpt_path best: there is no checkpoint in "):
        find_checkpoint("best", "fit", tmp_path / "fresh", requeued)


def test_a_fork_that_ended_before_its_first_checkpoint_begins_again(run_dir: Path, tmp_path: Path) -> None:
    """Its metrics lie behind the step and are dropped; rows before it would stay, and are of another run."""
    taken = str(run_dir / "checkpoints/step-00000003")
    fork = tmp_path / "runs" / "b"
    (fork / "checkpoints" / ".step-00000006.partial").mkdir(parents=True)
    requeued = {**SLURM, "SLURM_RESTART_COUNT": "1"}
    for rows in ("", '{"step": 4, "train/loss": 0.1}\n{"step": 5, "tra'):
        (fork / "metrics.jsonl").write_text(rows)
        for environ in (FIRST, SLURM, requeued):
            assert find_checkpoint(taken, "fit", fork, environ) == taken
    (fork / "metrics.jsonl").write_text('{"step": 3, "train/loss": 0.1}\n{"step": 4, "train/loss": 0.1}\n')
    for environ in (FIRST, SLURM, requeued):
        with pytest.raises(ConfigError, match="already holds a run"):
            find_checkpoint(taken, "fit", fork, environ)


def test_a_fresh_fit_wants_a_fresh_directory(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="already holds a run"):
        find_checkpoint(None, "fit", run_dir, FIRST)
    assert find_checkpoint(None, "fit", run_dir, SECOND_RANK) is None, "the first rank has begun to write there"
    assert find_checkpoint(None, "fit", tmp_path / "fresh", FIRST) is None
    assert find_checkpoint("auto", "fit", tmp_path / "fresh", FIRST) is None
    take_lock(run_dir, FIRST)  # a run that has not ended is not to be gone on with
    with pytest.raises(ConfigError, match=f"{run_dir} is in use by process {os.getpid()} on .*; wait for it"):
        find_checkpoint(None, "fit", run_dir, FIRST)
    release_lock(run_dir, FIRST)
    # Its flags, which make the name of a run, were others: a fit that is to go on does not start anew.
    other = f"; {run_dir} has one: --trainer.default_root_dir {run_dir}"
    with pytest.raises(ConfigError) as refusal:
        find_checkpoint("auto", "fit", run_dir.parent / "x", FIRST, allows=True)
    assert str(refusal.value) == f"--resume.allow: there is no checkpoint in {run_dir.parent / 'x'}{other}"
    assert find_checkpoint("auto", "fit", run_dir.parent / "x", FIRST) is None
    assert capsys.readouterr().out.endswith(f"starting fresh{other}\n")
    for word in ("auto", "best"):
        with pytest.raises(ConfigError, match=f"--ckpt_path {word}: there is no checkpoint in "):
            find_checkpoint(word, "test", tmp_path / "fresh", FIRST)
