from __future__ import annotations

import math

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import (
    GlobalOrthogonalRegularizationLoss,
    MultipleNegativesRankingLoss,
)

from tests.losses.side_by_side import D, assert_equals_peer, draw, embedded, targets_of
from trainer.losses import (
    CosineSimilarity,
    GISTEmbed,
    GlobalOrthogonalRegularization,
    InfoNCE,
    Softmax,
    Triplet,
    WeightedSum,
)


def test_is_the_sum_of_its_losses() -> None:
    contrast = MultipleNegativesRankingLoss(embedded())
    spread = GlobalOrthogonalRegularizationLoss(embedded())
    loss = WeightedSum([InfoNCE(), GlobalOrthogonalRegularization()], [0.5, 3.0])
    assert_equals_peer(
        loss,
        lambda features, labels: 0.5 * contrast(features, labels) + 3.0 * sum(spread(features, labels).values()),
        draw(3, 12, spread=1.0),
        targets_of(12),
    )


def test_it_wants_what_its_losses_want() -> None:
    loss = WeightedSum([InfoNCE(), Softmax(num_labels=4), CosineSimilarity()])
    assert loss.needs == {"labels", "scores"}
    assert (loss.min_columns, loss.max_columns, loss.num_labels) == (2, 2, 4)
    assert loss.score_range == (-1.0, 1.0)
    assert loss.in_batch_negatives
    assert not loss.absent_texts
    loss.build(D)
    assert len(list(loss.parameters())) == 2
    assert [type(part).__name__ for part in loss.parts()] == [
        "WeightedSum",
        "InfoNCE",
        "Softmax",
        "CosineSimilarity",
    ]
    triplets = WeightedSum([InfoNCE(), Triplet()])
    assert (triplets.min_columns, triplets.max_columns) == (3, 3)


def test_what_two_losses_find_under_one_name_is_kept_of_each() -> None:
    """Rows 0 and 1 have one positive, which no loss takes for a negative; a guide that knows nothing names others."""
    columns = draw(2, 4)
    texts_BC = torch.tensor([[0, 9], [1, 9], [2, 10], [3, 11]])
    guide_B2D = torch.stack(draw(2, 4, seed=1, spread=100.0), dim=1)
    targets = targets_of(4, texts_BC=texts_BC, extras={"teacher": guide_B2D})
    false_negatives = 2 / 12  # of 4 rows with 3 others each
    masked, guided = InfoNCE(), GISTEmbed(contrast_anchors=False, contrast_positives=False)
    loss = WeightedSum([masked, guided, InfoNCE(mask_false_negatives=False)])
    loss(columns, targets)
    found = {name: float(value) for name, value in loss.last_metrics.items()}
    by_guide = float(guided.last_metrics["false_negative_rate"])
    assert by_guide != pytest.approx(false_negatives)
    assert found == {
        "false_negative_rate/InfoNCE_1": pytest.approx(false_negatives),
        "false_negative_rate/GISTEmbed": by_guide,
    }
    alone = WeightedSum([masked, GlobalOrthogonalRegularization()])
    alone(columns, targets)
    assert list(alone.last_metrics) == ["false_negative_rate"]


def test_losses_that_no_data_suits() -> None:
    message = "^WeightedSum: Triplet takes 3 text columns at least, CosineSimilarity 2 at most, so no data suits both;"
    with pytest.raises(ValueError, match=message):
        WeightedSum([InfoNCE(), CosineSimilarity(), Triplet()])


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="WeightedSum has 1 losses and 2 weights"):
        WeightedSum([InfoNCE()], [1.0, 2.0])


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_none(weight: float) -> None:
    with pytest.raises(ValueError, match=f"^WeightedSum: a weight is {weight:g}; it must be above 0, and finite$"):
        WeightedSum([InfoNCE(), GlobalOrthogonalRegularization()], [1.0, weight])
