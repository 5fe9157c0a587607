from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from torch.testing import assert_close

from tests.losses.side_by_side import D, assert_equals_peer, draw, embedded, targets_of
from trainer.losses import MSE, EmbedDistill


@pytest.mark.parametrize("distance", ["mse", "l2", "cosine"])
@pytest.mark.parametrize("num_columns", [1, 3])
def test_equals_sentence_transformers(distance: Any, num_columns: int) -> None:
    teacher_BCD = torch.stack(draw(num_columns, 12, seed=5), dim=1)
    targets = targets_of(12, extras={"teacher": teacher_BCD})
    peer = EmbedDistillLoss(embedded(), distance_metric=distance)
    assert_equals_peer(EmbedDistill(distance), peer, draw(num_columns, 12), targets, peer_labels=teacher_BCD)


def test_projection_equals_sentence_transformers() -> None:
    teacher_BCD = torch.randn(12, 2, 7, generator=torch.Generator().manual_seed(1))
    targets = targets_of(12, extras={"teacher": teacher_BCD})
    model = embedded()
    model.get_embedding_dimension = lambda: D
    loss, peer = EmbedDistill("mse", projection_dim=7), EmbedDistillLoss(model, "mse", projection_dim=7)
    loss.build(D)
    assert peer.projection is not None
    peer.projection.load_state_dict(loss.projection.state_dict())
    assert_equals_peer(loss, peer, draw(2, 12), targets, peer_labels=teacher_BCD)
    assert_close(loss.projection.weight.grad, peer.projection.weight.grad, rtol=1e-5, atol=1e-6)


def test_a_teacher_of_another_size() -> None:
    targets = targets_of(4, extras={"teacher": torch.zeros(4, 2, 7)})
    with pytest.raises(ValueError, match="embeddings of 24 dimensions with a teacher's of 7; set projection_dim to 7"):
        EmbedDistill()(draw(2, 4), targets)


@pytest.mark.parametrize("loss", [EmbedDistill, MSE])
@pytest.mark.parametrize("dimension", [0, -1])
def test_a_teacher_without_dimensions(loss: Any, dimension: int) -> None:
    with pytest.raises(ValueError, match=f"^{loss.__name__} projection_dim is {dimension}; it must be 1 or more$"):
        loss(projection_dim=dimension)
