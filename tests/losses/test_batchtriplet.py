from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sentence_transformers.sentence_transformer.losses import (
    BatchAllTripletLoss,
    BatchHardSoftMarginTripletLoss,
    BatchHardTripletLoss,
    BatchHardTripletLossDistanceFunction,
    BatchSemiHardTripletLoss,
)
from torch import Tensor

from tests.losses.side_by_side import (
    assert_equals_peer,
    draw,
    embedded,
    targets_of,
    value_and_gradients,
)
from trainer.losses import BatchHardTriplet, BatchTriplet

Distance = Literal["euclidean", "cosine"]
Mining = Literal["hard", "all", "semi_hard"]
PEERS: dict[Mining, Any] = {
    "hard": BatchHardTripletLoss,
    "all": BatchAllTripletLoss,
    "semi_hard": BatchSemiHardTripletLoss,
}
DISTANCES = {
    "euclidean": BatchHardTripletLossDistanceFunction.euclidean_distance,
    "cosine": BatchHardTripletLossDistanceFunction.cosine_distance,
}
LABELS = {
    "three classes": [0, 1, 2, 0, 1, 2, 0, 1, 2, 0],
    "a class with one text": [0, 0, 0, 0, 1, 1, 1, 1, 1, 2],
    "every text its own class": list(range(10)),
    "one class": [4] * 10,
}


def _numpy_loss(texts: Tensor, labels: list[int], distance: Distance, margin: float | str, mining: Mining) -> float:
    """By the definition: exact distances in double precision, triplet by triplet."""
    distances = cdist(texts.double().numpy(), texts.double().numpy(), metric=distance)
    same = np.equal.outer(labels, labels)
    np.fill_diagonal(same, False)

    def cost(positive: float, negative: float) -> float:
        if margin == "soft":
            return float(np.logaddexp(0.0, positive - negative))
        return max(0.0, positive - negative + float(margin))

    terms = []
    for i, row in enumerate(distances):
        negatives = row[np.not_equal(labels, labels[i])]
        if mining == "hard":
            nearest = negatives.min() if len(negatives) else row.max() + row.min()
            terms.append(cost(row[same[i]].max(initial=0.0), nearest))
            continue
        for positive in row[same[i]]:
            if mining == "all":
                terms += [found for negative in negatives if (found := cost(positive, negative)) > 0.0]
            else:
                further = negatives[negatives > positive]
                terms.append(cost(positive, further.min() if len(further) else negatives.max(initial=0.0)))
    return float(np.mean(terms)) if terms else 0.0


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize(("distance", "margin"), [("euclidean", 5.0), ("euclidean", 0.5), ("cosine", 0.1)])
@pytest.mark.parametrize("mining", PEERS)
def test_equals_sentence_transformers(mining: Mining, labels: list[int], distance: Distance, margin: float) -> None:
    columns = draw(1, len(labels))
    peer = PEERS[mining](embedded(), distance_metric=DISTANCES[distance], margin=margin)
    loss, targets = BatchTriplet(mining, margin, distance), targets_of(10, labels=labels)
    value = assert_equals_peer(loss, peer, columns, targets)
    assert value == pytest.approx(_numpy_loss(columns[0], labels, distance, margin, mining), abs=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_soft_margin_equals_sentence_transformers(distance: Distance) -> None:
    columns, labels = draw(1, 10), LABELS["a class with one text"]
    peer = BatchHardSoftMarginTripletLoss(embedded(), distance_metric=DISTANCES[distance])
    loss = BatchHardTriplet("soft", distance)
    assert loss.describe() == {"mining": "hard", "margin": "soft", "distance": distance}
    value = assert_equals_peer(loss, peer, columns, targets_of(10, labels=labels))
    assert value == pytest.approx(_numpy_loss(columns[0], labels, distance, "soft", "hard"), abs=1e-5)


@pytest.mark.parametrize("mining", ["all", "semi_hard"])
def test_soft_margin_of_other_minings(mining: Mining) -> None:
    """Which sentence-transformers does not have."""
    columns, labels = draw(1, 10), LABELS["three classes"]
    value = BatchTriplet(mining, "soft")(columns, targets_of(10, labels=labels))
    assert float(value) == pytest.approx(_numpy_loss(columns[0], labels, "euclidean", "soft", mining), abs=1e-5)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 1, 1, 0, 2, 2]], ids=["same class", "other class"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_text_that_stands_twice(labels: list[int], distance: Distance) -> None:
    """Equal texts are at distance 0, where the gradient is 0 and not the square root of a rounding error."""
    texts = draw(1, 6)[0]
    texts[1] = texts[0]
    texts[5] = texts[4]
    loss, targets = BatchHardTriplet(1.0, distance), targets_of(6, labels=labels)
    value, gradients = value_and_gradients(lambda x: loss(x, targets), [texts])
    assert float(value) == pytest.approx(_numpy_loss(texts, labels, distance, 1.0, "hard"), abs=1e-5)
    _, exact_gradients = value_and_gradients(lambda x: loss(x, targets), [texts.double()])
    assert torch.allclose(gradients[0].double(), exact_gradients[0], atol=1e-5)


@pytest.mark.parametrize("mining", PEERS)
def test_a_margin_below_0_teaches_nothing(mining: Mining) -> None:
    """Texts of length 1 are 2 apart at most; sentence-transformers' losses are 0 whatever the embeddings."""
    labels = LABELS["three classes"]
    texts = torch.nn.functional.normalize(draw(1, len(labels))[0], dim=-1)
    peer = PEERS[mining](embedded(), margin=-2.0)
    assert float(peer([{"sentence_embedding": texts}], torch.tensor(labels))) == 0.0
    for margin in (-2.0, float("nan")):
        with pytest.raises(ValueError, match=f"^BatchTriplet margin is {margin:g}; it must be 0 or more, and finite$"):
            BatchTriplet(mining, margin)
