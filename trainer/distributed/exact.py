"""The self-check: two steps of a run on its ranks, and the same two steps in one process, side by side.

With several sources, the first step of each of them is compared too.

Rows, loss, parameter gradients before clipping and one metric are compared with dropout off. Each step of the one
process starts from the weights the ranks had, so that a difference is named where it arises and is neither hidden
nor blown up by the optimizer. The one process has a module of its own, for that of the ranks may be in pieces.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from trainer.batch import PackedBatch
from trainer.data.batches import StepBatches
from trainer.distributed import gather
from trainer.distributed.strategies import keep_on_first_rank, whole_gradients, whole_weights
from trainer.evaluation.scoring import evaluate
from trainer.manifest import tensor_digest
from trainer.module import EmbeddingModule

NUM_STEPS = 2
MOST_STEPS = 50  # that the ranks take to meet every source
# Largest difference relative to the whole vector; half precision rounds each product.
TOLERANCE, HALF_TOLERANCE = 1e-5, 5e-2


@dataclass
class Joint:
    """One thing that must be equal, and by how much it is not."""

    name: str
    difference: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # False for nan

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        note = f"  ({self.note})" if self.note else ""
        return f"  {self.name:<24} {verdict}   {self.difference:.1e} of {self.tolerance:.0e}{note}"


@dataclass
class StepRecord:
    """What the ranks did in one step, as rank 0 saw it."""

    number: int
    rows: list[int]
    weights: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    loss: float = float("nan")


class ExactnessCheck(Callback):
    """Records the steps of a fit and replays them in rank 0 alone."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.joints: list[Joint] = []
        self.compared: set[int] = set()
        self.alone: EmbeddingModule

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, EmbeddingModule)
        self.alone = copy.deepcopy(pl_module)  # not built yet: settings only

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, EmbeddingModule)
        for part in pl_module.encoder.parts.values():
            part.set_dropout(0.0)
        data = pl_module.data
        sources = [data.order.step(0, step).source for step in range(min(MOST_STEPS, data.steps_per_epoch))]
        self.compared = {*range(NUM_STEPS), *(sources.index(source) for source in set(sources))}
        trainer.fit_loop.epoch_loop.max_steps = max(self.compared) + 1

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        if trainer.global_step not in self.compared:
            return
        rows = [row for part in gather.gather_objects(batch.targets.row_ids_B.tolist()) for row in part]
        self.records.append(StepRecord(trainer.global_step, rows))
        self.records[-1].weights = keep_on_first_rank(whole_weights(trainer.strategy))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.global_step in self.compared:
            self.records[-1].gradients = keep_on_first_rank(whole_gradients(trainer.strategy))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        if trainer.global_step - 1 in self.compared:
            total = gather.reduce_sum(outputs["loss"].detach().float())
            self.records[-1].loss = float(total) / gather.world_size()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, EmbeddingModule)
        tolerance = TOLERANCE if str(trainer.precision) == "32-true" else HALF_TOLERANCE
        digests = gather.gather_objects(tensor_digest(whole_weights(trainer.strategy)))
        self.joints.append(
            Joint("weights of all ranks", float(len(set(digests)) - 1), 0.0, "bitwise, after the last step")
        )
        sharded = _evaluate(trainer, pl_module, gather.rank(), gather.world_size())
        weights = keep_on_first_rank(whole_weights(trainer.strategy))
        if trainer.is_global_zero:
            self._build_alone(trainer, pl_module)
            self.alone.load_state_dict(weights)
            alone = _evaluate(trainer, self.alone, 0, 1)
            for record in self.records:
                self.joints += self._replay(trainer, record, tolerance)
            self.joints += metric_joints(alone, sharded)
        gather.barrier()

    def _build_alone(self, trainer: Trainer, pl_module: EmbeddingModule) -> None:
        alone = self.alone
        alone.trainer = trainer
        alone.configure_model()
        for part in alone.encoder.parts.values():
            part.lockstep = False
            part.set_dropout(0.0)
        alone.to(pl_module.device)

    def _replay(self, trainer: Trainer, record: StepRecord, tolerance: float) -> list[Joint]:
        module = self.alone
        module.load_state_dict(record.weights)
        module.zero_grad()
        data = module.data
        one = StepBatches(data.tables, data.order, data.steps_per_epoch, 0, 1, data.teachers)
        batch = one[record.number]
        rows = batch.targets.row_ids_B.tolist()
        with trainer.precision_plugin.train_step_context():
            loss = module.training_step(batch.to(module.device), record.number)
        loss.backward()
        ours = {k: p.grad.cpu() for k, p in module.named_parameters() if p.grad is not None}
        step = f"step {record.number + 1}"
        several = len(data.train_sources) > 1
        size = f"{len(rows)} rows{f' of {data.train_sources[batch.source].path}' if several else ''}"
        value = float(loss.detach())
        relative_loss = abs(record.loss - value) / max(abs(value), 1e-8)
        return [
            rows_joint(step, rows, record.rows, size),
            Joint(f"{step} loss", relative_loss, tolerance, f"{record.loss:.6f} and {value:.6f}"),
            *gradient_joints(step, ours, record.gradients, tolerance),
        ]


