"""A real run of seconds for tests: 22 rows, batches of 4, two epochs of 6 steps, in one process or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from trainer.batch import PackedBatch
from trainer.data.evalsource import EvalSource
from trainer.data.module import PairData
from trainer.data.sources import Source
from trainer.distributed import gather
from trainer.encoder.flops import count_arithmetic
from trainer.encoder.spec import EncoderSpec
from trainer.losses import CosineSimilarity
from trainer.module import EmbeddingModule

ROWS, BATCH, STEPS_PER_EPOCH = 22, 4, 6
COLUMNS = {"anchor": "anchor", "positive": "positive", "score": "score"}


class SaveAt(Callback):
    """Saves a checkpoint behind one step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class LiveGroup(LightningEnvironment):
    """Makes a trainer use the process group it finds, one rank a node."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return gather.world_size()

    def set_world_size(self, size: int) -> None:
        assert size == gather.world_size()

    def global_rank(self) -> int:
        return gather.rank()

    def set_global_rank(self, rank: int) -> None:
        assert rank == gather.rank()

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return gather.rank()


class Recorder(Callback):
    """What each step did on this rank; place it first."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        self.steps.append(
            {
                "loss": float(outputs["loss"]),
                "lr": self.lr,
                "grad_norm": float(pl_module.last_grad_norm),  # type: ignore[arg-type]
                "rows": batch.num_rows,
                "tokens": batch.num_tokens,
                "padded": batch.padded_tokens,
                "flops": count_arithmetic(pl_module.encoder_spec).step(batch.lengths),  # type: ignore[arg-type]
                "row_sum": float(batch.targets.row_ids_B.sum()),
            }
        )


def write_rows(folder: Path, texts: list[str], num_rows: int = ROWS) -> Path:
    rng = np.random.default_rng(0)
    path = folder / f"rows{num_rows}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(num_rows):
            anchor, positive = (texts[i] for i in rng.integers(0, len(texts), 2))
            row = {"anchor": anchor, "positive": positive, "score": round(rng.uniform(), 3)}
            file.write(json.dumps(row) + "\n")
    return path


def make_parts(
    encoder: Path | EncoderSpec, train: Path, validation: list[Path] | None = None, dropout: float = 0.0
) -> tuple[EmbeddingModule, PairData]:
    spec = EncoderSpec(str(encoder), dropout=dropout) if isinstance(encoder, Path) else encoder
    sets = [EvalSource(name=f"dev{i}", path=str(path), columns=COLUMNS) for i, path in enumerate(validation or [])]
    data = PairData([Source(str(train), COLUMNS)], spec, validation=sets, batch_size=BATCH, seed=1)
    module = EmbeddingModule(spec, CosineSimilarity(), learning_rate=1e-2, warmup_ratio=0.2)
    return module, data


def make_trainer(run_dir: Path, callbacks: list[Callback], **options: Any) -> Trainer:
    seed_everything(7)
    if gather.world_size() > 1:
        options = {"strategy": "ddp", "num_nodes": gather.world_size(), "plugins": [LiveGroup()], **options}
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": run_dir,
            "callbacks": callbacks,
            "max_epochs": 2,
            "log_every_n_steps": 5,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "use_distributed_sampler": False,
            "gradient_clip_val": 1.0,
            **options,
        }
    )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


TIMED = {
    *("train/rows_per_s", "train/tokens_per_s", "train/flops_per_s", "train/data_wait"),
    *("train/wall_s", "train/gpu_hours", "train/host_peak_gib"),
}


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """What a repeated run must give again."""
    return {name: value for name, value in row.items() if name not in TIMED}
