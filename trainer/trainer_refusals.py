"""What Lightning's Trainer would take, and a run can't have: each is refused in one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ProgressBar,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from trainer.config_files import ConfigError, Written
from trainer.evaluation.runner import NO_CLOCK
from trainer.messages import refuse_infinite, refuse_not_positive
from trainer.run_dir import is_first_rank
from trainer.tracking.direction import direction
from trainer.tracking.wandb_mode import choose_mode

NO_ACCUMULATION = (
    "data.batch_size is the global batch of one optimizer step, and model.max_tokens bounds the memory "
    "of one forward: set these two instead"
)
_AVERAGES = (
    "it swaps averaged weights in and out behind checkpoints and evaluation: the weights that are saved would not be "
    "those that were measured; leave it out"
)
# callback of Lightning, with all below it -> why a run can't have it, and what to do
CALLBACKS: Mapping[type[Callback], str] = {
    GradientAccumulationScheduler: NO_ACCUMULATION,
    WeightAveraging: _AVERAGES,
    StochasticWeightAveraging: _AVERAGES,
    LearningRateFinder: "it trains trial steps inside the run: try --model.learning_rate in short runs of their own",
    BatchSizeFinder: f"it trains trial steps inside the run; {NO_ACCUMULATION}",
    BackboneFinetuning: "it unfreezes model.backbone, which no model here has: model.encoder.freeze holds layers still",
    ProgressBar: "a run has a bar of its own: leave it out, or see none with --trainer.enable_progress_bar false",
}
# trainer key -> (the only value, why)
FIXED: Mapping[str, tuple[Any, str]] = {
    "accumulate_grad_batches": (1, NO_ACCUMULATION),
    "overfit_batches": (
        0,
        "data decides which rows form a step: to see whether a few rows can be learnt, set data.max_rows",
    ),
    "fast_dev_run": (
        False,
        "the few steps would stay as a run that the true one goes on from: to try a config, add "
        "--config configs/hardware/debug.yaml, whose run has a directory of its own (once more: "
        "--trainer.default_root_dir OTHER)",
    ),
    "enable_checkpointing": (
        True,
        "a run goes on, and exports its model, from its checkpoints: to keep few, set checkpoint.save_every_steps and "
        "checkpoint.keep",
    ),
    "use_distributed_sampler": (False, "data decides which rows form a step, whatever the number of ranks"),
    "barebones": (False, "it takes away the checkpoints, which a run exports its model from, and the log"),
}
# trainer key -> what does what its zero seems to ask for
ABOVE_ZERO: Mapping[str, str] = {
    "limit_train_batches": "to evaluate without training, run trainer validate",
    **dict.fromkeys(
        ("val_check_interval", "check_val_every_n_epoch"), "to never evaluate, set trainer.limit_val_batches: 0"
    ),
}
# trainer key -> its least number
LEAST: Mapping[str, int] = {"log_every_n_steps": 0, "min_epochs": 0, "min_steps": 0, "num_sanity_val_steps": -1}
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


def refuse_values(options: Any, written: Written) -> None:
    """Values of the Trainer that leave no step in a run, in an epoch or between evaluations, or its length open,
    evaluate a part of a set, clip below 0, or are not ours to choose.

    Args:
        options: key of the Trainer -> value.
        written: what the user wrote, with its places.
    """

    def refuse(key: str, said: str) -> NoReturn:
        raise ConfigError(f"{written.place(f'trainer.{key}')}: trainer.{key} {said}")

    for key, (value, reason) in FIXED.items():
        if options[key] not in (value, None):  # None: what Lightning takes by default
            refuse(key, f"stays {str(value).lower()}: {reason}")
    for key, instead in ABOVE_ZERO.items():
        value = options[key]
        if isinstance(value, (int, float)) and not value > 0:
            refuse(key, f"is {value}; it must be above 0: {instead}")
    for key, least in LEAST.items():
        value = options[key]
        if value is not None and value < least:
            refuse(key, f"is {value}; it must be {least} or more")
    if isinstance(options.val_check_interval, str | dict | timedelta):
        refuse("val_check_interval", NO_CLOCK)
    if isinstance(options.max_time, dict):
        try:
            timedelta(**options.max_time)
        except (TypeError, OverflowError):
            refuse("max_time", f"is {options.max_time}; give a number of days, hours, minutes or seconds")
    if isinstance(options.accelerator, str) and options.accelerator not in ACCELERATORS:
        refuse("accelerator", f"is '{options.accelerator}'; take one of {', '.join(ACCELERATORS)}")
    if not _are_devices(options.devices, options.accelerator):
        ids = "" if options.accelerator == "cpu" else ", -1 for all, or the ids of GPUs in a list"
        refuse("devices", f"is '{options.devices}'; it must be the number on each node, 1 or more, or auto{ids}")
    if options.num_nodes < 1:
        refuse("num_nodes", f"is {options.num_nodes}; it must be 1 or more")
    for key in ("max_epochs", "max_steps"):
        value = options[key]
        if value is not None and value < 1 and value != -1:  # 0 would end well, without a model
            refuse(key, f"is {value}; it must be 1 or more, or -1 for no limit: {ABOVE_ZERO['limit_train_batches']}")
    if options.max_epochs is None and options.max_steps == -1 and options.max_time is not None:
        refuse(
            "max_time",
            "alone does not say how long the schedule of the learning rate is: give trainer.max_epochs or "
            "trainer.max_steps too",
        )
    for key in ("limit_val_batches", "limit_test_batches"):
        value = options[key]
        if value not in (None, 0, 1.0) or (value == 1 and isinstance(value, int)):  # 1 is one batch, 1.0 is all
            refuse(
                key,
                f"is {value}, but whole sets are scored: take 0 (nothing) or 1.0 (all); for fewer rows set max_rows of "
                "the set in data.validation",
            )
    strategy, settings = options.strategy, {}
    if not isinstance(strategy, str):
        strategy, settings = strategy.class_path, dict(strategy.get("init_args") or {})
    if instead := _zero_instead(strategy, settings):
        refuse(
            "strategy",
            f"is {strategy}, but here ZeRO shares memory out over the ranks, with checkpoints that DDP reads too: take "
            f"--config configs/hardware/{instead}.yaml",
        )
    if isinstance(options.strategy, str) and strategy.lower() not in ("auto", *StrategyRegistry):
        refuse(
            "strategy",
            f"is '{strategy}'; take auto or ddp, or a class with class_path, as configs/hardware/zero2.yaml does for "
            "ZeRO",
        )
    limit = options.gradient_clip_val
    if limit is not None and not limit >= 0.0:  # NaN compares as false
        refuse("gradient_clip_val", f"is {limit:g}; it must be above 0, or 0 to clip nothing")


def _are_devices(devices: int | str | Sequence[int], accelerator: Any) -> bool:
    """Whether Lightning finds a number in it, or ids of GPUs; not whether they are there."""
    if not isinstance(devices, int | str):
        ids = [str(one) for one in devices]
        return accelerator != "cpu" and all(map(str.isdigit, ids)) and 0 < len(ids) == len(set(ids))
    is_list = accelerator != "cpu" and re.fullmatch(r"-1|\d+ *,[\d, ]*", str(devices).strip())
    return bool(is_list or re.fullmatch(r"auto|0*[1-9]\d*", str(devices).strip()))


def _zero_instead(strategy: str, settings: Mapping[str, Any]) -> str:
    """The hardware config that does what a strategy of Lightning's for models shared out does, empty for any other.

    Args:
        strategy: a short name or the path of a class.
        settings: of a class.
    """
    module, _, name = strategy.lower().rpartition(".")
    if module.partition(".")[0] not in ("", "lightning", "pytorch_lightning"):
        return ""  # of the user's own
    if not name.startswith(("deepspeed", "fsdp", "modelparallel", "model_parallel")):
        return ""
    said = re.search(r"stage_([123])", name)
    stage = said[1] if said else str(settings.get("stage", "2" if name.startswith("deepspeed") else "3"))
    offload = "offload" in name or any(key.startswith("offload") and value is True for key, value in settings.items())
    return f"zero{stage}{'-offload' if offload and stage != '1' else ''}"


def refuse_seed(seed: int, place: str) -> None:
    """NumPy takes 32 bits."""
    if not 0 <= seed < 1 << 32:
        raise ConfigError(f"{place}: seed_everything is {seed}; it must be 0 to {(1 << 32) - 1}")


def refuse_nothing_to_evaluate(options: Any, command: str, written: Written) -> None:
    """An evaluation of nothing would replace the file of a real one."""
    nothing = f"trainer {command} has nothing to evaluate"
    if not options.data.validation:
        place = written.place("data.validation")
        raise ConfigError(
            f"{f'{place}: ' if place else ''}data.validation is empty: {nothing}; name a set in the recipe"
        )
    key = f"trainer.limit_{'val' if command == 'validate' else 'test'}_batches"
    if options[key] == 0:
        raise ConfigError(f"{written.place(key)}: {key} is 0: {nothing}; leave it out")


def refuse_callbacks(callbacks: Sequence[Callback], place: str, lower: str | None = None) -> None:
    """Callbacks of the user that train other steps, or save other weights, than the run accounts for, and others that
    have no place in it; and those that would stop a run because it gets better.

    Args:
        callbacks: of the user.
        place: where they are written.
        lower: metric of which less is better, as checkpoint.monitor and checkpoint.mode say.
    """
    for callback in callbacks:
        if isinstance(callback, EarlyStopping):
            refuse_not_positive("EarlyStopping patience", callback.patience, or_zero=True)
            refuse_infinite("EarlyStopping min_delta", callback.min_delta)
        falling = callback.monitor if isinstance(callback, EarlyStopping) and callback.mode == "min" else ""
        if direction(falling) == "max" and falling != lower:
            raise ConfigError(
                f"{f'{place}: ' if place else ''}EarlyStopping has mode min (what Lightning takes by default), but "
                f"more of {falling} is better: set mode: max; if less of your own metric is better, set "
                f"checkpoint.monitor: {falling} and checkpoint.mode: min too"
            )
        for kind, reason in CALLBACKS.items():
            if isinstance(callback, kind):
                name = type(callback).__name__
                raise ConfigError(f"{f'{place}: ' if place else ''}{name} can't be one of trainer.callbacks: {reason}")


def refuse_unlogged(callbacks: Sequence[Callback], wandb: str, place: str | None) -> None:
    """Callbacks of a fit without trainer.logger that write to a logger alone, where W&B is none either.

    Args:
        wandb: what tracking.wandb says.
    """
    for callback in callbacks:
        if isinstance(callback, LearningRateMonitor | DeviceStatsMonitor) and choose_mode(wandb) == "off":
            why = "tracking.wandb is off" if wandb == "off" else f"WANDB_MODE is {os.environ['WANDB_MODE']}"
            raise ConfigError(
                f"{place or 'trainer.callbacks'}: {type(callback).__name__} writes to a logger, but {why} and "
                "trainer.logger is not set: leave it out (metrics.jsonl has the learning rate), or set trainer.logger: "
                "{class_path: CSVLogger, init_args: {save_dir: logs}}"
            )


def refuse_slurm(plugins: Sequence[Any], place: str | None) -> None:
    """Outside Slurm there are no variables for it to read; in a job it would be the second one, and requeue too."""
    if any(isinstance(plugin, SLURMEnvironment) for plugin in plugins):
        raise ConfigError(
            f"{place or 'trainer.plugins'}: SLURMEnvironment can't be one of trainer.plugins: a run sees by itself "
            "that it is a task of Slurm, and requeues itself; leave it out, and start with slurm/train.sh or srun"
        )


def refuse_spawned(trainer: Trainer, place: str | None) -> None:
    """Ranks that begin inside a function of this process would lack what is set up around it."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(
            f"{place}: this trainer.strategy forks or spawns its ranks, but here a rank is a command: take ddp"
        )


