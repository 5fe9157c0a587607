from __future__ import annotations

import numpy as np
import pytest

from tests.losses.side_by_side import D, draw, targets_of, value_and_gradients
from tests.losses.test_infonce import GROUPS, PRESENT, TEXTS, _left_out, _logits
from trainer.losses import SigLIP


@pytest.mark.parametrize("known", ["nothing", "all"])
def test_is_the_sigmoid_loss_of_all_pairs(known: str) -> None:
    """By the paper's formula in NumPy; scale and bias get their gradients by central differences."""
    columns = draw(3, 6, spread=1.0)
    extra = {} if known == "nothing" else {"texts_BC": TEXTS, "groups_B": GROUPS, "present_BC": PRESENT}
    left_out = _left_out(TEXTS, GROUPS, PRESENT) if extra else np.zeros((6, 12), dtype=bool)
    cosines = _logits(columns, 1.0)
    z = np.where(np.eye(6, 12, dtype=bool), 1.0, -1.0)

    def wanted(log_scale: float, bias: float) -> float:
        costs = np.logaddexp(0.0, -z * (np.exp(log_scale) * cosines + bias))
        return float(np.where(left_out, 0.0, costs).sum() / 6)

    loss = SigLIP(scale=8.0, bias=-5.0)
    loss.build(D)
    value, _ = value_and_gradients(lambda x: loss(x, targets_of(6, **extra)), columns)
    assert float(value) == pytest.approx(wanted(np.log(8.0), -5.0), rel=1e-5)
    by_scale = (wanted(np.log(8.0) + 1e-5, -5.0) - wanted(np.log(8.0) - 1e-5, -5.0)) / 2e-5
    by_bias = (wanted(np.log(8.0), -5.0 + 1e-5) - wanted(np.log(8.0), -5.0 - 1e-5)) / 2e-5
    assert loss.log_scale.grad is not None
    assert loss.logit_bias.grad is not None
    assert float(loss.log_scale.grad) == pytest.approx(by_scale, rel=1e-4)
    assert float(loss.logit_bias.grad) == pytest.approx(by_bias, rel=1e-4)


def test_scale_is_positive() -> None:
    with pytest.raises(ValueError, match="SigLIP scale is 0; it must be above 0"):
        SigLIP(scale=0.0)
