"""What an encoder's part of a config may say, before anything is loaded."""

from __future__ import annotations

import pytest
from torch import nn

from trainer.encoder import EncoderSpec


@pytest.mark.parametrize("rate", [1.0, 1.5, -0.1, 10.0, float("nan")])
def test_a_dropout_that_is_no_rate_is_refused(rate: float) -> None:
    """At 1 nothing is left; above 1 and below 0 torch's own Dropout refuses."""
    with pytest.raises(ValueError, match=rf"^model\.encoder\.dropout is {rate:g}; it is a rate, 0 to below 1$"):
        EncoderSpec("x", dropout=rate)
    if not 0 <= rate <= 1 and rate == rate:
        with pytest.raises(ValueError, match="between 0 and 1"):
            nn.Dropout(rate)


@pytest.mark.parametrize("rate", [None, 0, 0.0, 0.1, 0.99])
def test_a_rate_is_taken(rate: float | None) -> None:
    assert EncoderSpec("x", dropout=rate).dropout == rate
