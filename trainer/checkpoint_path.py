"""Which checkpoint `--ckpt_path` means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from trainer.config_files import ConfigError
from trainer.manifest import best, lies_at, newest, newest_valid, problem, read_manifest
from trainer.run_dir import is_first_rank, refuse_used
from trainer.tracking.runs import METRICS_FILE, read_log


def find_checkpoint(
    wanted: str | None, command: str, run_dir: Path, environ: Mapping[str, str], allows: bool = False
) -> str | None:
    """The checkpoint to go on from, or to evaluate; the first rank says which one it is.

    Args:
        wanted: ``auto``, the default of a fit under Slurm: the newest valid one of the run directory, and a fresh fit
            where there is none; ``best``: the one with the best metric; else a folder, which may be another run's:
            a fit then goes on from it in a fresh directory. A requeued fit, which is started by the same words again,
            takes the newest of its directory, once there is one.
        command: fit, validate or test.
        run_dir: of the run; elsewhere than under Slurm, a fresh fit needs a fresh one.
        environ: of the process.
        allows: the command line has resume.allow, so a fresh start is not what is meant.

    Returns:
        Its folder; None: a fresh start.

    Raises:
        ConfigError: there is no such checkpoint, it is damaged, or a fresh fit would write into a used directory.
    """
    is_first = is_first_rank(environ)
    is_requeued = command == "fit" and environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    if is_requeued and newest(run_dir):
        if is_first and wanted not in (None, "auto"):
            print(f"note: a requeued job goes on from the newest checkpoint of {run_dir}, not from {wanted} again")
        wanted = "auto"  # or what it has done since would be lost each time
    if wanted is None and command == "fit":
        if "SLURM_JOB_ID" in environ:
            wanted = "auto"
        elif is_first:  # only here: to the ranks it starts, the directory is in use
            refuse_used(run_dir, environ)
    if wanted is None:
        return None
    if wanted == "auto":
        found = _newest_valid(run_dir, is_first)
        if found is None and (command != "fit" or allows):
            asked = "--resume.allow" if command == "fit" else "--ckpt_path auto"
            raise ConfigError(f"{asked}: there is no checkpoint in {run_dir}{_others(run_dir)}")
        if is_first:
            print(f"checkpoint: {found}" if found else f"no checkpoint in {run_dir}: starting fresh{_others(run_dir)}")
        return str(found) if found else None
    path = _best(run_dir) if wanted == "best" else Path(wanted)
    if not path.name or not lies_at(path).is_dir():  # "", as of a variable of the shell that is not set
        said = wanted or repr(wanted)
        raise ConfigError(f"--ckpt_path {said}: no such checkpoint (a folder); auto takes the newest of {run_dir}")
    if reason := problem(path):
        name = f"{wanted} ({path})" if wanted == "best" else wanted
        raise ConfigError(f"--ckpt_path {name}: {reason}; auto takes the newest valid one of {run_dir}")
    is_fork = command == "fit" and wanted != "best" and not is_of(run_dir, path)
    if is_fork and is_first and not _is_left_of_fork(run_dir, read_manifest(path)["step"]):
        refuse_used(run_dir, environ)
    if is_first and wanted == "best":
        print(f"checkpoint: {path}")
    return str(path)


def is_of(run_dir: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint is of the run in this directory, not of one that another run goes on from."""
    return run_dir.resolve() in checkpoint.resolve().parents


def _is_left_of_fork(run_dir: Path, step: int) -> bool:
    """Whether what lies there is of a fit that began behind this step and ended before its first checkpoint: going on
    drops it."""
    return newest(run_dir) is None and all(row["step"] > step for row in read_log(run_dir / METRICS_FILE))


def _others(run_dir: Path) -> str:
    """Runs beside it that could be meant: their flags, which make the names, were others."""
    beside = run_dir.parent.iterdir() if os.access(run_dir.parent, os.R_OK) else ()
    found = {folder: newest(folder) for folder in beside if folder != run_dir}
    last = max((path for path in found.values() if path), key=lambda path: path.stat().st_mtime, default=None)
    return f"; {last.parents[1]} has one: --trainer.default_root_dir {last.parents[1]}" if last else ""


def _best(run_dir: Path) -> Path:
    found = best(run_dir)
    if found is None and newest(run_dir) is None:
        raise ConfigError(f"--ckpt_path best: there is no checkpoint in {run_dir}{_others(run_dir)}")
    if found is None:
        raise ConfigError(
            f"--ckpt_path best: no checkpoint of {run_dir} is marked as the best (checkpoint.monitor watched nothing "
            "there); auto takes the newest"
        )
    return found


def _newest_valid(run_dir: Path, is_first: bool) -> Path | None:
    found, damaged = newest_valid(run_dir)
    if damaged and found is None:
        listed = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise ConfigError(
            f"no checkpoint of {run_dir} can be trusted: {listed}\n  restore one of them, or start anew: "
            f"--trainer.default_root_dir {run_dir}-2"
        )
    for path, reason in damaged.items() if is_first else ():
        print(f"checkpoint {path} is left out: {reason}")
    return found
