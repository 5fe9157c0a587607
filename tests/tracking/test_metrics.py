"""metrics.jsonl against what each step did, in one process, on two ranks, and over a resume."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file
from torch import Tensor

from tests.tracking.small_run import (
    COLUMNS,
    STEPS_PER_EPOCH,
    TIMED,
    Recorder,
    SaveAt,
    make_parts,
    make_trainer,
    read_metrics,
    without_times,
    write_rows,
)
from tests.two_ranks import TwoRanks
from trainer.batch import Targets
from trainer.data.sources import Source
from trainer.encoder import EncoderSpec
from trainer.evaluation.runner import Evaluation
from trainer.losses import CosineSimilarity
from trainer.tracking.metrics import MetricsLog, drop_rows_after


class Noting(CosineSimilarity):
    """Finds something besides its value: the mean number of a row."""

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        self.last_metrics = {"mean_row": targets.weight * targets.row_ids_B.sum().float()}
        return super().forward(columns, targets)


def fit(
    run_dir: Path, encoder: Path, rows: Path, save_at: int = -1, ckpt: Path | None = None, **options: Any
) -> list[dict[str, float]]:
    """Train on each rank; what the steps of this rank did."""
    module, data = make_parts(encoder, rows)
    module.loss = Noting()
    recorder = Recorder()
    callbacks = [recorder, MetricsLog(), SaveAt(save_at, run_dir / "saved.ckpt")]
    make_trainer(run_dir, callbacks, **options).fit(module, data, ckpt_path=ckpt)
    return recorder.steps


def expected(ranks: list[list[dict[str, float]]], every: int = 5) -> list[dict[str, float]]:
    """The rows that the steps of all ranks must give."""
    num_steps = len(ranks[0])
    table = {key: np.array([[step[key] for step in steps] for steps in ranks]) for key in ranks[0][0]}
    logs = []
    first = 0
    for last in [*range(every, num_steps, every), num_steps]:
        span = slice(first, last)
        logs.append(
            {
                "step": last,
                "train/loss": table["loss"][:, span].mean(),
                "train/lr": table["lr"][0, last - 1],
                "train/grad_norm": table["grad_norm"][0, span].mean(),
                "train/rows_seen": table["rows"][:, :last].sum(),
                "train/tokens_seen": table["tokens"][:, :last].sum(),
                "train/mean_row": (table["row_sum"].sum(axis=0) / table["rows"].sum(axis=0))[span].mean(),
                "train/padding_efficiency": table["tokens"][:, span].sum() / table["padded"][:, span].sum(),
            }
        )
        first = last
    return logs


def assert_rows(found: list[dict[str, Any]], wanted: list[dict[str, float]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, want in zip(found, wanted, strict=True):
        assert row.keys() == want.keys() | TIMED
        for name, value in want.items():
            assert row[name] == pytest.approx(value, rel=1e-6 if name == "train/mean_row" else 1e-9), name
        assert all(row[name] > 0 for name in TIMED)
        assert row["train/data_wait"] < 1


def test_rows_are_means_and_sums_of_the_steps(tmp_path: Path, tiny_encoder: Path, demo_texts: list[str]) -> None:
    logger = CSVLogger(tmp_path, name="csv", version="")
    steps = fit(tmp_path, tiny_encoder, write_rows(tmp_path, demo_texts), logger=logger)
    assert len(steps) == 2 * STEPS_PER_EPOCH
    found = read_metrics(tmp_path)
    assert_rows(found, expected([steps]))
    assert [row["step"] for row in found] == [5, 10, 12]
    assert steps[0]["lr"] == 0.0 < steps[4]["lr"] == found[0]["train/lr"]
    assert 0.3 < found[0]["train/padding_efficiency"] < 1.0
    assert found[-1]["train/rows_seen"] == 44
    with open(tmp_path / "csv" / "metrics.csv", encoding="utf-8") as file:
        logged = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert logged == [{**row, "step": row["step"]} for row in found]


def test_rows_of_evaluations_have_the_same_axes(tmp_path: Path, tiny_encoder: Path, demo_texts: list[str]) -> None:
    """Between two logs too, where no sum was written yet; time never runs backwards."""
    rows = write_rows(tmp_path, demo_texts)
    module, data = make_parts(tiny_encoder, rows, [rows])
    recorder = Recorder()
    make_trainer(tmp_path, [recorder, MetricsLog(), Evaluation()], val_check_interval=3).fit(module, data)
    found = read_metrics(tmp_path)
    assert [row["step"] for row in found if "train/loss" not in row] == [0, 3, 6, 9, 12]
    for row in found:
        taken = recorder.steps[: row["step"]]
        assert row["train/rows_seen"] == sum(step["rows"] for step in taken)
        assert row["train/tokens_seen"] == sum(step["tokens"] for step in taken)
        assert row["train/gpu_hours"] == pytest.approx(row["train/wall_s"] / 3600)
    walls = [row["train/wall_s"] for row in found]
    assert walls == sorted(walls)
    assert 0 < walls[0] < walls[-1]


def test_the_loss_of_each_of_several_sources(tmp_path: Path, tiny_encoder: Path, demo_texts: list[str]) -> None:
    """Over the steps of that source, beside the loss of all; files of one name are told apart."""
    (tmp_path / "other").mkdir()
    files = [write_rows(tmp_path, demo_texts), write_rows(tmp_path / "other", demo_texts)]
    files.append(files[0].rename(files[0].with_name(files[0].name.replace("rows22", "rows22-2"))))
    files[0] = write_rows(tmp_path, demo_texts)
    module, data = make_parts(tiny_encoder, files.pop())
    data.train_sources += [Source(str(file), COLUMNS) for file in files]
    seen = []

    class Note(Recorder):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            seen.append(args[3].source)

    recorder = Note()
    make_trainer(tmp_path, [recorder, MetricsLog()], max_epochs=1, log_every_n_steps=100).fit(module, data)
    (row,) = read_metrics(tmp_path)
    assert set(seen) == {0, 1, 2}
    for number, name in enumerate(("rows22-2", "rows22", "rows22-3")):
        losses = [step["loss"] for step, source in zip(recorder.steps, seen, strict=True) if source == number]
        assert row[f"train/loss/{name}"] == pytest.approx(np.mean(losses))


CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class C(PreTrainedConfig):
    model_type = "odd"
    hidden_size = 16

class M(PreTrainedModel):
    config_class = C

    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(400, 16)
        self.post_init()

    def forward(self, input_ids, attention_mask, **kwargs):
        return BaseModelOutput(last_hidden_state=self.embedding(input_ids))

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, embedding):
        self.embedding = embedding
"""


