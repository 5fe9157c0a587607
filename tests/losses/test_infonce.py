from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim, dot_score

from tests.losses.side_by_side import assert_equals_peer, draw, embedded, targets_of
from trainer.losses import InfoNCE
from trainer.losses.similarity import Similarity


@pytest.mark.parametrize(("similarity", "scale"), [("cosine", 20.0), ("cosine", 1.0), ("dot", 0.5)])
@pytest.mark.parametrize("num_columns", [2, 3, 4])
def test_equals_sentence_transformers(similarity: Similarity, scale: float, num_columns: int) -> None:
    columns = draw(num_columns, 12, spread=1.0)
    peer = MultipleNegativesRankingLoss(
        embedded(), scale=scale, similarity_fct=cos_sim if similarity == "cosine" else dot_score
    )
    value = assert_equals_peer(InfoNCE(scale, similarity), peer, columns, targets_of(12))
    anchors, *candidates = (column.double().numpy() for column in columns)
    stacked = np.concatenate(candidates)
    if similarity == "cosine":
        anchors = anchors / np.linalg.norm(anchors, axis=1, keepdims=True)
        stacked = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
    logits = scale * anchors @ stacked.T
    assert value == pytest.approx(np.mean(logsumexp(logits, axis=1) - np.diag(logits[:, :12])), rel=1e-5)


def test_one_row_without_negatives_has_nothing_to_learn() -> None:
    peer = MultipleNegativesRankingLoss(embedded())
    assert assert_equals_peer(InfoNCE(), peer, draw(2, 1), targets_of(1)) == 0.0
