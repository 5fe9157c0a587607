"""Which step is the best, and what a run that goes back leaves behind: real fits through `Checkpoints`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from tests.tracking.small_run import BATCH, make_parts, make_trainer, write_rows
from trainer import manifest
from trainer.checkpoint import Checkpoints, DirectoryCheckpointIO
from trainer.evaluation.runner import Evaluation
from trainer.tracking.metrics import MetricsLog

METRIC = "eval/dev0/spearman_cosine"


class Scores(Evaluation):
    """Gives these values in place of the metric, one for each step that is evaluated; the rest is Evaluation's."""

    def __init__(self, values: dict[int, float]) -> None:
        super().__init__()
        self.values = values

    def _run(self, trainer: Trainer, *args: Any) -> dict[str, float]:
        return {**super()._run(trainer, *args), METRIC: self.values.get(trainer.global_step, 0.0)}


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


class Odd(Callback):
    """Has a state that no checkpoint may hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"folder": Path("runs")}


@pytest.fixture
def rows(tmp_path: Path, demo_texts: list[str]) -> list[Path]:
    return [write_rows(tmp_path, demo_texts), write_rows(tmp_path, demo_texts, 41)]


def fit(
    run_dir: Path,
    encoder: Path,
    rows: list[Path],
    values: dict[int, float],
    *more: Callback,
    ckpt: Path | None = None,
    keep: int = 1,
    monitor: str = "auto",
    batch_size: int = BATCH,
    **options: Any,
) -> Trainer:
    """12 steps, evaluated and saved at each second one."""
    module, data = make_parts(encoder, rows[0], rows[1:])
    data.batch_size = batch_size
    callbacks = [*more, MetricsLog(), Scores(values), Checkpoints(2, keep, monitor)]
    options = {"val_check_interval": 2, "enable_checkpointing": True, **options}
    trainer = make_trainer(run_dir, callbacks, plugins=[DirectoryCheckpointIO()], **options)
    trainer.fit(module, data, ckpt_path=ckpt)
    return trainer


def kept(run_dir: Path) -> list[int]:
    return list(manifest.steps(run_dir))


def best_step(run_dir: Path) -> int | None:
    found = manifest.best(run_dir)
    return None if found is None else int(found.name.removeprefix("step-"))


def test_the_best_and_the_newest_are_kept(tmp_path: Path, tiny_encoder: Path, rows: list[Path]) -> None:
    fit(tmp_path, tiny_encoder, rows, {4: 0.5, 8: 0.4, 12: 0.3})
    assert (kept(tmp_path), best_step(tmp_path)) == ([4, 12], 4)


def test_a_value_that_is_none_is_not_the_best(tmp_path: Path, tiny_encoder: Path, rows: list[Path]) -> None:
    fit(tmp_path, tiny_encoder, rows, {2: float("nan"), 4: 0.5, 6: float("nan"), 8: 0.4})
    assert best_step(tmp_path) == 4


def test_a_step_that_nobody_planned_can_be_the_best(tmp_path: Path, tiny_encoder: Path, rows: list[Path]) -> None:
    """Stopped where it is saved, and evaluated only at its end."""
    fit(tmp_path, tiny_encoder, rows, {3: 0.1, 8: 0.9}, StopAt(8), val_check_interval=3)
    assert (kept(tmp_path), best_step(tmp_path)) == ([8], 8)
    saved = manifest.read_state(tmp_path / "checkpoints" / "step-00000008")["callbacks"]
    assert saved["Checkpoints"]["best_step"] == saved["Scores"]["step"] == 8


def test_a_run_that_goes_back_leaves_the_later_steps(
    tmp_path: Path, tiny_encoder: Path, rows: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """They are neither the newest nor the best of the run that goes on, and are not deleted."""
    fit(tmp_path, tiny_encoder, rows, {4: 0.5, 10: 0.9}, keep=-1)
    assert (kept(tmp_path), best_step(tmp_path)) == ([2, 4, 6, 8, 10, 12], 10)
    with caplog.at_level(logging.WARNING):
        earlier = tmp_path / "checkpoints" / "step-00000006"
        fit(tmp_path, tiny_encoder, rows, {8: 0.6}, StopAt(8), ckpt=earlier, keep=2)
    assert (kept(tmp_path), best_step(tmp_path)) == ([6, 8], 8)
    aside = tmp_path / "checkpoints" / "abandoned"
    assert f"going on from step 6: 3 later checkpoint(s) are now in {aside}" in caplog.text
    assert sorted(path.name for path in aside.iterdir()) == ["step-00000008", "step-00000010", "step-00000012"]
    assert manifest.problem(aside / "step-00000012") is None


def test_a_kill_between_a_checkpoint_and_its_mark(tmp_path: Path, tiny_encoder: Path, rows: list[Path]) -> None:
    fit(tmp_path, tiny_encoder, rows, {2: 0.1, 6: 0.9}, StopAt(6), keep=-1)
    manifest.mark_best(tmp_path, 2)  # what a kill before the mark leaves
    fit(tmp_path, tiny_encoder, rows, {}, ckpt=tmp_path / "checkpoints" / "step-00000006")
    assert (kept(tmp_path), best_step(tmp_path)) == ([6, 12], 6)


def test_another_metric_has_another_best(
    tmp_path: Path, tiny_encoder: Path, rows: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, tiny_encoder, rows, {4: 5.0}, StopAt(6), keep=-1)
    assert best_step(tmp_path) == 4
    other = "eval/dev0/pearson_cosine"
    fit(tmp_path, tiny_encoder, rows, {}, ckpt=tmp_path / "checkpoints" / "step-00000006", monitor=other)
    assert (best_step(tmp_path) or 0) > 6
    assert f"the checkpoint watched {METRIC} (max), this run watches {other} (max)" in caplog.text


def test_a_metric_without_a_set_is_refused_before_the_first_step(
    tmp_path: Path, tiny_encoder: Path, rows: list[Path]
) -> None:
    with pytest.raises(ValueError, match=r"checkpoint.monitor '.*' is not measured, for no set is: .*; name a set in"):
        fit(tmp_path, tiny_encoder, rows[:1], {}, monitor=METRIC)
    assert kept(tmp_path) == []
    fit(tmp_path, tiny_encoder, rows[:1], {})
    assert kept(tmp_path) == [12], "auto watches nothing where nothing is evaluated"


@pytest.mark.parametrize("killed_at", [6, 12])
def test_early_stopping_is_decided_once(tmp_path: Path, tiny_encoder: Path, rows: list[Path], killed_at: int) -> None:
    """The checkpoint at an epoch's end knows what early stopping found there; one of the last step, that it stopped."""
    stop = lambda: EarlyStopping(METRIC, mode="max", patience=1, min_delta=0.1)  # noqa: E731
    values = {0: 0.0, 6: 0.5, 12: 0.5}
    options: dict[str, Any] = {"val_check_interval": 1.0, "max_epochs": 4, "keep": -1}
    whole = fit(tmp_path / "whole", tiny_encoder, rows, values, stop(), **options)
    assert whole.global_step == 12
    checkpoint = tmp_path / "whole" / "checkpoints" / f"step-{killed_at:08d}"
    resumed = fit(tmp_path / "resumed", tiny_encoder, rows, values, stop(), ckpt=checkpoint, **options)
    assert resumed.global_step == 12


