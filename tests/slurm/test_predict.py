"""`trainer predict` and `trainer mine` on two nodes of a real Slurm, by sbatch and by srun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.slurm.jobs import NEEDS_SLURM, Slurm, stand_in, wait_until
from trainer.cli import main
from trainer.predict.shards import open_shards

pytestmark = NEEDS_SLURM


def embeddings(folder: Path) -> np.ndarray:
    return np.concatenate(list(open_shards(folder)[0].pieces()))


@pytest.mark.slow  # two ranks of one machine do so in tests/predict
def test_two_nodes_write_what_one_process_writes(slurm: Slurm, tiny_encoder: Path, tmp_path: Path) -> None:
    """The same flags three times: under sbatch, under srun, here."""
    data = next(slurm.folder.glob("*train*.jsonl*"))
    flags = ["predict", "--model", str(tiny_encoder), "--data", str(data), "--text", "sentence1", "--shard-rows", "9"]
    job = slurm.run("--nodes 2", [*flags, "--out", "by-sbatch"])
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), job.log
    assert " on 2 ranks: " in job.log
    assert "preflight" not in job.log

    step = ["srun", "--nodes", "2", "--ntasks-per-node", "1", sys.executable, "-m", "trainer", *flags]
    done = subprocess.run(
        [*step, "--out", "by-srun"],
        cwd=slurm.folder,
        env={**slurm.environ, "MASTER_ADDR": "127.0.0.1"},  # no DNS knows these nodes
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert " on 2 ranks: " in done.stdout

    assert main([*flags, "--out", str(tmp_path / "alone"), "--accelerator", "cpu"]) == 0
    for name in ("by-sbatch", "by-srun"):
        assert_allclose(embeddings(slurm.folder / name), embeddings(tmp_path / "alone"), atol=1e-6)


def test_sbatch_runs_mine_as_it_runs_fit(slurm: Slurm, tmp_path: Path) -> None:
    """Its flags, no checks of a recipe, and back into the queue with 85."""
    words = ["--data", "pairs.jsonl", "--out", "mined.jsonl"]
    job = slurm.run("--nodes 2", ["mine", *words], "/bin/echo")
    assert job.log.splitlines().count(f"-m trainer mine --accelerator cpu {' '.join(words)}") == 2, job.log
    assert "preflight" not in job.log
    number = slurm.submit("--nodes 2", ["mine", *words], stand_in(tmp_path, "exit 85"))
    said = f"train.sh: requeueing job {number} to go on from the checkpoint (restart 1 of at most 50)"
    wait_until(lambda: slurm.log(number).exists() and said in slurm.log(number).read_text(), said)
    slurm.requeued(number)  # a job on its way there can't be cancelled
    slurm.output(["scancel", number])
    slurm.finished(number)
