"""One run on W&B over three requeues of a real job on two nodes. What its offline files hold is read by W&B's reader;
tests/tracking/test_wandb.py shows the same on processes without a cluster, a SIGKILL among them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.slurm.jobs import NEEDS_SLURM, Slurm, wait_until
from tests.tracking.small_run import read_metrics
from tests.tracking.test_wandb import finished_records, inspect
from trainer.demo_data import write_pairs
from trainer.tracking.runs import read_log
from trainer.tracking.wandb_runs import offline_folders, read_offline

pytestmark = [*NEEDS_SLURM, pytest.mark.slow]  # four starts of Python on two ranks

LAST = 400  # steps: 16 epochs of 100 rows in batches of 4
SCORE = "eval/dev/spearman_cosine"
# A key, a hub token, an address with a password: none of them may be stored.
SECRETS = {"WANDB_API_KEY": "SECRET" + 34 * "a", "HF_TOKEN": "hf_SECRETabcdefghijkl"}
NAME = "run of https://bob:SECRET@example.com/x.git"


def last_step(run_dir: Path) -> int:
    return max((row["step"] for row in read_log(run_dir / "metrics.jsonl")), default=0)


def test_three_requeues_are_one_run(slurm: Slurm, tmp_path: Path) -> None:
    """One id; each step once, in rising order; best and last values of the whole; finished in the last part alone."""
    run_dir = slurm.folder / "runs/tracked"
    _, dev = write_pairs(tmp_path, 1, 300, seed=5)
    arguments = ["configs/pairs.yaml", "--trainer.default_root_dir", "runs/tracked", "--tracking.wandb", "offline"]
    arguments += ["--data.batch_size", "4", "--trainer.max_epochs", "16", "--trainer.log_every_n_steps", "1"]
    arguments += ["--data.validation.path", str(dev), "--trainer.val_check_interval", "3", "--tracking.name", NAME]
    # So high in the end that no evaluation is as good as those of the first steps.
    arguments += ["--model.learning_rate", "0.3", "--model.warmup_ratio", "0.9"]
    number = slurm.submit("--nodes 2", arguments, TRAINER_PREFLIGHT="0", OMP_NUM_THREADS="1", **SECRETS)
    begun = 0
    for _ in range(3):
        wait_until(lambda begun=begun: last_step(run_dir) >= begun + 10, "ten more steps", timeout_s=120)
        slurm.signal(number, "USR1")
        slurm.start_again(number)
        begun = last_step(run_dir)
    job = slurm.finished(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "3"), job.log

    folders = offline_folders(run_dir / "wandb")
    assert len(folders) == 4
    axis, steps, ids, exits, preempted, restarts = [], [], set(), [], [], []
    for folder in folders:
        (fragment,) = folder.glob("run-*.wandb")
        found = finished_records(fragment)
        run = next(record["run"] for record in found if "run" in record)
        ids.add(run["run_id"])
        restarts.append(run["config"]["update"]["run"]["slurm"].get("restart_count", "0"))
        history = [record["history"]["item"] for record in found if "history" in record]
        axis += [item["trainer/global_step"] for item in history]
        steps.append([item["trainer/global_step"] for item in history if "train/loss" in item])
        exits.append([record["exit"].get("exit_code", 0) for record in found if "exit" in record])
        preempted.append(any("preempting" in record for record in found))
    assert ids == {(run_dir / "wandb_id").read_text().strip()}
    assert restarts == ["0", "1", "2", "3"]
    assert all(len(part) >= 10 for part in steps)
    assert [step for part in steps for step in part] == list(range(1, LAST + 1))
    assert axis == sorted(axis), "evaluations, too"
    assert exits == [[85], [85], [85], [0]]
    assert preempted == [True, True, True, False]

    rows = read_metrics(run_dir)
    summary = json.loads(inspect(fragment, "--summary"))["summary"]
    for metric, which in ((SCORE, max), ("train/loss", min)):
        values = [row[metric] for row in rows if metric in row and row["step"]]  # step 0 is the untouched base
        assert summary[metric] == {which.__name__: which(values), "last": values[-1]}
    best = max((row for row in rows if SCORE in row and row["step"]), key=lambda row: row[SCORE])
    assert best["step"] < steps[-1][0], "the last process would know it by itself"
    (merged,) = read_offline(folders)
    assert [(row["step"], row[SCORE]) for row in merged.rows if SCORE in row] == [
        (row["step"], row[SCORE]) for row in rows if SCORE in row
    ]
    stored = [path for path in run_dir.rglob("*") if path.is_file()]
    assert [path for path in stored if b"SECRET" in path.read_bytes()] == []
