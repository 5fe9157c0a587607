"""Numbers with which a loss would teach nothing, or the opposite."""

from __future__ import annotations

import math

import pytest
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from tests.losses.side_by_side import embedded
from trainer import losses


@pytest.mark.parametrize("scale", [0.0, -20.0, math.nan])
@pytest.mark.parametrize("name", ["InfoNCE", "CoSENT", "AnglE", "GISTEmbed", "SigLIP", "DistillKLDiv"])
def test_scales_are_refused_as_sentence_transformers_does(name: str, scale: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        MultipleNegativesRankingLoss(embedded(), scale=scale)
    with pytest.raises(ValueError, match=f"^{name} scale is {scale:g}; it must be above 0, and finite$"):
        getattr(losses, name)(scale=scale)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GISTEmbed", {"margin": None}),
        ("SigLIP", {"bias": None}),
        ("InfoNCE", {"hardness_strength": None, "hardness": "in_batch_negatives"}),
        ("GlobalOrthogonalRegularization", {"mean_weight": None}),
        ("GlobalOrthogonalRegularization", {"second_moment_weight": None}),
    ],
)
def test_numbers_without_a_finite_value(name: str, options: dict[str, str | None], value: float) -> None:
    key = next(iter(options))
    with pytest.raises(ValueError, match=f"^{name} {key} is {value:g}; it must be .*finite"):
        getattr(losses, name)(**options | {key: value})


def test_the_scale_of_a_teacher() -> None:
    with pytest.raises(ValueError, match="DistillKLDiv teacher_scale is inf; it must be above 0, and finite"):
        losses.DistillKLDiv(teacher_scale=math.inf)