def refuse_no_time(trainer: Trainer, place: str | None) -> None:
    """A run that is over before its first step would end well, without a model."""
    for timer in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(timer, Timer) and (left := timer.time_remaining()) is not None and left <= 0:
            key = place or "trainer.callbacks"
            raise ConfigError(f"{key}: this gives the training {left:g} seconds; it must be more than 0")


def refuse_remote(run_dir: str | os.PathLike[str], place: str | None) -> None:
    """An object store is no folder: all would be written to one here that is called ``s3:``."""
    if "://" in str(run_dir):
        raise ConfigError(
            f"{place}: trainer.default_root_dir is {run_dir}, but a run is written to a folder of a file system: name "
            "one, and copy it to the store when the run has ended"
        )


def refuse_ranks_apart(trainer: Trainer) -> None:
    """Processes that somebody else has started must be the ranks that the config asks for, and numbered as such: else
    each would train on its own, into one folder."""
    environment = trainer._accelerator_connector.cluster_environment
    asked, started = trainer.num_devices * trainer.num_nodes, environment.world_size()
    shape = f"trainer.devices {trainer.num_devices} x trainer.num_nodes {trainer.num_nodes}"
    who = "Slurm" if isinstance(environment, SLURMEnvironment) else "the launcher"
    by_hand = "NODE_RANK" in os.environ or "GROUP_RANK" in os.environ  # one process on each node
    in_shell = isinstance(environment, LightningEnvironment) and "SLURM_JOB_ID" in os.environ and not by_hand
    if in_shell and trainer.num_nodes > 1:  # under salloc, or srun --pty: it would wait for the other nodes
        who, started = "this shell of a Slurm job", trainer.num_devices
    if asked != started:
        raise ConfigError(
            f"{shape} is {asked} rank(s), but {who} has started {started}: start it with slurm/train.sh, or with srun "
            f"--nodes {trainer.num_nodes} --ntasks-per-node {trainer.num_devices}; or set the two to what is started"
        )
    first = is_first_rank(os.environ)
    if first != trainer.is_global_zero:
        names = ("SLURM_PROCID", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
        said = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        # No ConfigError: of those only the first rank of a node speaks, and there may be none.
        raise ValueError(
            f"{said or 'nothing'} says that this process is {'' if first else 'not '}rank 0, but {shape} makes it "
            f"{'another' if first else 'rank 0'}: set the two to what the launcher starts, or unset these variables"
        )
