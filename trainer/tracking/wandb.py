"""Weights & Biases. Only this file imports `wandb`, and only in a run that is tracked."""

import math
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union

import numpy as np
import yaml
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from trainer.distributed import gather
from trainer.files import write_whole
from trainer.interruption import shielded
from trainer.messages import cause_of
from trainer.tracking.direction import direction
from trainer.tracking.redact import redact, redact_arguments
from trainer.tracking.runs import METRICS_FILE, STEP, Row, best, final, read_log
from trainer.tracking.wandb_mode import choose_mode, has_key

ID_FILE = "wandb_id"
INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 120.0
STALLED_S = 30.0  # without a byte behind a row: W&B flushes each second
_SHOWN = ("project", "entity", "group", "job_type", "tags", "name")
_SLURM = (
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION", "SLURM_CLUSTER_NAME"),
    *("SLURM_NNODES", "SLURM_NTASKS", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"),
)


@dataclass
class Tracking:
    """Experiment tracking on Weights & Biases; metrics.jsonl is always written too.

    Attributes:
        wandb: online, offline (send it later with `wandb sync`), off; auto: online where a key is configured.
        project: the project runs go to; unset: $WANDB_PROJECT, else sentence-encoders.
        entity: user or team; unset: the default of the key.
        group: runs that belong together.
        job_type: what kind of job it is.
        tags: labels of the run; unset: those of $WANDB_TAGS (a,b).
        name: shown for the run; unset: $WANDB_NAME, else the name of the run directory.
        model: store the exported model on W&B too, as an artifact that names the run, the data and the checkpoint.
    """

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    project: Optional[str] = None
    entity: Optional[str] = None
    group: Optional[str] = None
    job_type: str = "train"
    tags: Optional[list[str]] = None
    name: Optional[str] = None
    model: bool = False


def make_logger(
    tracking: Tracking,
    run_dir: Union[str, Path],
    config: Optional[Mapping[str, Any]] = None,
    run_id: Optional[str] = None,
) -> Optional["RunLogger"]:
    """The logger of a run, None where tracking is off. Nothing is started before its first use on rank 0.

    Args:
        tracking: what the user asked for.
        run_dir: holds the id of the run, so that a resumed or requeued run stays one run, and offline data.
        config: effective config, secrets are taken out; unset: the run directory's config.yaml as it is at
            the start.
        run_id: id to go on with where the run directory has none any more, from a checkpoint of this run.
    """
    mode = choose_mode(tracking.wandb)
    if mode == "off":
        return None
    run_dir = Path(run_dir)
    tags = tracking.tags
    if tags is None:
        tags = [tag for part in os.environ.get("WANDB_TAGS", "").split(",") if (tag := part.strip())]
    place = "/".join(part for part in run_dir.parts[-2:] if part != "runs")
    return RunLogger(
        # W&B itself reads $WANDB_ENTITY, $WANDB_RUN_GROUP and $WANDB_NOTES; these have a default of ours.
        project=tracking.project or os.environ.get("WANDB_PROJECT") or "sentence-encoders",
        save_dir=run_dir,
        id=keep_id(run_dir, run_id) if getattr(rank_zero_only, "rank", 0) == 0 else None,
        name=tracking.name or os.environ.get("WANDB_NAME") or place,
        entity=tracking.entity,
        group=tracking.group,
        job_type=tracking.job_type,
        tags=tags,
        mode=mode,
        config=config,
    )


def keep_id(run_dir: Path, run_id: Optional[str] = None) -> str:
    """The id of the run in this directory; made, or taken from `run_id`, once."""
    path = run_dir / ID_FILE
    if not path.exists():
        write_whole(path, (run_id or secrets.token_hex(4)) + "\n")
    return path.read_text().strip()


class RunLogger(WandbLogger):
    """Lightning's logger with our settings; it goes on offline where the server does not answer.

    Every evaluation metric and loss has its best and its last value in the summary. Over requeues W&B's own summary
    knows the last process alone, so that of the whole run is written when a process ends.
    """

    _defined: frozenset[str] = frozenset()
    _has_ended = False
    _size = -1  # of the offline file, when it was last looked at
    _look_at = 0.0

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            with shielded():
                self._experiment = self._start()
        return self._experiment

    def log_hyperparams(self, params: Any) -> None:
        super().log_hyperparams(redact(dict(params)))

    @rank_zero_only
    def log_metrics(  # type: ignore[override]
        self,
        metrics: Mapping[str, float],
        step: Optional[int] = None,
        histograms: Mapping[str, Sequence[int]] = {},
    ) -> None:
        """One row. The counts of a histogram are those of equal bins from -1 to 1."""
        run = self.experiment
        if run.settings._offline and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + STALLED_S
            self._tell_if_stalled(Path(run.settings.sync_file))
        for name in metrics.keys() - self._defined:
            # By its whole name: of two globs that fit, W&B takes the first, which is the one of the step.
            if which := direction(name):
                run.define_metric(name, step_metric=STEP, step_sync=True, summary=f"{which},last")
        self._defined = self._defined | metrics.keys()
        shown: dict[str, Any] = dict(metrics)
        if histograms:
            import wandb

            for name, counts in histograms.items():
                edges = np.linspace(-1.0, 1.0, len(counts) + 1)
                shown[name] = wandb.Histogram(np_histogram=(np.asarray(counts), edges))
        super().log_metrics(shown, step)

    def _tell_if_stalled(self, file: Path) -> None:
        """Behind the first error of writing, W&B's service drops all rows of this process without a word."""
        size = file.stat().st_size if file.exists() else 0
        if size == self._size:
            self._look_at = math.inf
            rank_zero_warn(
                f"W&B writes nothing to {file} any more; its disk has {shutil.disk_usage(file.parent).free:,} bytes "
                f"free. The run goes on, {METRICS_FILE} has what is missing; make room, and W&B has the rows from the "
                "next start on"
            )
        self._size = size

    @rank_zero_only
    def log_about(self, about: Mapping[str, Any]) -> None:
        """What `run.json` holds, in the config of the run."""
        self.experiment.config.update({"about": dict(about)}, allow_val_change=True)

    @rank_zero_only
    def log_export(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Store an exported model as an artifact of the run, which W&B shows with all that comes of it.

        Args:
            about: where it comes from: checkpoint, base, data; secrets are taken out.
        """
        import wandb

        artifact = wandb.Artifact(f"model-{self.version}", type="model", metadata=redact(dict(about)))
        artifact.add_dir(str(folder), policy="immutable")  # as it lies there, without a second copy
        self.experiment.log_artifact(artifact)

    def _rows(self) -> list[Row]:
        """Of the whole run: what other processes wrote before a requeue, too."""
        return read_log(Path(self._wandb_init["dir"]) / METRICS_FILE)

    def _finish_summary(self, rows: Sequence[Row]) -> None:
        """Best and last values of the run."""
        for name in dict.fromkeys(name for row in rows for name in row):
            if which := direction(name):
                top = best(rows, name) or (math.nan, None)
                self.experiment.summary.update({name: {which: top[0], "last": final(rows, name)}})

    def _log_evaluations(self, rows: Sequence[Row]) -> None:
        """The table of all evaluations: a row for each metric."""
        import wandb

        names = list(dict.fromkeys(name for row in rows for name in row if name.startswith("eval/")))
        table = wandb.Table(columns=["set", "metric", "first", "best", "step of best", "last"])
        for name in names:
            found = [row[name] for row in rows if row.get(name) is not None]
            if found:
                one, _, metric = name.removeprefix("eval/").rpartition("/")
                end = final(rows, name)
                # W&B would write nan as it is, which is no JSON.
                end = None if end is None or math.isnan(end) else end
                table.add_data(one, metric, found[0], *(best(rows, name) or (None, None)), end)
        if names:
            self.experiment.log({"evaluations": table, STEP: rows[-1]["step"]})

    def interrupt(self, code: int) -> None:
        """End the run as one that was stopped and may come back, not as finished."""
        if self._experiment is not None:
            self._experiment.mark_preempting()
            self._end(code)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None and status == "success":
            rows = self._rows()
            self._log_evaluations(rows)
            self._finish_summary(rows)
        if self._experiment is not None and status == "failed" and not self._has_ended:
            self._end(1)  # W&B takes an exit status that sys.exit was not told for 0
        if self._experiment is not None and self._experiment.settings._offline:
            fragments = shlex.quote(str(Path(self._wandb_init["dir"]) / "wandb"))  # a requeue has left several
            print(f"tracked offline; send it from a machine with a network: wandb sync {fragments}/offline-run-*")

    def _end(self, code: int) -> None:
        self._has_ended = True
        self._finish_summary(self._rows())
        self.experiment.finish(exit_code=code)

    def _read_config(self) -> Mapping[str, Any]:
        config, file = self._wandb_init["config"], Path(self._wandb_init["dir"]) / "config.yaml"
        if config is None and file.exists():
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
        return config or {}

    def _start(self) -> Any:
        import wandb

        # Where tables wait to be sent: beside the run, not in the home, which nodes may not share or write to.
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(self._wandb_init["dir"]) / "wandb"))
        arguments = {key: value for key, value in self._wandb_init.items() if value is not None}
        arguments |= redact({key: arguments[key] for key in _SHOWN if key in arguments})
        arguments["config"] = redact({**self._read_config(), "run": describe_environment()})
        settings = wandb.Settings(
            # Printed lines, patches and the remote's address may hold secrets; the commit is in the config.
            console="off",
            save_code=False,
            disable_git=True,
            reinit="finish_previous",  # a second fit of one process is a run of its own
            x_transaction_log_flush_interval=1.0,  # seconds of rows that a SIGKILL may take
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,  # or a server that went away would hold the finished job
            silent=arguments["mode"] == "offline",  # finalize says in one line where the files are
        )
        arguments["settings"] = settings
        with _redacted_command_line(), _hidden_secrets():
            try:
                if arguments["mode"] == "online" and not has_key():
                    raise ValueError("no key: set WANDB_API_KEY or run wandb login")  # it would ask, and wait
                run = wandb.init(**arguments, allow_val_change=True)
            except Exception as error:
                if arguments["mode"] != "online":
                    raise
                rank_zero_warn(f"W&B does not answer ({cause_of(error)}): tracking offline")
                wandb.teardown()  # or the failed start still holds the id
                settings.silent = True
                run = wandb.init(**{**arguments, "mode": "offline"}, allow_val_change=True)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        return run


def describe_environment() -> dict[str, Any]:
    """What the config of a run does not say: commit, ranks, Slurm job."""
    slurm = {name.removeprefix("SLURM_").lower(): os.environ[name] for name in _SLURM if name in os.environ}
    return {"git_commit": _git_commit(), "world_size": gather.world_size(), "slurm": slurm}


def _git_commit() -> Optional[str]:
    command = ["git", "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@contextmanager
def _redacted_command_line() -> Iterator[None]:
    """W&B stores sys.argv as it finds it."""
    original = sys.argv
    sys.argv = [original[0], *redact_arguments(original[1:])]
    try:
        yield
    finally:
        sys.argv = original


@contextmanager
def _hidden_secrets() -> Iterator[None]:
    """W&B's service starts inside and stores each SLURM_* variable: the token of Slurm's REST API is one."""
    slurm = {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}
    hidden = {name: value for name, value in slurm.items() if redact(value, name) != value}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
