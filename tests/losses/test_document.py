"""docs/losses.md: its loss runs and is exact, its losses and configs are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.testing import assert_close

import trainer.losses
from tests.losses.side_by_side import draw, targets_of
from tests.two_ranks import TwoRanks
from trainer.batch import Targets
from trainer.distributed import gather
from trainer.losses import Loss

DOCUMENT = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")


def _example() -> tuple[str, type[Loss]]:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "docs/losses.md", "exec"), names)
    return code, names["AlignUniform"]


def value_and_gradients(split: tuple[int, ...]) -> tuple[float, list[Tensor]]:
    """Of this rank's rows; the mean of the values over ranks is the loss."""
    first = sum(split[: gather.rank()])
    rows = slice(first, first + split[gather.rank()])
    columns = [column[rows].requires_grad_() for column in draw(2, sum(split))]
    value = _example()[1](t=1.5)(columns, Targets(split, torch.arange(len(columns[0])), rank=gather.rank()))
    value.backward()
    return float(value), [x.grad for x in columns if x.grad is not None]


def test_the_example_is_short_and_right() -> None:
    """Against the paper's formula in NumPy."""
    code, loss = _example()
    assert len(code.splitlines()) < 60
    columns = draw(2, 7)
    a, p = (x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in columns)
    distances = np.square(a[:, None] - a[None]).sum(-1)[~np.eye(7, dtype=bool)]
    wanted = np.square(a - p).sum(1).mean() + 0.5 * np.log(np.exp(-1.5 * distances).mean())
    assert float(loss(t=1.5, uniform_weight=0.5)(columns, targets_of(7))) == pytest.approx(wanted, rel=1e-5)


def test_a_batch_of_one_row_is_its_alignment() -> None:
    a, p = (x.double().numpy()[0] / np.linalg.norm(x.double().numpy()) for x in draw(2, 1))
    assert float(_example()[1]()(draw(2, 1), targets_of(1))) == pytest.approx(np.square(a - p).sum(), rel=1e-5)


@pytest.mark.parametrize("split", [(4, 3), (1, 0)])
def test_the_example_is_exact_on_two_ranks(two_ranks: TwoRanks, split: tuple[int, int]) -> None:
    value, whole = value_and_gradients((sum(split),))
    (one, first), (other, second) = two_ranks(value_and_gradients, split)
    assert (one + other) / 2 == pytest.approx(value, rel=1e-5)
    for expected, *found in zip(whole, first, second, strict=True):
        assert_close(torch.cat(found) / 2, expected, rtol=1e-5, atol=1e-7)


def test_every_loss_is_named() -> None:
    named = set(re.findall(r"`(\w+)`", DOCUMENT))
    assert set(trainer.losses.__all__) - {"Loss", "BatchHardTriplet"} <= named


def test_configs_of_the_document_build() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=Loss)
    blocks = [yaml.safe_load(block)["model"]["loss"] for block in re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)]
    inline = re.findall(r"`loss: (.*?)`", DOCUMENT)
    assert len(blocks) == 1
    assert len(inline) > 8
    for config in [*blocks, *map(yaml.safe_load, inline)]:
        built = parser.instantiate_classes(parser.parse_object({"loss": config})).loss
        assert isinstance(built, Loss)
