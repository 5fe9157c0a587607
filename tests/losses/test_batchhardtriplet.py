from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sentence_transformers.sentence_transformer.losses import (
    BatchHardTripletLoss,
    BatchHardTripletLossDistanceFunction,
)
from torch import Tensor

from tests.losses.side_by_side import assert_equals_peer, draw, embedded, targets_of, value_and_gradients
from trainer.losses import BatchHardTriplet

Distance = Literal["euclidean", "cosine"]
PEERS = {
    "euclidean": BatchHardTripletLossDistanceFunction.euclidean_distance,
    "cosine": BatchHardTripletLossDistanceFunction.cosine_distance,
}
LABELS = {
    "three classes": [0, 1, 2, 0, 1, 2, 0, 1, 2, 0],
    "a class with one text": [0, 0, 0, 0, 1, 1, 1, 1, 1, 2],
    "every text its own class": list(range(10)),
    "one class": [4] * 10,
}


def _numpy_loss(texts: Tensor, labels: list[int], distance: Distance, margin: float) -> float:
    """Exact distances in double precision, row by row."""
    distances = cdist(texts.double().numpy(), texts.double().numpy(), metric=distance)
    same = np.equal.outer(labels, labels)
    np.fill_diagonal(same, False)
    terms = []
    for i, row in enumerate(distances):
        positive = row[same[i]].max(initial=0.0)
        other = np.not_equal(labels, labels[i])
        negative = row[other].min() if other.any() else row.max() + row.min()
        terms.append(max(0.0, positive - negative + margin))
    return float(np.mean(terms))


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize(("distance", "margin"), [("euclidean", 5.0), ("euclidean", 0.5), ("cosine", 0.1)])
def test_equals_sentence_transformers(labels: list[int], distance: Distance, margin: float) -> None:
    columns = draw(1, len(labels))
    peer = BatchHardTripletLoss(embedded(), distance_metric=PEERS[distance], margin=margin)
    value = assert_equals_peer(BatchHardTriplet(margin, distance), peer, columns, targets_of(10, labels=labels))
    assert value == pytest.approx(_numpy_loss(columns[0], labels, distance, margin), abs=1e-5)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 1, 1, 0, 2, 2]], ids=["same class", "other class"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_text_that_stands_twice(labels: list[int], distance: Distance) -> None:
    """Equal texts are at distance 0, where the gradient is 0 and not the square root of a rounding error."""
    texts = draw(1, 6)[0]
    texts[1] = texts[0]
    texts[5] = texts[4]
    loss, targets = BatchHardTriplet(1.0, distance), targets_of(6, labels=labels)
    value, gradients = value_and_gradients(lambda x: loss(x, targets), [texts])
    assert float(value) == pytest.approx(_numpy_loss(texts, labels, distance, 1.0), abs=1e-5)
    _, exact_gradients = value_and_gradients(lambda x: loss(x, targets), [texts.double()])
    assert torch.allclose(gradients[0].double(), exact_gradients[0], atol=1e-5)
