"""`trainer fit`, `validate` and `test`: LightningCLI with our classes, run directories, readable refusals."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from trainer import interruption
from trainer.check.callback import Check
from trainer.check.rules import refuse_unknown
from trainer.checkpoint import Checkpoints, DirectoryCheckpointIO
from trainer.checkpoint_path import find_checkpoint, is_of
from trainer.config_errors import check_written, explain, refuse_nothing
from trainer.config_files import ConfigError, Written, clear_replaced_lists, replaced_lists
from trainer.data.loading import fingerprint
from trainer.data.module import PairData
from trainer.distributed.launch import numbering
from trainer.distributed.meeting import Meeting
from trainer.distributed.preemption import Preemption
from trainer.distributed.strategies import ZeRO
from trainer.distributed.watch import Watch
from trainer.encoder.spec import EncoderSpec
from trainer.evaluation.runner import Evaluation
from trainer.identity import Resume, differences, identity, refuse_differences, split_names
from trainer.manifest import best, newest, read_manifest
from trainer.module import EmbeddingModule
from trainer.run_dir import is_first_rank, name_run, write_config
from trainer.run_lock import keep_lock, release_lock, take_lock
from trainer.third_party import quieten, settle_parsing
from trainer.tracking.metrics import MetricsLog, run_id_in
from trainer.tracking.progress import Progress
from trainer.tracking.redact import redact
from trainer.tracking.results import RESULTS_NAME, TEST_NAME, checkpoint_in, print_results, write_results
from trainer.tracking.wandb import RunLogger, Tracking, make_logger
from trainer.trainer_refusals import (
    refuse_callbacks,
    refuse_no_time,
    refuse_nothing_to_evaluate,
    refuse_ranks_apart,
    refuse_remote,
    refuse_seed,
    refuse_slurm,
    refuse_spawned,
    refuse_unlogged,
    refuse_values,
)

GROUPS: Mapping[str, type] = {
    "model": EmbeddingModule,
    "data": PairData,
    "trainer": Trainer,
    "checkpoint": Checkpoints,
    "tracking": Tracking,
    "resume": Resume,
    "watch": Watch,
    "check": Check,
}
# Our order, evaluation, checkpoints and progress take the place of Lightning's.
TRAINER_DEFAULTS: Mapping[str, Any] = {
    "gradient_clip_val": 1.0,
    "logger": False,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
# target key -> the key it always follows
LINKS: Mapping[str, str] = {
    "data.seed": "seed_everything",
    **{f"data.encoder.{part.name}": f"model.encoder.{part.name}" for part in dataclasses.fields(EncoderSpec)},
    "data.document_encoder": "model.document_encoder",
}
# Weights and the optimizer's sums are float32.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class TrainerCLI(LightningCLI):
    """Parses, builds and, unless told otherwise, runs one subcommand.

    Args:
        args: subcommand and what follows it.
        written: the same, read with its places.
        execute: False builds model, datamodule and trainer, and stops there.

    Raises:
        ConfigError: a key or a value is wrong; the text says where.
    """

    def __init__(self, args: list[str], written: Written, execute: bool = True) -> None:
        settle_parsing()
        self.written = written
        self.execute = execute
        quiet = {"exit_on_error": False, "allow_abbrev": False}  # a short form would hide a misspelt flag
        super().__init__(
            EmbeddingModule,
            PairData,
            save_config_callback=None,
            trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [MetricsLog(), Progress(), Evaluation(), Preemption()]},
            seed_everything_default=42,
            parser_kwargs={"prog": "trainer", **quiet, **{name: dict(quiet) for name in self.subcommands()}},
            args=[*args[:1], *clear_replaced_lists(args[1:], written.files)],
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        commands = LightningCLI.subcommands()
        return {name: commands[name] for name in ("fit", "validate", "test")}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        for command in ("validate", "test"):  # Lightning's table of the metrics, beside ours
            self._parser(command).set_defaults(verbose=False)

    # -- parsing ------------------------------------------------------------------------------------------

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        default = self.seed_everything_default
        parser.add_argument("--seed_everything", type=int, default=default, help="of all randomness.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_class_arguments(Tracking, "tracking")
        parser.add_class_arguments(Resume, "resume")
        parser.add_lightning_class_args(Watch, "watch")
        parser.add_lightning_class_args(Check, "check")
        for target, source in LINKS.items():
            parser.link_arguments(source, target)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        check_written(GROUPS, LINKS, self.written)
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            raise ConfigError(explain(str(error), self._known_keys(), LINKS, self.written)) from error
        except Exception as error:  # of a module of the user's: while it is imported it may raise anything
            if said := explain("", self._known_keys(), LINKS, self.written):
                raise ConfigError(said) from error
            raise
        refuse_nothing(self._known_keys(), LINKS, self.written)
        options = self.config[self.config.subcommand]
        refuse_seed(options.seed_everything, self.written.place("seed_everything"))
        refuse_values(options.trainer, self.written)

    def _known_keys(self) -> dict[str, Any]:
        method = {"ckpt_path": str | None, "weights_only": bool | None, "verbose": bool}
        return {"seed_everything": int, **GROUPS, **method, "config": str, "print_config": str}

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let hyper-parameters of the checkpoint overwrite flags in silence."""

    # -- building -----------------------------------------------------------------------------------------

    @property
    def options(self) -> Any:
        """The effective config of the subcommand."""
        return self.config[self.subcommand]

    def precision_of(self, trainer: Trainer) -> str:
        """The precision on the devices of the run: on a CPU Lightning takes bf16 for fp16."""
        return "16-mixed" if str(self.options.trainer.precision) in ("16", "16-mixed") else str(trainer.precision)

    @property
    def run_dir(self) -> Path:
        return Path(self.options.trainer.default_root_dir)

    def before_instantiate_classes(self) -> None:
        if self.options.trainer.default_root_dir is None:
            seed = self.options.seed_everything
            folder = name_run(self.written.paths, self.written.flags, seed, os.environ, self.written.files)
            self.options.trainer.default_root_dir = str(folder)
        refuse_remote(self.options.trainer.default_root_dir, self.written.place("trainer.default_root_dir"))
        for group, key in (("trainer", "default_root_dir"), ("data", "cache_dir")):
            if folder := self.options[group][key]:  # no shell expands what a file or --key=~/x says
                self.options[group][key] = os.path.expanduser(folder)
        limits = self.options.trainer
        if limits.max_epochs is None and limits.max_steps == -1:
            limits.max_epochs = 1  # Lightning would take 1000
        try:
            refuse_unknown(split_names(self.options.check.allow))
        except ValueError as error:
            raise ConfigError(f"{self.written.place('check.allow')}: {error}") from error
        if not self.execute:
            return
        if is_first_rank(os.environ):
            for note in replaced_lists(self.written.files):
                print(f"note: {note}")
            watched = self.options.checkpoint.monitor
            if self.subcommand == "fit" and limits.limit_val_batches == 0 and watched not in (None, "auto"):
                print(
                    f"note: checkpoint.monitor {watched} has no effect: trainer.limit_val_batches is 0, so nothing is "
                    "measured"
                )
        if self.subcommand != "fit":
            refuse_nothing_to_evaluate(self.options, self.config.subcommand, self.written)
            self._say_what_is_drawn()
        allows = any(flag.key == "resume.allow" for flag in self.written.flags)
        self.newest_then = newest(self.run_dir)
        self.options.ckpt_path = find_checkpoint(
            self.options.ckpt_path, self.config.subcommand, self.run_dir, os.environ, allows
        )

    def _say_what_is_drawn(self) -> None:
        """A figure of a part of a set is none of the whole: searching fewer documents is easier."""
        for one in self.options.data.validation if is_first_rank(os.environ) else ():
            for key, what in (("corpus_size", "documents are searched"), ("max_rows", "rows are scored")):
                if one[key] is not None:
                    print(f"note: {one.name}: {one[key]:,} {what} at most ({key}); all: --data.validation.{key} null")

    def build_trainer(self, cluster: Callable[[list[Any]], list[Any]], **place: Any) -> Trainer:
        """Lightning's Trainer, or what it refuses.

        Args:
            cluster: from the plugins of the config those of the run, with what says who numbers the ranks.
            place: what the Trainer takes in place of what the config says.
        """
        theirs = self._get(self.config_init, "trainer").callbacks or []  # before Lightning counts the progress bars
        watched = self.options.checkpoint
        lower = watched.monitor if watched.mode == "min" else None
        written = self.written.place("trainer.callbacks")
        theirs = theirs if isinstance(theirs, list) else [theirs]
        refuse_callbacks(theirs, written, lower)
        if self.subcommand == "fit" and not self.options.trainer.logger:
            refuse_unlogged(theirs, self.options.tracking.wandb, written)
        plugins = self._get(self.config_init, "trainer").plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        refuse_slurm(plugins, self.written.place("trainer.plugins"))
        self.checkpoint_io = DirectoryCheckpointIO()
        if self._get(self.config_init, "trainer").enable_progress_bar is False:  # Lightning refuses it beside a bar
            ours = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [one for one in ours if not isinstance(one, Progress)]
        try:
            trainer = super().instantiate_trainer(plugins=[*cluster(plugins), self.checkpoint_io], **place)
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise ConfigError(f"the trainer can't be built from these settings: {error}") from error
        refuse_spawned(trainer, self.written.place("trainer.strategy"))
        refuse_no_time(trainer, self.written.place("trainer.max_time"))
        if (precision := str(trainer.precision)) not in PRECISIONS:
            raise ConfigError(
                f"{self.written.place('trainer.precision')}: trainer.precision is {precision}, but weights stay in "
                f"float32: take one of {', '.join(PRECISIONS)}"
            )
        if isinstance(trainer.strategy, ZeRO):
            trainer.strategy.refuse_settings(trainer, self.precision_of(trainer))
        return trainer

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self.build_trainer(lambda plugins: plugins + numbering(), **kwargs)
        refuse_ranks_apart(trainer)
        # Its handler of TERM talks to the other ranks from inside a signal: one rank that gets it waits for ever.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # Behind the progress bar, which must have left the terminal before the watch speaks.
        watch = next(callback for callback in callbacks if isinstance(callback, Watch))
        if trainer.world_size > 1:
            watch.meeting = Meeting(trainer.strategy, lambda: release_lock(self.run_dir, os.environ))
        callbacks.remove(watch)
        callbacks.insert(next((i for i, c in enumerate(callbacks) if isinstance(c, Progress)), -1) + 1, watch)
        return trainer

    # -- running ------------------------------------------------------------------------------------------

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.execute:
            return
        if self.options.ckpt_path:
            self._get(self.config_init, "check").found = Path(self.options.ckpt_path)
        try:
            super()._run_subcommand(subcommand)
        finally:
            release_lock(self.run_dir, os.environ)

    def before_fit(self) -> None:
        interruption.stop_if_asked()
        config, first = self.effective_config(), is_first_rank(os.environ)
        if first:
            data = [fingerprint(source) for source in self.datamodule.train_sources]  # a wrong path leaves no folder
            if taken_over := take_lock(self.run_dir, os.environ):
                print(f"note: {taken_over}")
            self._refuse_later_checkpoint()
            self._match_checkpoint(config, data)
            write_config(config, self.run_dir / "config.yaml")
            self.checkpoint_io.before_save = lambda: self._keep_folder(config)
            if self.options.trainer.logger and (asked := self.options.tracking.wandb) in ("online", "offline"):
                print(
                    f"note: trainer.logger takes the place of tracking: tracking.wandb {asked} has no effect; leave "
                    "trainer.logger out to track on W&B"
                )
        if not self.options.trainer.logger:
            tracking = self._get(self.config_init, "tracking")
            # Another run's id would write over what that run has logged.
            taken = Path(self.options.ckpt_path) if first and self.options.ckpt_path else None
            run_id = run_id_in(taken) if taken and is_of(self.run_dir, taken) else None
            self.trainer.logger = make_logger(tracking, self.run_dir, config, run_id)

    def _keep_folder(self, config: dict[str, Any]) -> None:
        """The folder may have been removed since the last checkpoint, and another run have begun in its place."""
        try:
            if said := keep_lock(self.run_dir, os.environ):
                write_config(config, self.run_dir / "config.yaml")
                print(f"note: {said}")
        except (ConfigError, OSError) as error:
            raise ValueError(
                f"nothing is saved, for {self.run_dir} was removed while this run went on: {error}"
            ) from error

    def _refuse_later_checkpoint(self) -> None:
        """Where to go on from was chosen before the lock was held: whoever held it may have saved since, and its steps
        would be taken for those of an abandoned end."""
        now, then = newest(self.run_dir), self.newest_then
        if now != then:
            raise ConfigError(
                f"another process has written {self.run_dir} while this one started: its newest checkpoint is "
                f"{now.name if now else 'gone'}, was {then.name if then else 'none'}; start again"
            )

    def _match_checkpoint(self, config: dict[str, Any], data: Sequence[str]) -> None:
        """Refuse to go on as another run than the one that saved; what it is now is what later checkpoints carry."""
        strategy = self.trainer.strategy
        facts = {
            "trainer.precision": str(self.trainer.precision),
            # One process and DDP hold the same, whole state.
            "trainer.strategy": getattr(strategy, "identity", "replicated"),
        }
        now = identity(config, data, facts)
        self.checkpoint_io.identity = now
        if self.options.ckpt_path is None:
            return
        saved = read_manifest(Path(self.options.ckpt_path)).get("identity") or {}
        allowed = self._get(self.config_init, "resume").names
        try:
            lines = refuse_differences(differences(saved, now), allowed, self.options.ckpt_path)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for line in lines:
            print(f"resume: {line} (allowed)")

    def after_fit(self) -> None:
        if is_first_rank(os.environ) and self.trainer.state.finished and newest(self.run_dir):
            from trainer.export.sentence_transformers import export_run

            export_run(self.run_dir, self.run_dir / "model")
            print(f"model: {self.run_dir / 'model'}")
            self._track_model()

    def _track_model(self) -> None:
        """The exported model on W&B, where tracking.model asks for it."""
        if not self.options.tracking.model:
            return
        about = {
            "base": self.model.encoder_spec.backbone,
            "checkpoint": str(best(self.run_dir) or newest(self.run_dir)),
            "data": [fingerprint(source) for source in self.datamodule.train_sources],
        }
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_export(self.run_dir / "model", about)

    def after_validate(self) -> None:
        self._report(RESULTS_NAME)

    def after_test(self) -> None:
        self._report(TEST_NAME)

    def _report(self, name: str) -> None:
        """What was found, as a table and as a file of this name in the run directory."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        metrics = next(callback for callback in callbacks if isinstance(callback, Evaluation)).last_metrics
        if is_first_rank(os.environ):
            names = " and ".join(spec.backbone for spec in self.model.encoder_specs)
            taken, path = self.options.ckpt_path, self.run_dir / name
            print(f"model: {names}, {f'checkpoint {taken}' if taken else 'untouched'}")
            print_results(metrics, [one.name for one in self.datamodule.validation_sets])  # whatever the disk says
            kept = None if taken else checkpoint_in(path)
            if taken is None and newest(self.run_dir):
                print(
                    f"note: this is the untouched model, not the run in {self.run_dir}; that one: --ckpt_path best, or "
                    f"auto for its newest{f'; {path} keeps the figures of {kept}' if kept else ''}"
                )
            if kept is None:
                write_results(metrics, {"model": names, "checkpoint": taken}, path)

    def effective_config(self) -> dict[str, Any]:
        """What the run is made of, every default written out, secrets taken out; `fit --config` reads it."""
        kept = self.options.clone()
        kept.pop("config", None)
        kept["ckpt_path"] = None  # where this start went on from is no part of what the run is
        return redact(yaml.safe_load(self._parser(self.subcommand).dump(kept, skip_none=False)))


class Parts(TrainerCLI):
    """Model and data of a command, on a login node: the trainer is there for what it refuses, and stands on one CPU,
    for its own place is a compute node."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        log = logging.getLogger("lightning.pytorch")
        level = log.level
        log.setLevel(logging.WARNING)  # what it says of devices is not about those of the run
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                place = {"accelerator": "cpu", "devices": 1, "num_nodes": 1}
                return self.build_trainer(_of_one_process, **place, **kwargs)
        finally:
            log.setLevel(level)


def _of_one_process(plugins: Sequence[Any]) -> list[Any]:
    """Plugins without those that say how the ranks of the run are numbered."""
    return [*(one for one in plugins if not isinstance(one, ClusterEnvironment)), LightningEnvironment()]


def run(args: list[str], written: Written, execute: bool = True) -> TrainerCLI:
    """Builds and runs ``args``; with ``execute`` False it only builds."""
    quieten()
    # On a CPU: moments of rare pieces decay into denormal numbers, with which AdamW takes five times as long. Threads
    # take over what the one that starts them has set, so this stands before the first parallel loop.
    torch.set_flush_denormal(True)
    return TrainerCLI(args, written, execute)
