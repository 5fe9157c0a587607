"""What a run shows in the terminal: a header, the course of the training, the evaluations."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from trainer.module import EmbeddingModule
from trainer.tracking.metrics import MetricsLog


class Bar(RichProgress):
    """Steps and remaining time; below, the last log and the last evaluation: beside the bar they would leave it no
    place on a terminal of less than 150 columns."""

    def get_renderables(self) -> Iterator[Any]:
        yield self.make_tasks_table(self.tasks)
        for line in self.tasks[0].description.splitlines() if self.tasks else ():
            yield Text(line)


class Progress(ProgressBar):
    """A bar with loss, rates, padding efficiency, remaining time and the last evaluation; where stdout is not
    a terminal one plain line per log and per evaluation. Only rank 0 speaks. It shows what `MetricsLog` logs.

    Args:
        console: where to write; stdout by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console()
        self._bar: Bar | None = None
        self._task: Any = None
        self._train, self._evaluation, self._left = "", "", ""
        self._primaries: list[str] = []
        self._total, self._first_step, self._start = 0, 0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        sets = trainer.datamodule.validation_sets  # type: ignore[attr-defined]
        self._primaries = list(dict.fromkeys(one.primary_metric for one in sets))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MetricsLog) and self._show not in callback.listeners:
                callback.listeners.append(self._show)

    def disable(self) -> None:
        """Lightning calls it on the ranks that stay silent."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.is_global_zero:
            # A path may look like markup, and a line in a log file is one line.
            self.console.print(*args, markup=False, highlight=False, soft_wrap=True, **kwargs)

    # -- hooks --------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not at the start of the training, where another callback may already have shown an evaluation.
        assert isinstance(pl_module, EmbeddingModule)
        self._total = pl_module.num_training_steps
        self.print(describe_run(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step, self._start = trainer.global_step, time.perf_counter()
        if trainer.is_global_zero and self.console.is_terminal:
            steps = TextColumn("{task.completed}/{task.total}")
            rest = TextColumn("{task.percentage:.0f}%  {task.fields[eta]}", markup=False)
            self._bar = Bar(steps, BarColumn(40), rest, console=self.console)
            self._task = self._bar.add_task("", total=self._total, completed=trainer.global_step, eta="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar:
            self._draw(completed=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    # -- inside -------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        if self._bar:
            self._draw()
            self._bar.stop()
            self._bar = None

    def _draw(self, **changed: Any) -> None:
        assert self._bar is not None
        self._bar.update(
            self._task, description=f"{self._train}\n{self._evaluation}".strip(), eta=self._left, **changed
        )

    def _show(self, metrics: Mapping[str, float], step: int) -> None:
        """One row of the metrics log."""
        if "train/loss" in metrics:
            self._train, self._left = describe_training(metrics), f"eta {self._eta(step)}"
            line = f"step {step}/{self._total} ({step / self._total:.0%})  {self._train}  {self._left}"
        else:
            shown = {name: metrics[name] for name in self._primaries if name in metrics}
            self._evaluation = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            line = f"step {step}/{self._total}  {self._evaluation}"
        if self._bar is None or "train/loss" not in metrics:
            self.print(line)

    def _eta(self, step: int) -> str:
        """Time for the rest at the pace of this process so far, evaluations and checkpoints included."""
        done = step - self._first_step
        seconds = round((time.perf_counter() - self._start) / done * (self._total - step)) if done else 0
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def describe_training(metrics: Mapping[str, float]) -> str:
    return (
        f"loss {metrics['train/loss']:.4f}  lr {metrics['train/lr']:.2e}  "
        f"{metrics['train/rows_per_s']:,.1f} rows/s  {metrics['train/tokens_per_s']:,.0f} tokens/s  "
        f"padding efficiency {metrics['train/padding_efficiency']:.2f}"
    )


def describe_run(trainer: Trainer, module: EmbeddingModule) -> str:
    """The header: what is trained, on what, where."""
    # Under ZeRO-3 a rank holds a part of a parameter; ds_numel is the whole.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    trained = sum(size for size, requires_grad in sizes if requires_grad)
    backbones = " and ".join(spec.backbone for spec in module.encoder_specs)
    nodes = f"{trainer.num_nodes} node{'s' * (trainer.num_nodes > 1)}"
    rows = "streamed" if module.data.stream is not None else f"{sum(module.data.sizes):,}"
    return (
        f"{backbones}: {sum(size for size, _ in sizes) / 1e6:.1f} M parameters, "
        f"{trained / 1e6:.1f} M trained · {rows} rows · "
        f"{module.num_training_steps:,} steps of {module.data.batch_size} rows · "
        f"{nodes} x {trainer.num_devices} {module.device.type} · precision {trainer.precision}"
    )
