"""Numbers that are not finite never reach the weights: steps under Lightning's own loop, stopped late and by fp16."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from tests.fault_at import FaultAt
from tests.tracking.small_run import make_parts, write_rows
from trainer.distributed.gather import SharedError
from trainer.module import EmbeddingModule


class Weights(Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append({name: value.clone() for name, value in pl_module.state_dict().items()})


@pytest.fixture
def train(tmp_path: Path, demo_texts: list[str]) -> Path:
    return write_rows(tmp_path, demo_texts)


def fit(encoder: Path, train: Path, optimizer: str = "adamw", **settings: Any) -> tuple[EmbeddingModule, Trainer]:
    module, data = make_parts(encoder, train)
    module.optimizer_name = optimizer
    settings = {"max_epochs": -1, "max_steps": 12, "log_every_n_steps": 4, **settings}
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(
        accelerator="cpu", devices=1, use_distributed_sampler=False, default_root_dir=train.parent, **quiet, **settings
    )
    trainer.fit(module, datamodule=data)
    return module, trainer


def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads late, and steps of SGD are fused; the fused optimizers of the CPU leave out steps as well."""
    monkeypatch.setattr("trainer.finite._reads_late", lambda norm, optimizer: True)
    plain = torch.optim.SGD
    monkeypatch.setattr("torch.optim.SGD", lambda groups, lr, fused: plain(groups, lr=lr, fused=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_bad_step_is_found_at_the_next_log(
    tiny_encoder: Path, train: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sixth step is bad, the host looks after the eighth: until then no weight has moved."""
    as_on_an_accelerator(monkeypatch)
    weights = Weights()
    with pytest.raises(SharedError, match=r"step 6: the loss is not finite; no weight was changed. Rows of"):
        fit(tiny_encoder, train, optimizer, callbacks=[FaultAt(5, "nan", rank=0), weights])
    assert len(weights.steps) == 8
    before, *after = weights.steps[4:]
    for later in after:
        assert all(torch.equal(before[name], later[name]) for name in before)
    assert any(not torch.equal(before[name], weights.steps[3][name]) for name in before)
    report = json.loads((train.parent / "nonfinite-step-6.json").read_text())
    assert len(report["rows"][0]) == 2, "the last step of an epoch of 22 rows"


def test_no_checkpoint_after_a_bad_step(tiny_encoder: Path, train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save looks as well, before anything is written."""
    as_on_an_accelerator(monkeypatch)
    path = train.parent / "x.ckpt"

    class Save(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(path)

    with pytest.raises(SharedError, match="step 2: the loss is not finite"):
        fit(tiny_encoder, train, callbacks=[FaultAt(1, "nan", rank=0), Save()])
    assert not path.exists()


def test_late_reads_change_no_weight(tiny_encoder: Path, train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, late = Weights(), Weights()
    fit(tiny_encoder, train, callbacks=[at_once])
    as_on_an_accelerator(monkeypatch)
    fit(tiny_encoder, train, callbacks=[late])
    assert at_once.steps[-1].keys() == late.steps[-1].keys()
    assert all(torch.equal(value, late.steps[-1][name]) for name, value in at_once.steps[-1].items())


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_bad_gradient_of_a_good_loss(tiny_encoder: Path, train: Path, algorithm: str) -> None:
    class Break(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            parameter = next(p for p in pl_module.parameters() if p.grad is not None)
            assert parameter.grad is not None
            parameter.grad[0] = torch.inf

    message = (
        r"step 1: the loss is finite, but its gradient is not; no weight was changed. Rows of \S+, counted from 0: "
    )
    with pytest.raises(SharedError, match=message):
        fit(tiny_encoder, train, callbacks=[Break()], gradient_clip_val=1.0, gradient_clip_algorithm=algorithm)


def test_overflows_of_fp16_are_counted(tiny_encoder: Path, train: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A scale that starts far too high is halved after each overflow: warned after 10, stopped after 50."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    with (
        caplog.at_level(logging.WARNING, logger="trainer.finite"),
        pytest.raises(SharedError) as stopped,
    ):
        fit(tiny_encoder, train, max_steps=60, plugins=[plugin])
    (warning,) = [record.message for record in caplog.records if record.name == "trainer.finite"]
    assert warning.startswith(
        "10 steps in a row were left out by fp16 at step 10: the gradient overflows at a loss scale"
    )
    assert f"scale of {2.0**111:g}; the run stops after 50" in warning
    assert re.fullmatch(
        rf"50 steps in a row .* at step 50: .* scale of {re.escape(f'{2.0**71:g}')}; use trainer.precision bf16-mixed "
        r"or 32-true, or a lower model.learning_rate",
        str(stopped.value),
    )


def test_some_overflows_of_fp16_are_ordinary(tiny_encoder: Path, train: Path) -> None:
    """The scaler finds its scale within a few steps."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**24))
    module, trainer = fit(tiny_encoder, train, max_steps=30, plugins=[plugin])
    assert trainer.global_step == 30
    assert module.finite_steps.num_skipped == 0
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() < 2.0**24
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fp16_clips_at_the_norm_without_its_scale(
    tiny_encoder: Path, train: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both optimizers could be fused: as on CUDA."""
    make = EmbeddingModule.configure_optimizers

    def make_on_cuda(module: EmbeddingModule) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(EmbeddingModule, "device", torch.device("cuda"))
            return make(module)

    monkeypatch.setattr(EmbeddingModule, "configure_optimizers", make_on_cuda)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    settings = {"max_steps": 4, "gradient_clip_val": 0.1}
    half, whole = (fit(tiny_encoder, train, optimizer, **settings, **more)[0] for more in ({"plugins": [plugin]}, {}))
    assert half.last_grad_norm is not None
    assert whole.last_grad_norm is not None
    assert float(half.last_grad_norm) == pytest.approx(float(whole.last_grad_norm), rel=0.05)
