from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
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


def test_a_margin_below_0_teaches_nothing() -> None:
    """Texts of length 1 are 2 apart at most; sentence-transformers' loss is 0 whatever the embeddings."""
    columns = [torch.nn.functional.normalize(column, dim=-1) for column in draw(3, 12)]
    features = [{"sentence_embedding": column} for column in columns]
    assert float(TripletLoss(embedded(), triplet_margin=-2.0)(features, torch.zeros(12))) == 0.0
    for margin in (-2.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^Triplet margin is {margin:g}; it must be 0 or more, and finite$"):
            Triplet(margin)
    assert_equals_peer(Triplet(0.0), TripletLoss(embedded(), triplet_margin=0.0), columns, targets_of(12))
