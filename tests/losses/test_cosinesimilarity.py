from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

from tests.losses.side_by_side import assert_equals_peer, assert_no_rows_give_zero, draw, embedded, targets_of
from trainer.batch import Targets
from trainer.losses import CosineSimilarity


@pytest.mark.parametrize("num_rows", [16, 1])
def test_equals_sentence_transformers(num_rows: int) -> None:
    columns, scores = draw(2, num_rows), torch.linspace(-1.0, 1.0, num_rows)
    value = assert_equals_peer(
        CosineSimilarity(), CosineSimilarityLoss(embedded()), columns, targets_of(num_rows, scores=scores)
    )
    u, v = (column.double().numpy() for column in columns)
    cosines = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    assert value == pytest.approx(np.mean((cosines - scores.numpy()) ** 2), rel=1e-5)


def test_a_rank_without_rows() -> None:
    targets = Targets((1, 0), torch.empty(0, dtype=torch.int64), scores_B=torch.empty(0), rank=1)
    assert_no_rows_give_zero(CosineSimilarity(), draw(2, 1), targets)