def test_a_backbone_of_unknown_sizes_trains(tmp_path: Path, tiny_encoder: Path, demo_texts: list[str]) -> None:
    """Its config has no number of layers or heads: all is logged but what their arithmetic takes."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for path in tiny_encoder.glob("tokenizer*"):
        shutil.copy(path, folder)
    (folder / "modeling_odd.py").write_text(CODE)
    auto_map = {"AutoConfig": "modeling_odd.C", "AutoModel": "modeling_odd.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": auto_map}))
    save_file({"embedding.weight": torch.randn(400, 16)}, folder / "model.safetensors", {"format": "pt"})
    module, data = make_parts(EncoderSpec(str(folder), trust_remote_code=True), write_rows(tmp_path, demo_texts))
    make_trainer(tmp_path, [MetricsLog()], max_epochs=1, log_every_n_steps=100).fit(module, data)
    (row,) = read_metrics(tmp_path)
    assert "train/flops_per_s" not in row
    assert row["train/tokens_per_s"] > 0


def test_two_ranks_log_the_whole(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], two_ranks: TwoRanks
) -> None:
    """Sums and means over both ranks, equal to one process that takes the same global batches."""
    rows = write_rows(tmp_path, demo_texts)
    ranks = two_ranks(fit, tmp_path / "two", tiny_encoder, rows)
    found = read_metrics(tmp_path / "two")
    assert_rows(found, expected(ranks))
    flops, tokens = (sum(step[key] for steps in ranks for step in steps[:5]) for key in ("flops", "tokens"))
    assert found[0]["train/flops_per_s"] / found[0]["train/tokens_per_s"] == pytest.approx(flops / tokens, rel=1e-9)
    fit(tmp_path / "one", tiny_encoder, rows)
    for row, alone in zip(found, read_metrics(tmp_path / "one"), strict=True):
        for name in row.keys() - TIMED - {"train/padding_efficiency"}:
            assert row[name] == pytest.approx(alone[name], rel=1e-5), name


@pytest.mark.parametrize("save_at", [5, 7])
def test_a_resumed_run_writes_the_same_rows(
    tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], save_at: int
) -> None:
    """Stopped in the middle of a log interval; rows behind the checkpoint are not written twice."""
    rows = write_rows(tmp_path, demo_texts)
    fit(tmp_path, tiny_encoder, rows, save_at=save_at)
    undisturbed = read_metrics(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 11, "train/lo')  # a kill in the middle of a line
    steps = fit(tmp_path, tiny_encoder, rows, ckpt=tmp_path / "saved.ckpt")
    assert len(steps) == 12 - save_at
    resumed = read_metrics(tmp_path)
    assert [without_times(row) for row in resumed] == [without_times(row) for row in undisturbed]
    assert all(0 < row[name] < math.inf for row in resumed for name in TIMED)
    walls = [row["train/wall_s"] for row in resumed]
    assert walls == sorted(walls), "the time of the first process was forgotten"


def test_two_ranks_resumed(tmp_path: Path, tiny_encoder: Path, demo_texts: list[str], two_ranks: TwoRanks) -> None:
    """Shares of both ranks that were not logged yet survive, on one rank or on two."""
    rows = write_rows(tmp_path, demo_texts)
    two_ranks(fit, tmp_path, tiny_encoder, rows, 7)
    undisturbed = read_metrics(tmp_path)
    two_ranks(fit, tmp_path, tiny_encoder, rows, -1, tmp_path / "saved.ckpt")
    assert [without_times(row) for row in read_metrics(tmp_path)] == [without_times(row) for row in undisturbed]
    fit(tmp_path, tiny_encoder, rows, ckpt=tmp_path / "saved.ckpt")
    for row, before in zip(read_metrics(tmp_path), undisturbed, strict=True):
        for name in row.keys() - TIMED - {"train/padding_efficiency"}:
            assert row[name] == pytest.approx(before[name], rel=1e-5), name


class Sleep(Callback):
    """Half a second behind every step, on the log's account or not."""

    def __init__(self, log: MetricsLog, paused: bool) -> None:
        self.metrics, self.paused = log, paused

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.paused:
            with self.metrics.paused():
                time.sleep(0.5)
        else:
            time.sleep(0.5)