def test_the_patience_of_a_run_that_goes_on_is_the_one_it_is_given(
    tmp_path: Path, tiny_encoder: Path, rows: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    stop = lambda patience: EarlyStopping(METRIC, mode="max", patience=patience)  # noqa: E731
    options: dict[str, Any] = {"val_check_interval": 1.0, "max_epochs": 4, "keep": -1}
    assert fit(tmp_path, tiny_encoder, rows, {}, stop(1), **options).global_step == 12
    last = tmp_path / "checkpoints" / "step-00000012"
    assert fit(tmp_path, tiny_encoder, rows, {}, stop(1), ckpt=last, **options).global_step == 12
    assert f"EarlyStopping ended the run at step 12: {METRIC} was not better for 1 evaluations; to go on" in caplog.text
    assert fit(tmp_path, tiny_encoder, rows, {}, stop(100), ckpt=last, **options).global_step == 24


@pytest.mark.parametrize("stopped_at", [1, 6, 7, 12, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 11))])
def test_a_run_that_a_callback_stopped_goes_on_to_its_planned_end(
    tmp_path: Path, tiny_encoder: Path, rows: list[Path], stopped_at: int
) -> None:
    """In the first epoch, in the second or between them: the weights are those of a run that nothing stopped."""
    whole = fit(tmp_path / "whole", tiny_encoder, rows, {})
    assert whole.global_step == 12
    stopped = fit(tmp_path / "stopped", tiny_encoder, rows, {}, StopAt(stopped_at))
    assert stopped.global_step == stopped_at
    resumed = fit(tmp_path / "stopped", tiny_encoder, rows, {}, ckpt=manifest.newest(tmp_path / "stopped"))
    assert resumed.global_step == 12
    one, other = (trainer.lightning_module.state_dict() for trainer in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("before", "step", "after", "planned"),
    [(4, 2, 2, 22), (4, 8, 2, 22), (2, 6, 4, 12), (2, 12, 4, 12), (4, 8, 8, 8), (2, 8, 8, 8)],
)
def test_another_batch_size_ends_at_the_steps_it_plans(
    tmp_path: Path, tiny_encoder: Path, rows: list[Path], before: int, step: int, after: int, planned: int
) -> None:
    """22 rows twice: the step may lie in another epoch than by the new count, and behind the planned end or on it."""
    stopped = fit(tmp_path, tiny_encoder, rows, {}, StopAt(step), batch_size=before)
    assert stopped.global_step == step
    resumed = fit(tmp_path, tiny_encoder, rows, {}, ckpt=manifest.newest(tmp_path), batch_size=after)
    assert resumed.global_step == max(step, planned)
    assert manifest.newest(tmp_path) == tmp_path / "checkpoints" / f"step-{max(step, planned):08d}"


