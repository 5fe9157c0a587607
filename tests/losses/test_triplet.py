from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sentence_transformers.sentence_transformer.losses import TripletDistanceMetric, TripletLoss

from tests.losses.side_by_side import assert_equals_peer, draw, embedded, targets_of
from trainer.losses import Triplet
from trainer.losses.similarity import Distance

PEERS: dict[Distance, tuple[Any, str]] = {
    "cosine": (TripletDistanceMetric.COSINE, "cosine"),
    "euclidean": (TripletDistanceMetric.EUCLIDEAN, "euclidean"),
    "manhattan": (TripletDistanceMetric.MANHATTAN, "cityblock"),
}


@pytest.mark.parametrize(("distance", "margin"), [("cosine", 0.01), ("euclidean", 0.3), ("manhattan", 0.5)])
def test_equals_sentence_transformers(distance: Distance, margin: float) -> None:
    columns = draw(3, 12)
    metric, scipy_name = PEERS[distance]
    peer = TripletLoss(embedded(), metric, margin)
    value = assert_equals_peer(Triplet(margin, distance), peer, columns, targets_of(12))
    a, p, n = (column.double().numpy() for column in columns)
    gaps = np.diag(cdist(a, p, metric=scipy_name)) - np.diag(cdist(a, n, metric=scipy_name)) + margin
    assert 0 < (gaps > 0).sum() < 12
    assert value == pytest.approx(np.maximum(0.0, gaps).mean(), rel=1e-4)
