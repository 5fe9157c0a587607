from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.losses.side_by_side import D, draw, targets_of, value_and_gradients
from trainer.losses import (
    AnglE,
    BatchHardTriplet,
    BatchTriplet,
    CoSENT,
    CosineSimilarity,
    EmbedDistill,
    GISTEmbed,
    GlobalOrthogonalRegularization,
    InfoNCE,
    Loss,
    MarginMSE,
    SigLIP,
)

LOSSES: dict[str, tuple[Callable[[], Loss], int]] = {
    "CosineSimilarity": (CosineSimilarity, 2),
    "CoSENT": (CoSENT, 2),
    "InfoNCE": (InfoNCE, 3),
    "InfoNCE dot": (lambda: InfoNCE(0.1, "dot"), 2),
    "BatchHardTriplet": (BatchHardTriplet, 1),
    "BatchHardTriplet cosine": (lambda: BatchHardTriplet(0.5, "cosine"), 1),
    "BatchTriplet semi-hard": (lambda: BatchTriplet("semi_hard"), 1),
    "AnglE": (AnglE, 2),
    "GISTEmbed": (GISTEmbed, 3),
    "SigLIP": (SigLIP, 2),
    "GlobalOrthogonalRegularization": (GlobalOrthogonalRegularization, 2),
    "MarginMSE": (lambda: MarginMSE("dot"), 3),
    "EmbedDistill": (EmbedDistill, 3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_round_the_loss(name: str) -> None:
    """Under bf16-mixed the encoder computes in half precision; its float32 embeddings are compared as they are."""
    make, num_columns = LOSSES[name]
    labels, scores = [row % 4 for row in range(16)], torch.linspace(0.0, 1.0, 16)
    columns = draw(num_columns, 16)
    extras = {"teacher": torch.stack(draw(num_columns, 16, seed=1), dim=1)}
    targets = targets_of(16, labels=labels, scores=scores, extras=extras)
    loss = make()
    loss.build(D)

    def under_autocast(x: list[Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(x, targets)

    plain, plain_gradients = value_and_gradients(lambda x: loss(x, targets), columns)
    value, gradients = value_and_gradients(under_autocast, columns)
    assert float(plain) != 0.0
    assert torch.equal(value, plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain_gradients, strict=True))
