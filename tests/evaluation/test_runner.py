"""When a run is evaluated, with which weights, and what it leaves untouched; in one process and on two."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from tests.evaluation.test_informationretrieval import write_set
from tests.tracking.small_run import (
    STEPS_PER_EPOCH,
    SaveAt,
    make_parts,
    make_trainer,
    read_metrics,
    without_times,
    write_rows,
)
from tests.two_ranks import TwoRanks
from trainer.data.evalsource import EvalSource
from trainer.encoder import EncoderSpec
from trainer.evaluation import MSE, InformationRetrieval
from trainer.evaluation.runner import Evaluation, is_due
from trainer.tracking.metrics import MetricsLog

METRIC = "eval/dev0/spearman_cosine"


@pytest.mark.parametrize(
    ("interval", "steps_per_epoch", "every_n_epoch", "due"),
    [
        (1.0, 6, 1, [6, 12, 18]),
        (1.0, 6, 2, [12]),
        (0.5, 6, 1, [3, 6, 9, 12, 15, 18]),
        (0.5, 7, 1, [4, 7, 11, 14, 18]),
        (0.25, 359, 1, [90, 180, 270, 359]),
        (0.1, 30, 1, list(range(3, 31, 3))),
        (0.3, 10, 1, [3, 6, 9, 13, 16, 19]),
        (0.01, 4, 1, list(range(1, 19))),
        (4, 6, 1, [4, 8, 12, 16]),
        (4, 6, 3, [16]),
        (100, 6, 1, []),
    ],
)
def test_intervals(interval: float, steps_per_epoch: int, every_n_epoch: int, due: list[int]) -> None:
    last = steps_per_epoch if steps_per_epoch > 18 else 18
    found = [step for step in range(1, last + 1) if is_due(step, interval, steps_per_epoch, every_n_epoch)]
    assert found == [step for step in due if step <= last]


class Watch(Callback):
    """Behind `Evaluation`: random state, modes and gradients of each step, and the metrics callbacks see."""

    def __init__(self) -> None:
        self.states: list[tuple[Any, ...]] = []
        self.seen: list[float | None] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        modes = tuple(part.training for part in pl_module.modules())
        numbers = float(np.random.rand()), random.random(), torch.get_rng_state().sum().item()
        self.states.append((modes, numbers, torch.is_grad_enabled(), float(outputs["loss"])))
        value = trainer.callback_metrics.get(METRIC)
        self.seen.append(None if value is None else float(value))


def fit(
    run_dir: Path, encoder: Path, rows: list[Path], *more: Callback, ckpt: Path | None = None, **options: Any
) -> tuple[Watch, Evaluation, Trainer]:
    module, data = make_parts(encoder, rows[0], rows[1:], dropout=0.1)
    watch, evaluation = Watch(), Evaluation()
    trainer = make_trainer(run_dir, [MetricsLog(), evaluation, watch, *more], **options)
    trainer.fit(module, data, ckpt_path=ckpt)
    return watch, evaluation, trainer


def evaluated_steps(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir) if METRIC in row]


@pytest.fixture
def rows(tmp_path: Path, demo_texts: list[str]) -> list[Path]:
    """Training rows and 41 rows of validation."""
    return [write_rows(tmp_path, demo_texts), write_rows(tmp_path, demo_texts, 41)]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 6, 12]),
        ({"val_check_interval": 0.5}, [0, 3, 6, 9, 12]),
        ({"val_check_interval": 5}, [0, 5, 10, 12]),
        ({"val_check_interval": 100}, [0, 12]),
        ({"check_val_every_n_epoch": 2}, [0, 12]),
        ({"max_steps": 8}, [0, 6, 8]),
        ({"limit_train_batches": 4}, [0, 4, 8]),
    ],
)
def test_when(tmp_path: Path, tiny_encoder: Path, rows: list[Path], options: dict[str, Any], steps: list[int]) -> None:
    fit(tmp_path, tiny_encoder, rows, **options)
    assert evaluated_steps(tmp_path) == steps


def test_training_is_the_same_with_and_without_evaluation(tmp_path: Path, tiny_encoder: Path, rows: list[Path]) -> None:
    """Dropout on: losses, modes and random numbers of every step, bit for bit."""
    often, *_ = fit(tmp_path / "often", tiny_encoder, rows, val_check_interval=1)
    never, evaluation, _ = fit(tmp_path / "never", tiny_encoder, rows, limit_val_batches=0)
    assert often.states == never.states
    assert any(often.states[0][0])
    assert evaluated_steps(tmp_path / "often") == list(range(13))
    assert evaluated_steps(tmp_path / "never") == []
    assert evaluation.last_metrics == {}


def test_metrics_are_those_of_the_weights_in_evaluation_mode(
    tmp_path: Path, tiny_encoder: Path, rows: list[Path]
) -> None:
    """`trainer.validate` with the final weights gives what the last step logged and callbacks saw."""
    watch, evaluation, trainer = fit(tmp_path, tiny_encoder, rows, val_check_interval=4)
    logged = [row for row in read_metrics(tmp_path) if METRIC in row]
    module = trainer.lightning_module
    (validated,) = trainer.validate(module, datamodule=trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    (tested,) = trainer.test(module, datamodule=trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    assert validated.keys() == tested.keys() == evaluation.last_metrics.keys()
    assert {name for name in logged[-1] if name.startswith("eval/")} == validated.keys()
    for name, value in evaluation.last_metrics.items():
        assert logged[-1][name] == value
        assert validated[name] == tested[name] == pytest.approx(value, abs=1e-6)
    # Each step sees the newest value: steps 1-3 that of step 0, steps 4-7 that of step 4, ...
    values = [row[METRIC] for row in logged]
    assert watch.seen == [values[0]] * 3 + [values[1]] * 4 + [values[2]] * 4 + [values[3]]
    assert len(set(values)) == 4
    # and validation leaves the history of the training alone
    assert [row for row in read_metrics(tmp_path) if METRIC in row] == logged


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.5}])
def test_early_stopping(
    tmp_path: Path, tiny_encoder: Path, rows: list[Path], options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """It stops where the metric can't get better, at the end of an epoch or in the middle of one."""
    stop = EarlyStopping(METRIC, mode="max", patience=1, min_delta=2.0)
    _, _, trainer = fit(tmp_path, tiny_encoder, rows, stop, max_epochs=5, **options)
    assert trainer.global_step == (12 if not options else 6)
    assert evaluated_steps(tmp_path) == ([0, 6, 12] if not options else [0, 3, 6])
    best = next(row[METRIC] for row in read_metrics(tmp_path) if row["step"] == (6 if not options else 3))
    assert (
        f"EarlyStopping ended the run at step {trainer.global_step}: {METRIC} was not better than {best:.4f} for 1 "
        "evaluations (patience 1)\n"
    ) in capsys.readouterr().out


