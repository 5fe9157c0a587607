from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import SoftmaxLoss
from torch.testing import assert_close

from tests.losses.side_by_side import (
    D,
    assert_equals_peer,
    assert_no_rows_give_zero,
    draw,
    embedded,
    targets_of,
)
from trainer.batch import Targets
from trainer.losses import Softmax


@pytest.mark.parametrize("num_rows", [16, 1])
def test_equals_sentence_transformers_and_so_does_the_head(num_rows: int) -> None:
    labels = torch.randint(0, 3, (num_rows,), generator=torch.Generator().manual_seed(2)).tolist()
    loss, peer = Softmax(num_labels=3), SoftmaxLoss(embedded(), D, num_labels=3)
    loss.build(D)
    peer.classifier.load_state_dict(loss.classifier.state_dict())
    assert_equals_peer(loss, peer, draw(2, num_rows), targets_of(num_rows, labels=labels))
    for ours, theirs in zip(loss.classifier.parameters(), peer.classifier.parameters(), strict=True):
        assert ours.grad is not None
        assert ours.grad.abs().max() > 1e-3
        assert_close(ours.grad, theirs.grad, rtol=0.0, atol=1e-5 * float(ours.grad.abs().max()))


def test_a_rank_without_rows() -> None:
    loss = Softmax(num_labels=3)
    loss.build(D)
    empty = torch.empty(0, dtype=torch.int64)
    assert_no_rows_give_zero(loss, draw(2, 1), Targets((1, 0), empty, labels_B=empty, rank=1))


@pytest.mark.parametrize("num_labels", [1, 0, -1])
def test_nothing_to_choose_between(num_labels: int) -> None:
    with pytest.raises(ValueError, match=f"^Softmax num_labels is {num_labels}; it must be 2 or more"):
        Softmax(num_labels)
