"""Two processes never share a run directory; a dead one is no obstacle. Real processes die here."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainer import run_lock
from trainer.config_files import ConfigError
from trainer.run_lock import FILE_NAME, keep_lock, release_lock, take_lock

HOLD = "import os, sys, time; from pathlib import Path; from trainer.run_lock import take_lock\n" + (
    "take_lock(Path(sys.argv[1]), os.environ); print('held', flush=True); time.sleep(60)"
)


def hold(run_dir: Path, **environ: str) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(run_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environ})
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@contextmanager
def holding(run_dir: Path, **environ: str) -> Iterator[subprocess.Popen]:
    """A process that holds it, and is dead behind the block."""
    process = hold(run_dir, **environ)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.timeout(100)
def test_second_is_refused_and_a_dead_one_is_taken_over(tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        with pytest.raises(ConfigError) as error:
            take_lock(tmp_path, {})
        assert str(error.value) == (
            f"{tmp_path} is in use by process {process.pid} on {socket.gethostname()}; wait for it, or give another "
            f"--trainer.default_root_dir {tmp_path}-2"
        )
    said = take_lock(tmp_path, {})
    assert said is not None
    assert f"taken over from process {process.pid} on" in said
    assert take_lock(tmp_path, {}) is None  # the same process once more
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    (tmp_path / FILE_NAME).unlink()


def test_a_lock_that_another_has_taken_over_meanwhile_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have read that the old holder is dead; a real process holds it by the time that this one moves it away."""
    lock_of(tmp_path, host=socket.gethostname(), pid=2**22 + 1)
    others: list[subprocess.Popen] = []
    judge = run_lock._is_alive

    def judge_slowly(*args: dict) -> bool | None:
        verdict = judge(*args)
        if not others:
            others.append(hold(tmp_path))
        return verdict

    monkeypatch.setattr(run_lock, "_is_alive", judge_slowly)
    try:
        with pytest.raises(ConfigError, match=r"is in use by process"):
            take_lock(tmp_path, {})
        assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == others[0].pid
    finally:
        others[0].kill()
        others[0].wait(10)


def test_a_lock_that_was_removed_is_taken_again_unless_another_has_it(tmp_path: Path) -> None:
    take_lock(tmp_path, {})
    assert keep_lock(tmp_path, {}) is None
    (tmp_path / FILE_NAME).unlink()
    assert keep_lock(tmp_path, {}) == f"{tmp_path / FILE_NAME} was removed while this run held it; it is there again"
    assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == os.getpid()
    (tmp_path / FILE_NAME).unlink()
    with holding(tmp_path) as process, pytest.raises(ConfigError, match=f"in use by process {process.pid} on"):
        keep_lock(tmp_path, {})


def test_only_the_holder_releases(tmp_path: Path) -> None:
    take_lock(tmp_path, {})
    release_lock(tmp_path, {"SLURM_JOB_ID": "7"})
    assert (tmp_path / FILE_NAME).exists()
    release_lock(tmp_path, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_read_only_by_now_does_not_hide_why_a_run_ends(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True, timeout=20)
    try:
        take_lock(tmp_path, {})
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True, timeout=20)
        release_lock(tmp_path, {})
        assert (tmp_path / FILE_NAME).exists()
    finally:
        subprocess.run(["umount", tmp_path], check=True, timeout=20)


def lock_of(tmp_path: Path, **changes: object) -> Path:
    holder = {"host": "elsewhere", "pid": 1, "started": "1", "job": None, "restart": 0, **changes}
    (tmp_path / FILE_NAME).write_text(json.dumps(holder))
    return tmp_path


def test_another_host_without_slurm_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"process 1 on elsewhere; nobody here can tell .* remove .*run.lock"):
        take_lock(lock_of(tmp_path), {})


def test_a_pid_that_was_given_to_another_process_is_dead(tmp_path: Path) -> None:
    said = take_lock(lock_of(tmp_path, host=socket.gethostname(), pid=os.getpid(), started="12"), {})
    assert said is not None
    assert "taken over" in said
    (tmp_path / FILE_NAME).unlink()