def test_the_best_step_of_another_run_is_none_of_this_one(tmp_path: Path, tiny_encoder: Path, rows: list[Path]) -> None:
    options: dict[str, Any] = {"val_check_interval": 2, "keep": -1}
    fit(tmp_path / "first", tiny_encoder, rows, {2: 5.0}, StopAt(4), **options)
    assert best_step(tmp_path / "first") == 2
    start = tmp_path / "first" / "checkpoints" / "step-00000004"
    fit(tmp_path / "second", tiny_encoder, rows, {8: 1.0}, ckpt=start, **options)
    assert best_step(tmp_path / "second") == 8


def test_a_run_that_ends_where_it_begins_leaves_its_checkpoint(
    tmp_path: Path, tiny_encoder: Path, rows: list[Path]
) -> None:
    stop = lambda: EarlyStopping(METRIC, mode="max", patience=1)  # noqa: E731
    assert fit(tmp_path, tiny_encoder, rows, {2: 0.5}, stop()).global_step == 4
    last = tmp_path / "checkpoints" / "step-00000004"
    before = [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(last.iterdir())]
    assert fit(tmp_path, tiny_encoder, rows, {}, stop(), ckpt=last).global_step == 4
    assert before == [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(last.iterdir())]


def test_a_state_that_would_not_be_read_is_not_written(tmp_path: Path, tiny_encoder: Path, rows: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"step-00000002 would not be read again: it holds a pathlib\.PosixPath"):
        fit(tmp_path, tiny_encoder, rows, {}, Odd())
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_model_checkpoint_that_cannot_write_ends_the_run(
    tmp_path: Path, tiny_encoder: Path, rows: list[Path]
) -> None:
    (tmp_path / "own").write_text("a file where a folder should be")
    own = ModelCheckpoint(tmp_path / "own/last", every_n_train_steps=1)
    with pytest.raises(ValueError, match=r"own/last/.* can't be written: .*Not a directory"):
        fit(tmp_path, tiny_encoder, rows, {}, own)
