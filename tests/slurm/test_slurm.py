"""`slurm/train.sh` on a real two-node Slurm: the same run as without it, and honest exit codes.

The nodes also own two GPUs in name only, to see without a GPU what the script makes of `--gpus-per-node`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import NEEDS_SLURM, Slurm, cluster, processes_of, stand_in, wait_until

pytestmark = NEEDS_SLURM


def test_two_nodes_give_the_weights_of_two_local_ranks(slurm: Slurm) -> None:
    """Where the ranks run changes no bit; dropout is on, so one process would give other weights."""
    from safetensors.numpy import load_file
    from sentence_transformers import SentenceTransformer

    job = slurm.run("--nodes 2", ["configs/pairs.yaml", "--trainer.default_root_dir", "runs/slurm"])
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), job.log
    assert (job["NumNodes"], job["NumTasks"], job["NodeList"]) == ("2", "2", "n[1-2]")
    assert job.log.splitlines()[-2].endswith("on n[1-2] ended with exit code 0")
    last = max((slurm.folder / "runs/slurm/checkpoints").glob("step-*"))
    assert job.log.splitlines()[-1] == (
        f"train.sh: run directory: runs/slurm; last checkpoint: {last.relative_to(slurm.folder)}"
    )
    assert (slurm.folder / "runs/slurm/.done").read_text().startswith(f"job {job['JobId']}, ")
    for node in ("n1", "n2"):
        assert f"preflight {node}: data ok" in job.log

    local = [sys.executable, "-m", "trainer", "fit", "--config", "configs/pairs.yaml"]
    local += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    local += ["--trainer.default_root_dir", "runs/local"]
    done = subprocess.run(local, cwd=slurm.folder, capture_output=True, text=True, timeout=140, check=False)
    assert done.returncode == 0, done.stderr

    weights, expected = (
        load_file(slurm.folder / f"runs/{name}/model/model.safetensors") for name in ("slurm", "local")
    )
    assert weights.keys() == expected.keys()
    assert all((weights[name] == expected[name]).all() for name in expected)
    texts = ["a man is eating", "the weather is fine"]
    first, second = (
        SentenceTransformer(str(slurm.folder / f"runs/{name}/model"), device="cpu").encode(texts)
        for name in ("slurm", "local")
    )
    assert (first == second).all()


@pytest.mark.slow
def test_the_exactness_check_has_the_ranks_of_its_step(slurm: Slurm) -> None:
    """As the page of the cluster writes it; the devices of a hardware file give way, as they do to train.sh."""
    (slurm.folder / "configs/two.yaml").write_text("trainer: {accelerator: cpu, devices: 2}\n")
    step = ["srun", "--nodes", "2", "--ntasks-per-node", "1", sys.executable, "-m", "trainer", "check", "--exact"]
    said = slurm.output(
        [*step, "--config", "configs/pairs.yaml", "--config", "configs/two.yaml"],
        MASTER_ADDR="127.0.0.1",  # no DNS knows these nodes
    )
    assert "2 ranks against 1 process: CosineSimilarity, 15 rows a step" in said
    assert "exact: pass" in said


@pytest.mark.slow  # tests/test_trainer_refusals.py has what the variables of Slurm decide
def test_tasks_under_salloc_are_the_ranks_of_one_run(slurm: Slurm) -> None:
    """salloc calls its jobs interactive, which to Lightning means that nothing here is a rank."""
    step = ["srun", "--nodes", "1", "--ntasks-per-node", "2", sys.executable, "-m", "trainer", "fit"]
    flags = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.default_root_dir", "runs/salloc"]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    slurm.output(
        ["salloc", "--nodes", "1", "--ntasks", "2", *step, "--config", "configs/pairs.yaml", *flags, *two],
        MASTER_ADDR="127.0.0.1",
    )
    (manifest,) = (slurm.folder / "runs/salloc/checkpoints").glob("step-*/manifest.json")
    assert json.loads(manifest.read_text())["ranks"] == 2


def test_an_error_of_the_program_fails_the_job_with_its_code(slurm: Slurm) -> None:
    job = slurm.run("--nodes 2", ["configs/pairs.yaml", "--model.learning_rat", "0.1"])
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), job.log
    assert "did you mean" in job.log
    assert "ended with exit code 2" in job.log


def test_a_missing_config_is_one_sentence_before_anything_starts(slurm: Slurm) -> None:
    job = slurm.run("--nodes 2", ["configs/pears.yaml"])
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert job.log == f"train.sh: there is no config file configs/pears.yaml in {slurm.folder}\n"


def test_the_first_rank_to_fail_gives_the_exit_code(slurm: Slurm, tmp_path: Path) -> None:
    """srun by itself would say 143, the code of the ranks that it ends because of the first."""
    python = stand_in(tmp_path, "[[ $SLURM_PROCID == 1 ]] && exit 7; sleep 200")
    begin = time.monotonic()
    job = slurm.run("--nodes 2", ["configs/pairs.yaml"], python)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "7:0"), job.log
    assert "ended with exit code 7; the first to fail was rank 1 on n2" in job.log
    assert time.monotonic() - begin < 200, "the other rank has slept to its end"
    assert list(slurm.folder.glob(".slurm-*")) == []


@pytest.mark.parametrize(
    ("options", "tasks", "place"),
    [
        ("--nodes 1", 1, "cpu --trainer.num_nodes 1 --trainer.devices 1"),
        ("--nodes 1 --ntasks-per-node 2", 2, "cpu --trainer.num_nodes 1 --trainer.devices 2"),
        ("--nodes 2 --gpus-per-node 2", 4, "gpu --trainer.num_nodes 2 --trainer.devices 2"),
        ("--nodes 1 --gres gpu:2 --cpus-per-gpu 1", 2, "gpu --trainer.num_nodes 1 --trainer.devices 2"),
    ],
)
def test_one_task_for_each_device(slurm: Slurm, options: str, tasks: int, place: str) -> None:
    """The command of every task: configs, what Slurm decides, and the user's own words last."""
    (slurm.folder / "configs" / "place.yml").write_text("trainer: {precision: 32-true}\n")
    own = ["--data.batch_size=8", "--tracking.tags", "[a b]"]
    job = slurm.run(options, ["configs/pairs.yaml", "configs/place.yml", *own], "/bin/echo")
    files = "--config configs/pairs.yaml --config configs/place.yml"
    words = f" {files} --trainer.accelerator {place} {' '.join(own)}"
    assert job.log.splitlines().count(f"-m trainer fit{words}") == tasks, job.log
    assert job.log.splitlines().count(f"-m trainer preflight{words}") == int(job["NumNodes"]), "once on each node"
    assert job["JobState"] == "COMPLETED"


