"""`slurm/train.sh` on a real two-node Slurm: the same run as without it, and honest exit codes.

The nodes also own two GPUs in name only, to see without a GPU what the script makes of `--gpus-per-node`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.jobs import Slurm, cluster, processes_of, wait_until

MISSING = [
    name for name in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(name, path="/usr/sbin:/usr/bin")
]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed ({', '.join(MISSING)} not found)"),
]

CONFIG = """\
seed_everything: 7
model:
  encoder: {{backbone: {encoder}, max_length: 32}}
  loss: {{class_path: CosineSimilarity}}
  learning_rate: 1.0e-3
data:
  train: [{{path: {train}, columns: {columns}, score_range: [0, 5]}}]
  validation: [{{name: dev, path: {dev}, columns: {columns}, score_range: [0, 5], evaluator: STS}}]
  batch_size: 15
trainer: {{max_epochs: 1, val_check_interval: 4}}
tracking: {{wandb: "off"}}
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Iterator[Slurm]:
    from trainer.demo_data import write_pairs

    project, state = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("slurm")
    train, dev = write_pairs(project, 100, 20)
    columns = "{anchor: sentence1, positive: sentence2, score: score}"
    (project / "configs").mkdir()
    config = CONFIG.format(encoder=tiny_encoder, train=train, dev=dev, columns=columns)
    (project / "configs" / "pairs.yaml").write_text(config)

    try:
        started = cluster("start", state, TRAINER_SLURM_FAKE_GPUS="2")
        assert started.returncode == 0, started.stderr
        yield Slurm({**os.environ, "SLURM_CONF": started.stdout.strip().partition("=")[2]}, project)
    finally:
        cluster("stop", state)
    assert processes_of(state) == []


def stand_in(folder: Path, script: str) -> Path:
    """A program in Python's place: for what happens around it."""
    path = folder / "python"
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


def test_two_nodes_give_the_weights_of_two_local_ranks(slurm: Slurm) -> None:
    """Where the ranks run changes no bit; dropout is on, so one process would give other weights."""
    from safetensors.numpy import load_file
    from sentence_transformers import SentenceTransformer

    job = slurm.run("--nodes 2", ["configs/pairs.yaml", "--trainer.default_root_dir", "runs/slurm"])
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), job.log
    assert (job["NumNodes"], job["NumTasks"], job["NodeList"]) == ("2", "2", "n[1-2]")
    assert job.log.splitlines()[-1].endswith("on n[1-2] ended with exit code 0; run directory: runs/slurm")

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


def test_an_error_of_the_program_fails_the_job_with_its_code(slurm: Slurm) -> None:
    job = slurm.run("--nodes 2", ["configs/pairs.yaml", "--model.learning_rat", "0.1"])
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), job.log
    assert "did you mean" in job.log
    assert "ended with exit code 2" in job.log.splitlines()[-1]


def test_a_missing_config_is_one_sentence_before_anything_starts(slurm: Slurm) -> None:
    job = slurm.run("--nodes 2", ["configs/pears.yaml"])
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert job.log == f"train.sh: there is no config file configs/pears.yaml in {slurm.folder}\n"


def test_the_first_rank_to_fail_gives_the_exit_code(slurm: Slurm, tmp_path: Path) -> None:
    """srun by itself would say 143, the code of the ranks that it ends because of the first."""
    python = stand_in(tmp_path, "[[ $SLURM_PROCID == 1 ]] && exit 85; sleep 100")
    begin = time.monotonic()
    job = slurm.run("--nodes 2", ["configs/pairs.yaml"], python)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "85:0"), job.log
    assert time.monotonic() - begin < 60
    assert list(slurm.folder.glob(".slurm-*")) == []


def test_a_signal_reaches_the_program(slurm: Slurm, tmp_path: Path) -> None:
    """USR1 arrives in the program, past the shells around it, whose exit code then is the job's."""
    python = stand_in(tmp_path, 'trap "exit 85" USR1; echo ready; while true; do sleep 0.1; done')
    number = slurm.submit("--nodes 1", ["configs/pairs.yaml"], python)
    wait_until(lambda: slurm.log(number).exists() and "ready" in slurm.log(number).read_text(), "ready")
    slurm.signal(number, "USR1")
    job = slurm.finished(number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "85:0"), job.log


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
    """The command of every task: strategy, configs, what Slurm decides, and the user's own words last."""
    (slurm.folder / "configs" / "place.yml").write_text("trainer: {precision: 32-true}\n")
    own = ["--data.batch_size=8", "--tracking.tags", "[a b]"]
    job = slurm.run(options, ["configs/pairs.yaml", "configs/place.yml", *own], "/bin/echo")
    strategy = " --trainer.strategy ddp" if tasks > 1 else ""
    files = "--config configs/pairs.yaml --config configs/place.yml"
    command = f"-m trainer fit{strategy} {files} --trainer.accelerator {place} {' '.join(own)}"
    assert job.log.splitlines().count(command) == tasks, job.log
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