class StopAt(SaveAt):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == self.step:
            trainer.should_stop = True


def test_a_run_that_stops_is_evaluated_and_goes_on(tmp_path: Path, tiny_encoder: Path, rows: list[Path]) -> None:
    """Stopped at step 7, evaluated as the last one; the resumed run starts with the metrics of step 5."""
    whole, *_ = fit(tmp_path / "whole", tiny_encoder, rows, val_check_interval=5)
    path = tmp_path / "saved.ckpt"
    fit(tmp_path / "run", tiny_encoder, rows, StopAt(7, path), val_check_interval=5)
    assert evaluated_steps(tmp_path / "run") == [0, 5, 7]
    resumed, *_ = fit(tmp_path / "run", tiny_encoder, rows, ckpt=path, val_check_interval=5)
    assert evaluated_steps(tmp_path / "run") == [0, 5, 7, 10, 12]
    assert resumed.seen == whole.seen[7:]


@pytest.mark.parametrize("num_sets", [0, 1])
def test_a_time_as_interval_is_refused(tmp_path: Path, tiny_encoder: Path, rows: list[Path], num_sets: int) -> None:
    with pytest.raises(ValueError, match=r"val_check_interval is a time, .* Give a number of steps"):
        fit(tmp_path, tiny_encoder, rows[: 1 + num_sets], val_check_interval="00:00:01:00")