def test_gpus_that_may_fall_unevenly_are_refused(slurm: Slurm) -> None:
    job = slurm.run("--nodes 2 --gpus 2", ["configs/pairs.yaml"])
    assert job["ExitCode"] == "2:0"
    assert "--gpus=2 may fall unevenly on 2 nodes; ask for --gpus-per-node" in job.log


def test_a_second_start_finds_the_cluster_and_stop_leaves_no_process(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    first, second = cluster("start", folder), cluster("start", folder)
    try:
        assert first.stdout == second.stdout == f"export SLURM_CONF={folder}/slurm.conf\n", first.stderr + second.stderr
        assert "already running" in second.stderr
        assert len([words for words in processes_of(folder) if words.startswith(("munged", "slurm"))]) == 4
        environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        command = ["sbatch", "--output", "/dev/null", "--wrap", f"cd {folder} && exec sleep 300"]
        subprocess.run(command, env=environ, capture_output=True, timeout=60, check=True)
        wait_until(lambda: any(words.startswith("sleep 300") for words in processes_of(folder)), "a job")
    finally:
        stopped = cluster("stop", folder)
    assert stopped.returncode == 0
    assert processes_of(folder) == []
    assert cluster("status", folder).returncode == 3


def test_without_slurm_start_names_the_packages(tmp_path: Path) -> None:
    for name in ("bash", "mkdir", "realpath", "stat"):
        path = shutil.which(name)
        assert path is not None
        (tmp_path / name).symlink_to(path)
    refused = cluster("start", tmp_path / "cluster", PATH=str(tmp_path))
    assert refused.returncode == 1
    assert "sbatch srun sinfo not found; install Slurm: apt-get update && apt-get install" in refused.stderr
