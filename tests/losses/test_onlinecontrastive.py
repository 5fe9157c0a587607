from __future__ import annotations

import pytest
from sentence_transformers.sentence_transformer.losses import OnlineContrastiveLoss

from tests.losses.side_by_side import assert_equals_peer, draw, embedded, targets_of
from tests.losses.test_contrastive import PEERS
from trainer.losses import OnlineContrastive
from trainer.losses.similarity import Distance


@pytest.mark.parametrize(("distance", "margin"), [("cosine", 0.8), ("euclidean", 8.0), ("manhattan", 30.0)])
@pytest.mark.parametrize("labels", [[0, 1, 1] * 5, [0] * 15, [1] * 15], ids=["both", "negatives", "positives"])
def test_equals_sentence_transformers(labels: list[int], distance: Distance, margin: float) -> None:
    """With one label only, the mean of its distances is the bound."""
    columns = draw(2, 15, spread=0.8)
    peer = OnlineContrastiveLoss(embedded(), PEERS[distance][0], margin)
    assert assert_equals_peer(OnlineContrastive(margin, distance), peer, columns, targets_of(15, labels=labels)) > 0.1
