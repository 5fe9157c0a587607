"""When two gradients count as equal; tests/test_mixed_sources.py and test_strategies.py run the whole check."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer.distributed.exact import TOLERANCE, gradient_joints, metric_joints, rows_joint

ZERO, NAN = [0.0, 0.0], [math.nan, 0.0]


@pytest.mark.parametrize(
    ("ours", "theirs", "passed"),
    [
        (ZERO, ZERO, True),
        (ZERO, [0.0, 1e-30], False),
        ([0.0, 1e-30], ZERO, False),
        ([3.0, 4.0], [3.0, 4.0], True),
        ([3.0, 4.0], [4.0, 3.0], False),
        (NAN, NAN, False),
        (ZERO, NAN, False),
    ],
)
def test_two_gradients_of_zero_are_equal(ours: list[float], theirs: list[float], passed: bool) -> None:
    """A step whose loss has nothing to teach has them; one of zero beside another is a difference like any."""
    joints = gradient_joints("step 1", {"w": torch.tensor(ours)}, {"w": torch.tensor(theirs)}, TOLERANCE)
    assert [joint.name for joint in joints] == ["step 1 gradient", "step 1 gradient norm"]
    assert all(joint.passed for joint in joints) == passed


def test_differences_are_relative_to_the_whole_gradient() -> None:
    draw = np.random.default_rng(0)
    ours = {name: draw.normal(size=size) for name, size in {"a": (3, 4), "b": (5,)}.items()}
    theirs = {name: value + 1e-3 * draw.normal(size=value.shape) for name, value in ours.items()}
    theirs["b"][2] += 1.0
    both = [{name: torch.tensor(value) for name, value in one.items()} for one in (ours, theirs)]
    whole, other = (np.concatenate([value.ravel() for value in one.values()]) for one in (ours, theirs))
    gap, norm = gradient_joints("step 1", *both, TOLERANCE)
    assert gap.difference == pytest.approx(np.linalg.norm(other - whole) / np.linalg.norm(whole))
    assert gap.note == "largest at b"
    assert norm.difference == pytest.approx(abs(np.linalg.norm(other) / np.linalg.norm(whole) - 1.0))


@pytest.mark.parametrize(
    ("theirs", "difference", "note"),
    [
        ([3, 1, 2, 2], 0.0, "4 rows"),
        ([1, 2, 3, 3], 1.0, "4 rows"),
        ([1, 2, 2], 1.0, "3 and 4 rows"),  # a row that no rank took
        ([1, 2, 2, 3, 3], 1.0, "5 and 4 rows"),  # one that two took
    ],
)
def test_a_row_too_few_or_too_many_is_a_difference(theirs: list[int], difference: float, note: str) -> None:
    joint = rows_joint("step 1", [1, 2, 2, 3], theirs, "4 rows")
    assert (joint.difference, joint.note, joint.passed) == (difference, note, difference == 0)


def test_a_gradient_or_a_metric_of_one_side_alone_is_a_failure() -> None:
    one = {"w": torch.tensor([3.0, 4.0])}
    (joint,) = gradient_joints("step 1", one, {**one, "head": torch.zeros(1)}, TOLERANCE)
    assert (joint.name, joint.note, joint.passed) == ("step 1 gradients", "of one side alone: head", False)
    metrics = {"eval/dev/a": 0.5, "eval/dev/b": 0.25}
    assert [joint.passed for joint in metric_joints(metrics, metrics)] == [True]
    less = metric_joints(metrics, {"eval/dev/a": 0.5})
    assert [(joint.name, joint.passed) for joint in less] == [("metric eval/dev/a", True), ("metrics", False)]
    assert [joint.passed for joint in metric_joints({}, metrics)] == [False]