def fit_all_kinds(run_dir: Path, encoder: Path, rows: list[Path], folder: Path) -> list[dict[str, float]]:
    """Neighbours, a teacher and a suite in the middle of a fit; the metrics of its evaluations."""
    module, data = make_parts(encoder, rows[0])
    columns = {"anchor": "anchor", "positive": "anchor"}
    data.validation_sources = [
        EvalSource(str(folder / "one"), name="set", evaluator=InformationRetrieval()),
        EvalSource(str(folder), name="suite", evaluator=InformationRetrieval()),
        EvalSource(str(rows[1]), columns, name="teacher", evaluator=MSE(), teacher=EncoderSpec(str(encoder))),
    ]
    evaluation = Evaluation()
    trainer = make_trainer(run_dir, [MetricsLog(), evaluation], val_check_interval=1.0, max_epochs=1)
    trainer.fit(module, data)
    logged = [row for row in read_metrics(run_dir) if "eval/set/cosine_ndcg@10" in row]
    return [{name: value for name, value in row.items() if name.startswith("eval/")} for row in logged]


def test_all_kinds_of_sets_in_a_fit(
    tmp_path: Path, tiny_encoder: Path, rows: list[Path], demo_texts: list[str], two_ranks: TwoRanks
) -> None:
    """Before the training the model is its own teacher, on two ranks everything is as on one; then it has moved."""
    write_set(tmp_path / "sets" / "one", demo_texts[:100], copies=1)
    write_set(tmp_path / "sets" / "two", demo_texts[100:200], copies=2)
    first, last = fit_all_kinds(tmp_path / "alone", tiny_encoder, rows, tmp_path / "sets")
    assert first["eval/teacher/negative_mse"] == pytest.approx(0.0, abs=1e-8)
    assert last["eval/teacher/negative_mse"] < -1e-3
    assert first["eval/set/cosine_ndcg@10"] == first["eval/suite/one/cosine_ndcg@10"]
    both = [first[f"eval/suite/{name}/cosine_map@100"] for name in ("one", "two")]
    assert first["eval/suite/cosine_map@100"] == pytest.approx(sum(both) / 2)
    shared, _ = two_ranks(fit_all_kinds, tmp_path / "shared", tiny_encoder, rows, tmp_path / "sets")
    assert shared[0] == pytest.approx(first, abs=1e-6)
    assert shared[0].keys() == last.keys()


def fit_on_rank(run_dir: Path, encoder: Path, rows: list[Path]) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    watch, evaluation, trainer = fit(run_dir, encoder, rows, val_check_interval=0.5)
    (validated,) = trainer.validate(trainer.lightning_module, datamodule=trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    assert validated[METRIC] == pytest.approx(evaluation.last_metrics[METRIC], abs=1e-6)
    return watch.states, evaluation.last_metrics


def test_two_ranks(tmp_path: Path, tiny_encoder: Path, rows: list[Path], two_ranks: TwoRanks) -> None:
    """Both ranks have the same metrics, rank 0 writes them once."""
    (states, first), (_, second) = two_ranks(fit_on_rank, tmp_path / "two", tiny_encoder, rows)
    assert first == second
    assert METRIC in first
    assert all(any(modes) for modes, *_ in states)
    assert evaluated_steps(tmp_path / "two") == [0, 3, 6, 9, 12]
    # Before training, with equal weights, the metrics equal those of one process.
    fit(tmp_path / "one", tiny_encoder, rows, max_steps=1)
    two, one = read_metrics(tmp_path / "two")[0], read_metrics(tmp_path / "one")[0]
    assert two.keys() == one.keys()
    for name, value in without_times(two).items():  # the health of the embeddings too
        assert value == pytest.approx(one[name], abs=1e-5), name
    assert STEPS_PER_EPOCH == 6