def test_rates_leave_out_paused_time(tmp_path: Path, tiny_encoder: Path, demo_texts: list[str]) -> None:
    rows = write_rows(tmp_path, demo_texts)
    rates = []
    for paused in (True, False):
        log = MetricsLog()
        module, data = make_parts(tiny_encoder, rows)
        run_dir = tmp_path / str(paused)
        callbacks = [log, Sleep(log, paused)]
        make_trainer(run_dir, callbacks, max_steps=4, log_every_n_steps=2).fit(module, data)
        rates.append(read_metrics(run_dir)[1]["train/rows_per_s"])
    # Not paused, two steps of 4 rows take a second at least.
    assert rates[1] < 8 < rates[0]


def test_values_that_are_not_finite_stay_readable(tmp_path: Path) -> None:
    log = MetricsLog()
    trainer = make_trainer(tmp_path, [log])
    log.setup(trainer, None, "fit")  # type: ignore[arg-type]
    log.record({"a": math.nan, "b": math.inf, "c": 1.5}, step=3)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 3, "a": None, "b": None, "c": 1.5}


@pytest.mark.parametrize("damaged", [b'{"step": 5, "x"\0\0\n', b"\xff\xfe\n", b"[1]\n", b'{"x": 1}\n', b"\n"])
def test_damaged_lines_do_not_keep_a_run_from_going_on(
    tmp_path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "x": 1}).encode() + b"\n" for step in (0, 5, 10, 15)]
    path.write_bytes(b"".join([lines[0], damaged, *lines[1:]]))
    drop_rows_after(path, 10)
    assert path.read_bytes() == b"".join(lines[:3])
    assert caplog.messages == [f"{path}: damaged, and left out: line 2"]


def test_rows_are_dropped_from_where_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "x": 1}) + "\n" for step in (0, 5, 5, 10, 15)]
    path.write_text("".join(lines) + '{"step": 2')
    drop_rows_after(path, 10)
    assert path.read_text() == "".join(lines[:4])
    # A run that starts again from nothing evaluates step 0 again.
    drop_rows_after(path, 0)
    assert path.read_text() == ""
    drop_rows_after(tmp_path / "none.jsonl", 3)
    assert sorted(tmp_path.iterdir()) == [path]


class FillDisk(Callback):
    """Fills a disk before one step and frees it before another."""

    def __init__(self, folder: Path, full_at: int, free_at: int) -> None:
        self.filler, self.full_at, self.free_at = folder / "filler", full_at, free_at

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.full_at:
            with suppress(OSError), open(self.filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(256))
        if trainer.global_step == self.free_at:
            self.filler.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_rows_wait_for_a_disk_that_is_full(
    tiny_encoder: Path, demo_texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The steps behind the last checkpoint are worth more than a line of a log."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=True, timeout=20)
    try:
        module, data = make_parts(tiny_encoder, write_rows(tmp_path, demo_texts))
        callbacks = [FillDisk(small, full_at=1, free_at=20), MetricsLog()]
        options: dict[str, Any] = {"max_epochs": 4, "log_every_n_steps": 1}
        make_trainer(small, callbacks, **options).fit(module, data)
        rows = (small / "metrics.jsonl").read_text().splitlines()
    finally:
        subprocess.run(["umount", str(small)], check=True, timeout=20)
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 4 * STEPS_PER_EPOCH + 1))
    full, written = (record.getMessage() for record in caplog.records if "metrics.jsonl" in record.getMessage())
    assert full.startswith(f"{small}/metrics.jsonl can't be written (No space left on device): the run goes on, ")
    number = re.fullmatch(r".*/metrics.jsonl: (\d+) rows that had waited are written", written)
    assert number
    assert 0 < int(number[1]) < 20
