from __future__ import annotations

import torch
from sentence_transformers.sentence_transformer.losses import MSELoss

from tests.losses.side_by_side import assert_equals_peer, draw, embedded, targets_of
from trainer.losses import MSE


def test_equals_sentence_transformers() -> None:
    """The teacher's embedding of the anchor is the goal of all columns; what it says of the others is not asked."""
    teacher_BCD = torch.stack(draw(2, 12, seed=5), dim=1)
    targets = targets_of(12, extras={"teacher": teacher_BCD})
    assert_equals_peer(MSE(), MSELoss(embedded()), draw(2, 12), targets, peer_labels=teacher_BCD[:, 0])
