from __future__ import annotations

from typing import Any

import pytest
from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss
from torch import Tensor

from tests.losses.side_by_side import assert_equals_peer, draw, embedded, targets_of
from trainer.losses import GlobalOrthogonalRegularization


@pytest.mark.parametrize(
    "options",
    [{}, {"aggregation": "sum", "mean_weight": 3.0}, {"second_moment_weight": 0.0}, {"mean_weight": 0.0}],
    ids=["mean", "sum", "mean term", "second moment"],
)
@pytest.mark.parametrize("num_rows", [12, 1])
def test_equals_sentence_transformers(options: dict[str, Any], num_rows: int) -> None:
    peer = GlobalOrthogonalRegularizationLoss(embedded(), **options)

    def theirs(features: list[dict[str, Tensor]], labels: Any) -> Any:
        return sum(peer(features, labels).values())  # their trainer sums the parts

    value = assert_equals_peer(
        GlobalOrthogonalRegularization(**options), theirs, draw(2, num_rows, spread=1.0), targets_of(num_rows)
    )
    assert (value == 0.0) == (num_rows == 1)
