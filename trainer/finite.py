"""Keeps numbers that are not finite out of the weights, and says in which rows they arose."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from trainer.data.batches import share_rows
from trainer.data.module import PairData
from trainer.distributed import gather

logger = logging.getLogger(__name__)

WARN_SKIPPED, MAX_SKIPPED = 10, 50
_MAX_ROWS_SAID = 10


class FiniteSteps:
    """Stops all ranks together at the first step whose loss or gradient is not finite, with the weights of the step
    before.

    A loss that is not finite makes the whole gradient NaN, on all ranks once it is reduced; so the norm of the
    gradient, which is the same everywhere, tells every rank at the same step. On an accelerator reading it would wait
    for the step: there the optimizer leaves out this step and all that follow, on the device, and the host looks
    whenever something is logged or saved.

    Under fp16 a gradient overflows now and then and the loss scaler leaves out the step: there the steps that are
    left out in a row are counted.
    """

    def __init__(self) -> None:
        self.num_skipped = 0
        self._bad_loss_step: Tensor | None = None  # first step with a bad loss on this rank, else -1
        self._bad_step: Tensor | None = None  # first step with a bad gradient, else -1
        self._found: Tensor | None = None  # 1.0 from that step on, which the fused optimizers read

    def watch_loss(self, loss: Tensor, step: int) -> Tensor:
        """The loss; times NaN where it is not finite."""
        bad = ~torch.isfinite(loss.detach())
        self._bad_loss_step = _first(self._bad_loss_step, bad, step)
        return loss * torch.where(bad, torch.nan, 1.0)

    def check(self, norm: Tensor, optimizer: torch.optim.Optimizer, trainer: Trainer) -> None:
        """Call it between the backward and the optimizer's step.

        Args:
            norm: of the global gradient, the same on all ranks.

        Raises:
            SharedError: the loss or the gradient is not finite, or fp16 leaves out one step after another.
        """
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self._count_skipped(norm, scaler, trainer)
            return
        bad = ~torch.isfinite(norm.detach())
        self._bad_step = _first(self._bad_step, bad, trainer.global_step)
        if _reads_late(norm, optimizer):
            self._found = (self._bad_step >= 0).float()
            optimizer.found_inf = self._found  # type: ignore[attr-defined]
        elif bad:
            self._fail(trainer)

    def read(self, trainer: Trainer) -> None:
        """Look at what the device has found; waits for it. All ranks call it together.

        Raises:
            SharedError: as `check`.
        """
        if self._found is not None and bool(self._found):
            self._fail(trainer)

    def _count_skipped(self, norm: Tensor, scaler: torch.amp.GradScaler, trainer: Trainer) -> None:
        self.num_skipped = 0 if torch.isfinite(norm) else self.num_skipped + 1  # the scaler reads it as well
        if self.num_skipped not in (WARN_SKIPPED, MAX_SKIPPED):
            return
        said = (
            f"{self.num_skipped} steps in a row were left out by fp16 at step {trainer.global_step + 1}: the gradient "
            f"overflows at a loss scale of {scaler.get_scale():g}"
        )
        remedy = "use trainer.precision bf16-mixed or 32-true, or a lower model.learning_rate"
        if self.num_skipped == WARN_SKIPPED:
            gather.warn(logger, f"{said}; the run stops after {MAX_SKIPPED}. If it goes on, {remedy}")
        else:
            raise gather.SharedError(f"{said}; {remedy}")

    def _fail(self, trainer: Trainer) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, PairData)
        assert self._bad_step is not None
        step = int(self._bad_step)
        mine = self._bad_loss_step is not None and int(self._bad_loss_step) == step
        ranks = [rank for rank, is_bad in enumerate(gather.gather_objects(mine)) if is_bad]
        report = _report(data, step, ranks)
        path = Path(trainer.default_root_dir) / f"nonfinite-step-{step + 1}.json"
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        blamed = [row for rank in ranks for row in report["rows"][rank]]
        rows = blamed or [row for share in report["rows"] for row in share]
        more = f", ... ({len(rows)} in all)" if len(rows) > _MAX_ROWS_SAID else ""
        where = f" of rank {', '.join(map(str, ranks))}" if len(report["rows"]) > 1 else ""
        what = f"the loss{where} is not finite" if ranks else "the loss is finite, but its gradient is not"
        raise gather.SharedError(
            f"step {step + 1}: {what}; no weight was changed. Rows of {report['source']}, counted from 0: "
            f"{', '.join(map(str, rows[:_MAX_ROWS_SAID]))}{more}; see {path}. Mend these rows, or lower "
            "model.learning_rate, or use a wider trainer.precision"
        )


def _first(found: Tensor | None, bad: Tensor, step: int) -> Tensor:
    """The step, where it is the first that is bad; no host waits for it."""
    found = torch.full_like(bad, -1, dtype=torch.int64) if found is None else found
    return torch.where(bad & (found < 0), step, found)


def _reads_late(norm: Tensor, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a read waits for a device, and the optimizer can leave out a step by itself."""
    return norm.device.type != "cpu" and all(group.get("fused") for group in optimizer.param_groups)


def _report(data: PairData, step: int, ranks: list[int]) -> dict[str, Any]:
    """The rows of a step, which are a function of its number alone."""
    if data.stream is not None:  # its rows have no numbers that say where they are
        return {"step": step + 1, "source": data.stream.source.path, "ranks_with_bad_loss": ranks, "rows": []}
    plan = data.order.step(*divmod(step, data.steps_per_epoch))
    shares = share_rows(plan.rows, data.tables[plan.source], gather.world_size())
    return {
        "step": step + 1,
        "source": data.train_sources[plan.source].path,
        "ranks_with_bad_loss": ranks,
        "rows": [share.tolist() for share in shares],
    }
