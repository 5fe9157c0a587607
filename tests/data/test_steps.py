"""Steps of an epoch, in groups that travel together."""

from itertools import chain

import pytest

from trainer.data.steps import limit_steps, step_groups


@pytest.mark.parametrize(("step", "stop", "size"), [(0, 10, 4), (3, 10, 4), (4, 4, 3), (7, 9, 1)])
def test_groups_of_steps_hold_each_step_once_and_end_at_multiples(step: int, stop: int, size: int) -> None:
    groups = list(step_groups(step, stop, size))
    assert list(chain.from_iterable(groups)) == list(range(step, stop))
    assert all((group[-1] + 1) % size == 0 for group in groups[:-1])
    assert all(0 < len(group) <= size for group in groups)


@pytest.mark.parametrize(("limit", "steps"), [(1.0, 10), (0.25, 2), (0.1, 1), (4, 4), (4.0, 4), (40, 10)])
def test_a_limit_is_a_share_or_a_number_of_steps(limit: float, steps: int) -> None:
    assert limit_steps(10, limit) == steps


def test_a_share_of_less_than_one_step_is_refused() -> None:
    """Lightning takes int(steps x share) of them, which is none, and does not start."""
    assert limit_steps(10, 0.1) == 1
    with pytest.raises(ValueError, match=r"limit_train_batches is 0.09, and that share of the 10 steps of an epoch is"):
        limit_steps(10, 0.09)
