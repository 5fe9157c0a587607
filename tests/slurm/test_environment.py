"""Where the scripts find Python, what a site's file adds, and what a node is refused for; on a real Slurm."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import NEEDS_SLURM, SCRIPTS, Slurm, stand_in

pytestmark = NEEDS_SLURM

PROGRAM = 'echo "task in ${INSIDE:-nothing}: $3 ${NCCL_SOCKET_IFNAME:-}"'


def environment(kind: str, folder: Path) -> str:
    """Makes an environment of a kind whose python is PROGRAM; returns its name for TRAINER_ENV."""
    (folder / "env/bin").mkdir(parents=True)
    stand_in(folder / "env/bin", PROGRAM)
    activate = f"export INSIDE={kind} PATH={folder}/env/bin:$PATH"
    (folder / "env/bin/activate").write_text(activate + "\n")
    (folder / f"image.{kind}").touch()
    if kind == "conda":  # what conda's hook defines, with a variable that nobody has set
        stand_in(folder, f"echo 'conda() {{ : $unset; [[ $* == \"activate mine\" ]] && {activate}; }}'", "conda")
        return "conda:mine"
    if kind == "sif":  # enters the image and runs the command there
        asked = f"exec --nv --bind $PWD --pwd $PWD {folder}/image.sif"
        stand_in(folder, f'[[ "${{*:1:7}}" == "{asked}" ]] || exit 3; {activate}; exec "${{@:8}}"', "apptainer")
        return str(folder / "image.sif")
    if kind == "sqsh":  # srun with the options of pyxis, which enter the image
        srun = f"""
        while [[ $1 == -* ]]; do
            case $1 in
                --container-image={folder}/image.sqsh) {activate} ;;
                --container-mounts=$PWD:$PWD | --container-workdir=$PWD) ;;
                *) options+=("$1") ;;
            esac
            shift
        done
        exec /usr/bin/srun "${{options[@]}}" "$@\""""
        stand_in(folder, srun, "srun")
        return str(folder / "image.sqsh")
    return str(folder / "env")


@pytest.mark.parametrize("kind", ["venv", "conda", "sif", "sqsh"])
def test_one_variable_names_the_environment(slurm: Slurm, tmp_path: Path, kind: str) -> None:
    """All tasks of all nodes run in there, and see what the site's file exports."""
    name = environment(kind, tmp_path)
    site = tmp_path / "site.sh"
    site.write_text("false\nexport NCCL_SOCKET_IFNAME=$unset_here$TRAINER_SITE\n")  # not written for set -eu
    path = f"{tmp_path}:{slurm.environ['PATH']}"
    given = {"TRAINER_ENV": name, "TRAINER_SITE": str(site), "PATH": path}
    job = slurm.run("--nodes 2", ["configs/pairs.yaml"], "python", **given)
    assert job.log.count(f"task in {kind}: fit {site}\n") == 2, job.log
    assert job["ExitCode"] == "0:0"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"TRAINER_ENV": "nowhere"}, "TRAINER_ENV=nowhere is no virtual environment, conda:NAME or image"),
        ({"TRAINER_ENV": "no.sif"}, "TRAINER_ENV=no.sif: there is no such image"),
        ({"TRAINER_ENV": "conda:mine"}, "TRAINER_ENV=conda:mine can't be activated"),
        ({"TRAINER_SITE": "no.sh"}, "TRAINER_SITE=no.sh is no file"),
    ],
)
def test_an_environment_that_is_not_there(slurm: Slurm, given: dict[str, str], sentence: str) -> None:
    job = slurm.run("--nodes 1", ["configs/pairs.yaml"], **{"CONDA_EXE": "no-conda", **given})
    assert job["ExitCode"] == "2:0"
    assert sentence in job.log


def test_the_example_of_a_site_changes_nothing_as_shipped() -> None:
    script = "diff <(env -u _ env) <(source site.example.sh && env -u _ env)"
    subprocess.run(["bash", "-eu", "-c", script], cwd=SCRIPTS, timeout=20, check=True)


def test_a_node_that_fails_a_check_is_named_and_nothing_trains(slurm: Slurm, tmp_path: Path) -> None:
    """The second node has no libraries; the program is the real one."""
    program = f"""\
    [[ $SLURMD_NODENAME != n2 ]] || export PYTHONPATH={tmp_path}/broken:$PYTHONPATH
    exec {sys.executable} "$@\""""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\n{program}\n")
    python.chmod(0o755)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/datasets.py").write_text("raise ImportError('no libarrow.so')\n")
    job = slurm.run("--nodes 2", ["configs/pairs.yaml", "--trainer.default_root_dir", "runs/broken"], python)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), job.log
    assert re.search("^preflight n2: imports FAILED: .*: no libarrow.so; is this the environment", job.log, re.M)
    assert "preflight n1: data ok: 2 files" in job.log
    assert "the checks before the run failed: the lines above name node, check and remedy" in job.log
    assert not (slurm.folder / "runs/broken/metrics.jsonl").exists()


def test_debug_runs_on_a_node_with_the_terminal_attached(slurm: Slurm, tmp_path: Path) -> None:
    """What is typed reaches the program, and debug.yaml is the last config."""
    python = stand_in(tmp_path, 'read -r -p "ask> " word; echo "heard $word on $SLURMD_NODENAME: $*"')
    mine, theirs = pty.openpty()
    process = subprocess.Popen(
        [SCRIPTS / "debug.sh", "--nodelist", "n2", "configs/pairs.yaml", "--model.max_tokens", "64"],
        cwd=slurm.folder,
        env={**slurm.environ, "TRAINER_PYTHON": str(python)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said, deadline, answered = "", time.monotonic() + 60, False
    try:
        while "exit code" not in said:
            assert time.monotonic() < deadline, said
            if select.select([mine], [], [], 0.2)[0]:
                said += os.read(mine, 4096).decode()
            if "ask> " in said and not answered:
                os.write(mine, b"hello\n")
                answered = True
        process.wait(timeout=20)
    finally:
        process.kill()
        os.close(mine)
    assert "heard hello on n2: -m trainer fit --config configs/pairs.yaml --config " in said
    assert "configs/hardware/debug.yaml --trainer.accelerator cpu" in said
    assert "--model.max_tokens 64" in said
    assert "ended with exit code 0" in said
