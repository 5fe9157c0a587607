from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
from sentence_transformers.util import pairwise_cos_sim, pairwise_dot_score

from tests.losses.side_by_side import assert_equals_peer, draw, embedded, targets_of
from trainer.losses import DistillKLDiv


@pytest.mark.parametrize(("scale", "teacher_scale"), [(1.0, None), (0.25, None), (4.0, 0.5)])
@pytest.mark.parametrize("num_candidates", [2, 4])
def test_equals_sentence_transformers(scale: float, teacher_scale: float | None, num_candidates: int) -> None:
    scores = torch.randn(12, num_candidates, generator=torch.Generator().manual_seed(3))
    targets = targets_of(12, extras={"scores": scores})
    peer = DistillKLDivLoss(
        embedded(),
        pairwise_cos_sim,
        temperature=1.0 / scale,
        teacher_temperature=None if teacher_scale is None else 1.0 / teacher_scale,
    )
    loss = DistillKLDiv(scale, teacher_scale, "cosine")
    assert_equals_peer(loss, peer, draw(1 + num_candidates, 12), targets, peer_labels=scores)


def test_dot_products_that_leave_nothing_of_a_candidate() -> None:
    """Dot products of 24 differ by tens: probabilities of 1e-20 are no 0 times infinity."""
    scores = torch.randn(12, 3, generator=torch.Generator().manual_seed(3))
    targets = targets_of(12, extras={"scores": 200.0 * scores})
    peer = DistillKLDivLoss(embedded(), pairwise_dot_score)
    assert_equals_peer(DistillKLDiv(), peer, draw(4, 12), targets, peer_labels=200.0 * scores)


def test_scores_that_do_not_fit_the_columns() -> None:
    targets = targets_of(4, scores=[0.5] * 4)
    with pytest.raises(ValueError, match="has 2 candidates and 1 scores a row; give one for each"):
        DistillKLDiv()(draw(3, 4), targets)
