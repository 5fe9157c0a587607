from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import AnglELoss

from tests.losses.side_by_side import assert_equals_peer, draw, embedded, targets_of
from trainer.losses import AnglE


@pytest.mark.parametrize("dimension", [24, 23])
def test_equals_sentence_transformers(dimension: int) -> None:
    """An odd dimension is filled up with a 0. The similarity is the real and imaginary part of a complex product."""
    columns = [column[:, :dimension] for column in draw(2, 12, spread=1.0)]
    scores = torch.tensor([0.0, 0.2, 0.2, 1.0, 0.6, 0.6, 0.6, 0.9, 0.1, 0.0, 1.0, 0.5])
    loss = AnglE(20.0)
    assert_equals_peer(loss, AnglELoss(embedded(), scale=20.0), columns, targets_of(12, scores=scores))
    filled = [np.pad(column.double().numpy(), ((0, 0), (0, dimension % 2))) for column in columns]
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in filled)
    half = u.shape[1] // 2
    product = ((u[:, :half] + 1j * u[:, half:]) * (v[:, :half] - 1j * v[:, half:])).sum(axis=1)
    wanted = np.abs(product.real + product.imag)
    assert loss.similarities(columns).numpy() == pytest.approx(wanted, abs=1e-6)
