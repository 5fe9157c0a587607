from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MarginMSELoss
from sentence_transformers.util import pairwise_cos_sim, pairwise_dot_score

from tests.losses.side_by_side import assert_equals_peer, draw, embedded, targets_of
from trainer.losses import MarginMSE
from trainer.losses.similarity import Similarity


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize(("num_negatives", "num_scores"), [(1, 1), (1, 2), (3, 3), (3, 4)])
def test_equals_sentence_transformers(similarity: Similarity, num_negatives: int, num_scores: int) -> None:
    """With margins, and with scores of the positive and of each negative."""
    scores = torch.randn(12, num_scores, generator=torch.Generator().manual_seed(3))
    targets = targets_of(12, extras={"scores": scores})
    peer = MarginMSELoss(embedded(), pairwise_dot_score if similarity == "dot" else pairwise_cos_sim)
    assert_equals_peer(MarginMSE(similarity), peer, draw(2 + num_negatives, 12), targets, peer_labels=scores)


def test_one_score_a_row_is_the_margin_of_a_triplet() -> None:
    margins = torch.linspace(-1.0, 1.0, 12)
    assert_equals_peer(MarginMSE(), MarginMSELoss(embedded()), draw(3, 12), targets_of(12, scores=margins))


def test_scores_that_do_not_fit_the_columns() -> None:
    targets = targets_of(4, extras={"scores": torch.zeros(4, 4)})
    with pytest.raises(ValueError, match="has 2 negatives and 4 scores a row; give 2 margins, or 3 scores"):
        MarginMSE()(draw(4, 4), targets)
