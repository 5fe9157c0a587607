"""One process at a time in a run directory: a small file that says who, so that nobody waits or guesses."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.config_files import ConfigError

FILE_NAME = "run.lock"
# Of a Slurm job that has ended. In any state that is not named here a process may live: STOPPED, SIGNALING, STAGE_OUT.
_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
# Of one that waits to start again.
_WAITING = {"PENDING", "REQUEUED", "SPECIAL_EXIT", "REQUEUE_HOLD", "REQUEUE_FED"}
# What a file system says that has no hard links: vfat, many of FUSE, some network mounts.
_NO_LINKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM}


def take_lock(run_dir: Path, environ: Mapping[str, str]) -> str | None:
    """Hold ``run_dir`` until `release_lock`, or until this process is dead.

    Returns what is to be said where the lock of a dead process was taken over.

    Raises:
        ConfigError: a living process holds it, or one on another host that nobody can ask.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock, mine = run_dir / FILE_NAME, _describe(environ)
    said = None
    while True:
        own = run_dir / f".{FILE_NAME}.{mine['host']}.{os.getpid()}"
        own.write_text(json.dumps(mine), encoding="utf-8")
        try:
            _put(own, lock)
        except FileExistsError:
            holder = _read(lock)
            if holder is None:
                continue  # it went away meanwhile
            if holder == mine:
                return None
            _refuse_alive(run_dir, holder, mine)
            aside = run_dir / f".{FILE_NAME}.dead.{os.getpid()}"
            try:
                os.replace(lock, aside)  # of two who try, one succeeds
            except FileNotFoundError:
                continue
            if _read(aside) != holder:  # another has taken it over since it was read, and lives
                os.replace(aside, lock)
                continue
            aside.unlink()
            said = f"{lock}: taken over from {_who(holder)}, which has ended"
        else:
            return said
        finally:
            own.unlink(missing_ok=True)


def keep_lock(run_dir: Path, environ: Mapping[str, str]) -> str | None:
    """Take the lock anew where somebody has removed it, as with its folder, while this process held it.

    Returns what is to be said then.

    Raises:
        ConfigError: another process holds it by now.
    """
    lock, mine = run_dir / FILE_NAME, _describe(environ)
    holder = _read(lock)
    # Not by the host, which may have got another name; 0 can't be read just now.
    if holder is not None and (holder["pid"] == 0 or all(holder[key] == mine[key] for key in ("pid", "started"))):
        return None
    take_lock(run_dir, environ)
    return f"{lock} was removed while this run held it; it is there again"


def refuse_held(run_dir: Path, environ: Mapping[str, str]) -> None:
    """Raises ConfigError where `take_lock` would; takes nothing."""
    if (holder := _read(run_dir / FILE_NAME)) is not None:
        _refuse_alive(run_dir, holder, _describe(environ))


def release_lock(run_dir: Path, environ: Mapping[str, str]) -> None:
    """Let others use ``run_dir``; nothing happens where this process does not hold it."""
    lock = run_dir / FILE_NAME
    if _read(lock) == _describe(environ):
        # The file system may be read-only by now: why the run ends is to be said, and a dead holder is recognised.
        with suppress(OSError):
            lock.unlink(missing_ok=True)


def _put(own: Path, lock: Path) -> None:
    """Make ``lock`` hold what ``own`` holds; raises FileExistsError where there is one."""
    try:
        os.link(own, lock)  # whole at once; on NFS too
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with open(lock, "xb") as file:  # there at once, and written a moment later: _read waits for it
            file.write(own.read_bytes())


def _describe(environ: Mapping[str, str]) -> dict[str, Any]:
    job = environ.get("SLURM_JOB_ID")
    restart = int(environ.get("SLURM_RESTART_COUNT") or 0)
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": _start_time(pid), "job": job, "restart": restart}


def _start_time(pid: int) -> str | None:
    """Clock ticks since boot at which a process of this host started; with the pid it names the process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]  # field 22; the name before it may hold blanks


def _read(lock: Path) -> dict[str, Any] | None:
    for wait_s in (0.1, 0.3, 1.0, 3.0, 0.0):  # it may be half written where there are no links
        try:
            return dict(json.loads(lock.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except OSError:
            break
        except ValueError:
            time.sleep(wait_s)
    return {"host": "?", "pid": 0, "started": None, "job": None, "restart": 0}


def _is_alive(holder: Mapping[str, Any], mine: Mapping[str, Any]) -> bool | None:
    """None where nobody can tell from here."""
    if holder["job"] is not None:
        if holder["job"] == mine["job"]:
            return holder["restart"] >= mine["restart"] and _runs_here(holder, mine)
        if _runs_here(holder, mine):
            return True  # a shell that has outlived its salloc, a tmux: Slurm knows nothing of it any more
        state = _job_state(holder["job"])
        if state is not None:
            return bool(state) and state not in _ENDED | _WAITING
    return _runs_here(holder, mine)


def _runs_here(holder: Mapping[str, Any], mine: Mapping[str, Any]) -> bool | None:
    if holder["host"] != mine["host"]:
        return None
    if Path("/proc").is_dir():
        return holder["started"] is not None and _start_time(holder["pid"]) == holder["started"]
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _job_state(job: str) -> str | None:
    """State of a Slurm job, empty where Slurm has forgotten it, None where there is no Slurm to ask."""
    command = ["squeue", "--noheader", "--jobs", job, "--states=all", "--format=%A %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return "" if "Invalid job id" in done.stderr else None
    # The number of an array is that of its last task, too, and stands for all of them.
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line).get(job, "").strip()


def _who(holder: Mapping[str, Any]) -> str:
    job = f", Slurm job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}"


def _refuse_alive(run_dir: Path, holder: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    verdict = _is_alive(holder, mine)
    if verdict is False:
        return
    remedy = (
        f"wait for it, or give another --trainer.default_root_dir {run_dir}-2"
        if verdict
        else f"nobody here can tell whether it still runs: if it has ended, remove {run_dir / FILE_NAME}"
    )
    raise ConfigError(f"{run_dir} is in use by {_who(holder)}; {remedy}")
