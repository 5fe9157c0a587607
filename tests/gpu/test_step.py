"""A step on a GPU: the loss and the gradients that it has on a CPU, and no number of the device is read on the host."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.batches import gradients_of, norm_of, relative_error
from tests.gpu.conftest import WithoutReads
from tests.test_exactness import LOSSES, Siamese, load_once, make_run
from trainer.finite import FiniteSteps
from trainer.optimizer import clip, gradient_norm

# Their sums run over as many pairs as the numbers say.
READING_LOSSES = {"BatchTriplet all", "BatchTriplet semi_hard"}


def _step(model: Siamese, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """As EmbeddingModule's, from the batch to the optimizer; the loss, and the gradients before they are clipped."""
    finite, trainer = FiniteSteps(), SimpleNamespace(precision_plugin=None, global_step=0)
    loss = finite.watch_loss(model(batch.to(next(model.parameters()).device)), 0)
    loss.backward()
    gradients = gradients_of(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    norm = gradient_norm(parameters)
    clip(optimizer, parameters, 1.0, norm)
    finite.check(norm, optimizer, trainer)  # type: ignore[arg-type]
    optimizer.step()
    return loss.detach(), gradients


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss(without_reads: WithoutReads, tiny_encoder: Path, demo_texts: list[str], loss: str) -> None:
    run = make_run(tiny_encoder, loss, demo_texts, 15)
    expected_loss, expected = _step(Siamese(run), run.batch(slice(None)))
    load_once.cache_clear()  # the encoder leaves the host for good
    model, batch = Siamese(run).to("cuda"), run.batch(slice(None))
    load_once.cache_clear()
    with nullcontext() if loss in READING_LOSSES else without_reads():
        found_loss, found = _step(model, batch)
    assert float(found_loss) == pytest.approx(float(expected_loss), rel=1e-5)
    on_host = {name: gradient.cpu() for name, gradient in found.items()}
    assert norm_of(expected) > 1e-2, "a gradient of nothing"
    assert relative_error(on_host, expected) < 1e-5