def rows_joint(step: str, ours: Sequence[int], theirs: Sequence[int], size: str) -> Joint:
    """The rows of the one process and of the ranks, in any order: how many one of them has and the other lacks."""
    alone, ranks = Counter(ours), Counter(theirs)
    others = max((alone - ranks).total(), (ranks - alone).total())
    return Joint(f"{step} rows", float(others), 0.0, size if len(ours) == len(theirs) else f"{len(theirs)} and {size}")


def metric_joints(alone: Mapping[str, float], sharded: Mapping[str, float]) -> list[Joint]:
    """The first metric, and the names of all of them."""
    joints = [
        Joint(f"metric {name}", abs(sharded[name] - alone[name]), 1e-6) for name in list(alone)[:1] if name in sharded
    ]
    return joints + _missing("metrics", alone.keys() ^ sharded.keys())


def _missing(what: str, names: Set[str]) -> list[Joint]:
    """A failure where the ranks or the one process alone have something."""
    return [Joint(what, float(len(names)), 0.0, f"of one side alone: {', '.join(sorted(names))}")] if names else []


def gradient_joints(
    step: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float
) -> list[Joint]:
    """The gradients of the one process and of the ranks, and their norms."""
    if missing := _missing(f"{step} gradients", ours.keys() ^ theirs.keys()):
        return missing  # two vectors of other lengths have no difference
    names = f"{step} gradient", f"{step} gradient norm"
    if not any(g.any() for g in (*ours.values(), *theirs.values())):  # nothing to learn: a row without negatives, say
        return [Joint(name, 0.0, tolerance, "0 on both sides") for name in names]
    norm = torch.cat([g.flatten() for g in ours.values()]).norm()
    difference = torch.cat([(theirs[k] - ours[k]).flatten() for k in ours]).norm() / norm
    ratio = float(torch.cat([g.flatten() for g in theirs.values()]).norm() / norm)
    worst = max(ours, key=lambda k: float((theirs[k] - ours[k]).abs().max()))
    return [
        Joint(names[0], float(difference), tolerance, f"largest at {worst}"),
        Joint(names[1], abs(ratio - 1.0), tolerance, f"ratio {ratio:.7f}"),
    ]


def check_exact(cli: Any) -> int:
    """Run the check on the ranks the config asks for and print the result; the exit code.

    Args:
        cli: holds the built ``model``, ``datamodule`` and ``trainer``.

    Raises:
        ValueError: one rank alone has nothing to be compared with.
    """
    trainer, check = cli.trainer, ExactnessCheck()
    if trainer.world_size == 1:
        raise ValueError(
            "check --exact compares several ranks with one process, but this config has one rank: add "
            "--config configs/hardware/cpu2.yaml, or --trainer.devices 2, or run it as several tasks of srun"
        )
    trainer.callbacks = [check]
    trainer.loggers = []
    trainer.fit_loop.max_epochs = NUM_STEPS
    trainer.limit_val_batches = 0
    trainer.fit(cli.model, datamodule=cli.datamodule)
    passed = all(joint.passed for joint in check.joints)
    if trainer.is_global_zero:
        rows = len(check.records[0].rows)
        losses = {type(cli.model.loss_of(source)).__name__ for source in cli.datamodule.train_sources}
        print(
            f"{trainer.world_size} ranks against 1 process: {', '.join(sorted(losses))}, {rows} rows a step, "
            f"{trainer.precision}, dropout off"
        )
        for joint in check.joints:
            print(joint)
        failed = [joint.name for joint in check.joints if not joint.passed]
        print("exact: pass" if passed else f"exact: FAIL at {', '.join(failed)}")
    return 0 if gather.broadcast_object(passed) else 1


def _evaluate(trainer: Trainer, module: EmbeddingModule, rank: int, world_size: int) -> dict[str, float]:
    """Metrics of the first validation set, if there is one that needs no teacher."""
    encoder, device = module.encoder, module.device
    module.eval()
    with trainer.precision_plugin.val_step_context():
        metrics = evaluate(
            lambda batch: encoder.embed(batch.to(device)),
            [one for one in trainer.datamodule.validation_sets if one.teacher is None][:1],  # type: ignore[attr-defined]
            rank,
            world_size,
            module.max_tokens,
            module.classify,
        )
    module.train()
    return metrics