@pytest.mark.parametrize(("restart", "free"), [("1", True), ("0", False)])
def test_a_requeued_job_takes_over_from_itself(tmp_path: Path, restart: str, free: bool) -> None:
    """On another node than before: its first start can't run any more."""
    environ = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": restart}
    lock_of(tmp_path, job="77")
    if free:
        assert "Slurm job 77, which has ended" in str(take_lock(tmp_path, environ))
        (tmp_path / FILE_NAME).unlink()
    else:
        with pytest.raises(ConfigError, match="Slurm job 77"):
            take_lock(tmp_path, environ)


@pytest.mark.parametrize(
    ("printed", "code", "free"),
    [
        ("RUNNING", 0, False),
        ("STOPPED", 0, False),  # scancel --signal=STOP: its processes wait for CONT
        ("SIGNALING", 0, False),
        ("COMPLETED", 0, True),
        ("OUT_OF_MEMORY", 0, True),
        ("PENDING", 0, True),
        ("", 1, True),
    ],
)
def test_slurm_is_asked_about_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, code: int, free: bool
) -> None:
    """With a squeue that answers as Slurm's does for a running, an ended and a forgotten job."""
    folder = tmp_path / "bin"
    folder.mkdir()
    complaint = "echo 'slurm_load_jobs error: Invalid job id specified' >&2;" if code else ""
    (folder / "squeue").write_text(f"#!/bin/sh\n{complaint}echo {printed and f'78 {printed}'}\nexit {code}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    lock_of(run_dir, job="78")
    if free:
        assert "Slurm job 78" in str(take_lock(run_dir, {}))
        (run_dir / FILE_NAME).unlink()
    else:
        with pytest.raises(ConfigError, match="Slurm job 78; wait for it"):
            take_lock(run_dir, {})


def test_a_process_that_outlived_its_job_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit in a shell of an salloc that is over: Slurm has forgotten the job, the process writes on."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    run_dir = tmp_path / "run"
    with (
        holding(run_dir, SLURM_JOB_ID="999999") as process,
        pytest.raises(ConfigError, match=f"in use by process {process.pid} on .*, Slurm job 999999; wait for it"),
    ):
        take_lock(run_dir, {})
    assert f"taken over from process {process.pid} on" in str(take_lock(run_dir, {}))


# No file system without hard links can be mounted everywhere: the call is refused as such a one does.
WITHOUT_LINKS = """
def refuse(*_):
    raise OSError(int(sys.argv[2]), "no hard links")
os.link = refuse
"""
CONTEST = f"""
import os, sys
from pathlib import Path
from trainer import run_lock
from trainer.config_files import ConfigError
from trainer.run_lock import take_lock
{WITHOUT_LINKS}
print("ready", flush=True)
sys.stdin.readline()
try:
    take_lock(Path(sys.argv[1]), {{}})
    print("held", flush=True)
except ConfigError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


@pytest.mark.timeout(100)
@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.EPERM])
def test_without_hard_links_one_of_many_gets_it(tmp_path: Path, code: int) -> None:
    """All start at once; the others name the one who has it, whatever they read of its lock."""
    command = [sys.executable, "-c", CONTEST, str(tmp_path), str(code)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.stdout.readline() for process in processes]
        assert said.count("held\n") == 1, said
        holder = processes[said.index("held\n")].pid
        assert (
            sum(f"is in use by process {holder} on {socket.gethostname()}; wait for it" in line for line in said) == 3
        )
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    said_of_dead = take_lock(tmp_path, {})
    assert said_of_dead is not None
    assert f"taken over from process {holder} on" in said_of_dead
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    release_lock(tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_another_error_of_a_link_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="quota"):
        take_lock(tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    lock_of(tmp_path)
    lock = tmp_path / FILE_NAME
    text = lock.read_text()
    lock.write_text(text[:20])
    writer = threading.Timer(0.5, lock.write_text, [text])
    writer.start()
    with pytest.raises(ConfigError, match="is in use by process 1 on elsewhere"):
        take_lock(tmp_path, {})
    writer.join()


def test_a_lock_that_nobody_finishes_is_left_to_the_user(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch()
    with pytest.raises(ConfigError, match=r"nobody here can tell .* if it has ended, remove .*run.lock"):
        take_lock(tmp_path, {})
