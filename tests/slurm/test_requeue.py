"""What `slurm/train.sh` makes of a run that was told to stop, on a real Slurm, with a program of a few lines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.slurm.jobs import NEEDS_SLURM, SCRIPTS, Slurm, stand_in, wait_until

pytestmark = NEEDS_SLURM

# Leaves a checkpoint and waits for USR1; started again, it is done at once.
PROGRAM = """\
folder=runs/pairs/seed=7_job=$SLURM_JOB_ID
mkdir -p "$folder/checkpoints/step-00000009" "$folder/checkpoints/step-00000022"
[[ ${SLURM_RESTART_COUNT:-0} == 0 ]] || { echo "rank $SLURM_PROCID goes on"; exit 0; }
trap 'stopped=1' USR1
echo ready
until [[ ${stopped:-} ]]; do sleep 0.1; done
# Rank 0 is the last to leave, as if it still wrote: the exit of rank 1 must not end it.
[[ $SLURM_PROCID != 0 ]] || { sleep 2; echo written; }
exit 85
"""


def wait_for(slurm: Slurm, number: str, text: str, count: int = 1) -> None:
    log = slurm.log(number)
    wait_until(lambda: log.exists() and log.read_text().count(text) >= count, f"{count} x {text}")


def test_a_preempted_run_is_requeued_and_a_finished_one_is_not_run_again(slurm: Slurm, tmp_path: Path) -> None:
    python = stand_in(tmp_path, PROGRAM)
    number = slurm.submit("--nodes 2", ["configs/pairs.yaml"], python)
    wait_for(slurm, number, "ready", count=2)
    slurm.signal(number, "USR1")
    slurm.start_again(number)
    job = slurm.finished(number)
    folder = f"runs/pairs/seed=7_job={number}"
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), job.log
    assert job.log.count("written\n") == 1
    first, second = job.log.split(f"requeueing job {number} to go on from the checkpoint (restart 1 of at most 50)")
    assert "ended with exit code 85; the first to fail was rank 0 on n1" in first
    assert f"run directory: {folder}; last checkpoint: {folder}/checkpoints/step-00000022" in first
    assert "goes on" not in first
    assert "took no step" not in first
    assert second.count("goes on") == 2
    assert "to go on" not in first + second.replace("goes on", ""), "nobody has to do anything"

    slurm.output(["scontrol", "requeue", number])  # as Slurm does after the loss of a node
    slurm.start_again(number)
    job = slurm.finished(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2")
    assert f"{folder} holds a finished run (job {number}, " in job.log.splitlines()[-1]
    assert job.log.count("goes on") == 2, "it trained again"


@pytest.mark.slow
def test_a_request_while_rank_1_still_starts_is_requeued_at_once(slurm: Slurm, tmp_path: Path) -> None:
    """It leaves by itself, in order; rank 0 waits for it in the meeting of the ranks."""
    late = "trap 'exit 85' USR1; sleep 200 & wait"
    python = stand_in(tmp_path, f'[[ $SLURM_PROCID == 0 ]] || {{ {late}; }}\nexec {sys.executable} "$@"')
    number = slurm.submit("--nodes 2", ["configs/pairs.yaml"], python)
    log = slurm.log(number)
    wait_until(lambda: log.exists() and "GLOBAL_RANK: 0" in log.read_text(), "rank 0 waits", timeout_s=90)
    slurm.signal(number, "USR1")
    slurm.requeued(number)
    said = log.read_text()
    slurm.output(["scancel", number])
    assert "ended with exit code 85; the first to fail was rank 0 on n1" in said
    assert not list(slurm.folder.glob(f"runs/*/*job={number}/run.lock"))


def test_a_requeue_by_slurm_itself_asks_nobody_to_submit_again(slurm: Slurm, tmp_path: Path) -> None:
    """As after the loss of a node: a second job would find the run directory in use."""
    number = slurm.submit("--nodes 2", ["configs/pairs.yaml"], stand_in(tmp_path, PROGRAM))
    wait_for(slurm, number, "ready", count=2)
    slurm.output(["scontrol", "requeue", number])
    slurm.start_again(number)
    job = slurm.finished(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), job.log
    assert job.log.count(f"Slurm has put job {number} back into the queue itself") == 1
    assert "to go on" not in job.log


def test_a_job_that_leaves_in_the_grace_time_of_a_preemption_is_requeued(slurm: Slurm, tmp_path: Path) -> None:
    """By another job, of the partition with the higher priority. Slurm itself would have it fail."""
    python = stand_in(tmp_path, PROGRAM.replace("USR1", "TERM").replace("85", "143"))
    number = slurm.submit("--nodes 2", ["configs/pairs.yaml"], python)
    wait_for(slurm, number, "ready", count=2)
    urgent = "sbatch --parsable --partition urgent --nodes 2 --exclusive --output /dev/null --wrap true"
    slurm.output(urgent.split())
    slurm.start_again(number)
    job = slurm.finished(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), job.log
    first, second = job.log.split(f"requeueing job {number} to go on from the checkpoint (restart 1 of at most 50)")
    assert "ended with exit code 143" in first
    assert second.count("goes on") == 2


@pytest.mark.parametrize(
    ("most", "reason"),
    [
        ("50", "scontrol could not requeue job {}; the checkpoint is kept"),
        ("0", "not requeued: the job was restarted 0 times, TRAINER_MAX_REQUEUES is 0"),
    ],
)
def test_without_a_requeue_the_way_on_is_said(slurm: Slurm, tmp_path: Path, most: str, reason: str) -> None:
    """A scontrol that answers questions and refuses orders, and the limit of requeues. A kill between two renames has
    left the last checkpoint under another name."""
    scontrol = shutil.which("scontrol")
    stand_in(tmp_path, f'[[ $1 != requeue ]] || exit 1; exec {scontrol} "$@"', "scontrol")
    begin = PROGRAM.partition("trap")[0].replace("step-00000022", ".step-00000022.replaced")
    python = stand_in(tmp_path, f"{begin}\nexit 85")
    path = f"{tmp_path}:{slurm.environ['PATH']}"
    options = ["configs/pairs.yaml", "--x.token", "SECRET"]
    job = slurm.run("--nodes 2", options, python, PATH=path, TRAINER_MAX_REQUEUES=most)
    number = job["JobId"]
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "85:0", "0"), job.log
    assert f"; last checkpoint: runs/pairs/seed=7_job={number}/checkpoints/step-00000022\n" in job.log
    assert reason.format(number) in job.log.splitlines()[-2]
    assert job.log.splitlines()[-1] == (
        f"train.sh: to go on: cd {slurm.folder} && sbatch --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 "
        f"{Path(__file__).parents[2]}/slurm/train.sh runs/pairs/seed=7_job={number}/config.yaml --ckpt_path auto"
    )
    assert "SECRET" not in job.log


def test_a_start_without_a_step_shows_the_time_limit(slurm: Slurm, tmp_path: Path) -> None:
    """Of a job that gets less time than the signal comes before its end each start would be as this one."""
    job = slurm.run(
        "--nodes 2 --time 10", ["configs/pairs.yaml"], stand_in(tmp_path, "exit 85"), TRAINER_MAX_REQUEUES="0"
    )
    assert (
        "train.sh: this start took no step; should that repeat, give it more time (sbatch --time): its limit is 10:00, "
        "USR1 comes 120 s before or as --signal says\n"
    ) in job.log


def test_a_job_that_takes_no_step_is_not_requeued_for_ever(slurm: Slurm, tmp_path: Path) -> None:
    """As with a time limit below the signal: each start would end as the one before."""
    number = slurm.submit("--nodes 1", ["configs/pairs.yaml"], stand_in(tmp_path, "exit 85"))
    for _ in range(3):
        slurm.start_again(number)
    job = slurm.finished(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "85:0", "3"), job.log
    assert job.log.endswith("train.sh: not requeued: none of 4 starts took a step\n")


@pytest.mark.parametrize(
    "line",
    [
        'trainer: {default_root_dir: "my runs/one", max_steps: 3}',
        "trainer: {default_root_dir: 'my runs/one'}",
        "trainer: {default_root_dir: my runs/one }",
        "trainer:\n  default_root_dir: my runs/one  # here",
        "trainer:\n  default_root_dir: runs/#1\r",
    ],
)
def test_the_run_directory_of_a_config_is_found(tmp_path: Path, line: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_bytes(f"{line}\n".encode())
    command = [SCRIPTS / "train.sh", "directory", str(config)]
    environ = {**os.environ, "SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    found = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=20, check=True).stdout
    assert found == f"{yaml.safe_load(line)['trainer']['default_root_dir']}\n"


@pytest.mark.parametrize("folder", ["runs/mine", "~/mine"])
def test_a_named_directory_that_is_done_is_not_trained_again(slurm: Slurm, tmp_path: Path, folder: str) -> None:
    """A new job; without the flag it would train, for another run may have the same recipe."""
    python = stand_in(tmp_path, "echo trained")
    home = slurm.folder / "runs"
    named = ["configs/pairs.yaml", f"--trainer.default_root_dir={folder}"]
    place = folder.replace("~", str(home))
    (slurm.folder / place).mkdir(parents=True, exist_ok=True)
    (slurm.folder / place / ".done").unlink(missing_ok=True)
    first, second = (slurm.run("--nodes 1", named, python, HOME=str(home)) for _ in range(2))
    assert [job.log.count("trained\n") for job in (first, second)] == [1, 0]
    assert f"to train it further remove {place}/.done" in second.log
    assert second["ExitCode"] == "0:0"


def test_a_sweep_gives_each_task_its_overrides_and_requeues_it_alone(slurm: Slurm, tmp_path: Path) -> None:
    program = '[[ $SLURM_ARRAY_TASK_ID$SLURM_RESTART_COUNT == 1 ]] && exit 85; printf "<%s> " "$@"; echo'
    python = stand_in(tmp_path, program)
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# rates\n\n--model.learning_rate 1e-5\n--tracking.tags '[a, b]' --data.batch_size 8\n")
    arguments = ["configs/pairs.yaml", "--overrides", str(sweep), "--seeds", "1,2", "--trainer.max_epochs", "3"]
    array = slurm.submit("--array=0-3", arguments, python, "sweep.sh")
    numbers = slurm.numbers(array)
    slurm.start_again(f"{array}_1")
    jobs = [slurm.finished(number) for number in numbers]
    assert [job["ExitCode"] for job in jobs] == ["0:0"] * 4
    assert [job["Restarts"] for job in jobs] == ["0", "1", "0", "0"]
    flags = ["<--model.learning_rate> <1e-5>", "<--tracking.tags> <[a, b]> <--data.batch_size> <8>"]
    for task, job in enumerate(jobs):
        words = f"{flags[task // 2]} <--seed_everything> <{task % 2 + 1}> <--trainer.max_epochs> <3>"
        group = "<--trainer.devices> <1> <--tracking.group> <pairs>"
        assert job.log.count(f"{group} {words} \n") == 1, job.log


def test_a_sweep_says_what_its_array_misses(slurm: Slurm, tmp_path: Path) -> None:
    python = stand_in(tmp_path, "exit 0")
    beyond, short = (
        slurm.numbers(slurm.submit(f"--array={tasks}", ["configs/pairs.yaml", "--seeds", "1,2,3"], python, "sweep.sh"))
        for tasks in ("3", "0-2:2")
    )
    refused = slurm.finished(beyond[0])
    assert refused["ExitCode"] == "2:0"
    assert "task 3 of the array has no run: there are 3 (1 x 3); --array=0-2" in refused.log
    assert "1 of 3 runs have no task in this array; all of them: --array=0-2" in slurm.finished(short[-1]).log


def test_a_sweep_with_an_open_quote_trains_nothing(slurm: Slurm, tmp_path: Path) -> None:
    """Nor the runs of its other lines."""
    python = stand_in(tmp_path, "echo trained")
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--data.batch_size 8\n--tracking.name=today's --data.batch_size 64\n")
    array = slurm.submit("--array=0-1", ["configs/pairs.yaml", "--overrides", str(sweep)], python, "sweep.sh")
    for job in map(slurm.finished, slurm.numbers(array)):
        assert job["ExitCode"] == "2:0", job.log
        sentence = "a quote has no end in this line: --tracking.name=today's --data.batch_size 64"
        assert job.log == f"sweep.sh: {sweep}: {sentence}\n"


NAMED = "--trainer.default_root_dir"


@pytest.mark.parametrize(
    ("lines", "seeds", "config", "flags"),
    [
        ([], "1,2", "", [NAMED, "runs/one"]),
        ([], "1,2", "trainer: {default_root_dir: runs/one}", []),
        (["--data.batch_size 8", "--data.batch_size 9"], "1", "trainer: {default_root_dir: runs/one}", []),
        (["--data.batch_size 8", "--data.batch_size 9"], "1", "", ["--config=configs/more.yaml"]),
        ([f"{NAMED} runs/one", f"{NAMED}=./x/../runs/one --data.batch_size 9"], "1", "", []),
        ([f"{NAMED} runs/one", f"{NAMED} runs/two"], "1,2", "", []),
    ],
)
def test_a_sweep_whose_runs_would_share_a_folder_is_refused(
    slurm: Slurm, tmp_path: Path, lines: list[str], seeds: str, config: str, flags: list[str]
) -> None:
    """The second would find the first one finished, and end with 0 untrained."""
    python = stand_in(tmp_path, "echo trained")
    (slurm.folder / "configs/more.yaml").write_text("trainer:\n  default_root_dir: 'runs/one'\n")
    (slurm.folder / "configs/base.yaml").write_text(f"{config}\n")
    (tmp_path / "sweep.txt").write_text("\n".join(lines))
    overrides = ["--overrides", str(tmp_path / "sweep.txt")] if lines else []
    arguments = ["configs/base.yaml", *overrides, "--seeds", seeds, *flags]
    number = max(1, len(lines)) * len(seeds.split(","))
    for job in map(slurm.finished, slurm.numbers(slurm.submit("--array=0-1", arguments, python, "sweep.sh"))):
        assert job["ExitCode"] == "2:0", job.log
        assert job.log.replace("./x/../", "") == (
            f"sweep.sh: several of the {number} runs have trainer.default_root_dir runs/one, which holds one: leave it "
            "out, and each gets a folder of its own\n"
        )


def test_a_sweep_may_name_a_folder_for_each_run(slurm: Slurm, tmp_path: Path) -> None:
    """In place of the one that the config has for all."""
    python = stand_in(tmp_path, 'echo "trained $*"')
    (slurm.folder / "configs/base.yaml").write_text("trainer: {default_root_dir: runs/one}\n")
    (tmp_path / "sweep.txt").write_text(f"{NAMED} runs/first\n{NAMED}=runs/second\n")
    arguments = ["configs/base.yaml", "--overrides", str(tmp_path / "sweep.txt"), "--data.batch_size", "8"]
    numbers = slurm.numbers(slurm.submit("--array=0-1", arguments, python, "sweep.sh"))
    for job, flag in zip(map(slurm.finished, numbers), (f"{NAMED} runs/first", f"{NAMED}=runs/second"), strict=True):
        assert job["ExitCode"] == "0:0", job.log
        assert f"{flag} --data.batch_size 8\n" in job.log
