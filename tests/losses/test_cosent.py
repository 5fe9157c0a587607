from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import CoSENTLoss

from tests.losses.side_by_side import assert_equals_peer, draw, embedded, targets_of
from trainer.losses import CoSENT


@pytest.mark.parametrize("scale", [20.0, 3.0])
def test_equals_sentence_transformers(scale: float) -> None:
    columns = draw(2, 12, spread=1.0)
    scores = torch.tensor([0.0, 0.2, 0.2, 1.0, 0.6, 0.6, 0.6, 0.9, 0.1, 0.0, 1.0, 0.5])  # with ties
    value = assert_equals_peer(
        CoSENT(scale), CoSENTLoss(embedded(), scale=scale), columns, targets_of(12, scores=scores)
    )
    u, v = (column.double().numpy() for column in columns)
    cosines = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    total = 1.0
    for i, j in itertools.permutations(range(12), 2):
        if scores[i] < scores[j]:
            total += np.exp(scale * (cosines[i] - cosines[j]))
    assert value == pytest.approx(np.log(total), rel=1e-5)


@pytest.mark.parametrize("num_rows", [4, 1])
def test_equal_scores_have_no_order_to_learn(num_rows: int) -> None:
    targets = targets_of(num_rows, scores=[0.5] * num_rows)
    assert assert_equals_peer(CoSENT(), CoSENTLoss(embedded()), draw(2, num_rows), targets) == 0.0
