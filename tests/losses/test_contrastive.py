from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sentence_transformers.sentence_transformer.losses import ContrastiveLoss, SiameseDistanceMetric

from tests.losses.side_by_side import assert_equals_peer, assert_no_rows_give_zero, draw, embedded, targets_of
from trainer.batch import Targets
from trainer.losses import Contrastive, OnlineContrastive
from trainer.losses.similarity import Distance

PEERS: dict[Distance, tuple[Any, str]] = {
    "cosine": (SiameseDistanceMetric.COSINE_DISTANCE, "cosine"),
    "euclidean": (SiameseDistanceMetric.EUCLIDEAN, "euclidean"),
    "manhattan": (SiameseDistanceMetric.MANHATTAN, "cityblock"),
}


@pytest.mark.parametrize(("distance", "margin"), [("cosine", 0.5), ("euclidean", 6.0), ("manhattan", 20.0)])
def test_equals_sentence_transformers(distance: Distance, margin: float) -> None:
    columns, labels = draw(2, 12, spread=0.8), [0, 1] * 6
    metric, scipy_name = PEERS[distance]
    peer = ContrastiveLoss(embedded(), metric, margin)
    value = assert_equals_peer(Contrastive(margin, distance), peer, columns, targets_of(12, labels=labels))
    d = np.diag(cdist(columns[0].double().numpy(), columns[1].double().numpy(), metric=scipy_name))
    y = np.array(labels)
    assert value == pytest.approx(np.mean(0.5 * (y * d**2 + (1 - y) * np.maximum(0.0, margin - d) ** 2)), rel=1e-5)


def test_a_rank_without_rows() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert_no_rows_give_zero(Contrastive(), draw(2, 1), Targets((1, 0), empty, labels_B=empty, rank=1))


@pytest.mark.parametrize("loss", [Contrastive, OnlineContrastive])
@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan])
def test_a_margin_at_which_label_0_costs_nothing(loss: type[Contrastive], margin: float) -> None:
    features = [{"sentence_embedding": column} for column in draw(2, 12)]
    assert not float(ContrastiveLoss(embedded(), margin=margin)(features, torch.zeros(12))) > 0.0
    with pytest.raises(ValueError, match=f"^{loss.__name__} margin is {margin:g}; it must be above 0, and finite$"):
        loss(margin)
