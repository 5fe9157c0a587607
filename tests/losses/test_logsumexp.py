"""Whole and in tiles: two implementations, one value, one gradient.

Shape suffixes: B queries, N candidates, D embedding.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.losses.side_by_side import targets_of, value_and_gradients
from trainer.losses import InfoNCE, SigLIP
from trainer.losses.base import Loss
from trainer.losses.logsumexp import TILE


def _columns(num_rows: int, num_columns: int, dimension: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    topics = torch.randn(num_rows, dimension, generator=generator)
    return [topics + torch.randn(num_rows, dimension, generator=generator) for _ in range(num_columns)]


@pytest.mark.parametrize("kind", ["plain", "masked and symmetric"])
def test_tiles_give_value_and_gradient_of_the_whole(kind: str) -> None:
    """At a size of several tiles, the last of them ragged; every gradient to 1e-5 of its norm."""
    num_rows = 2 * TILE + 3 if kind == "plain" else TILE + 5
    columns = _columns(num_rows, 2, 16)
    texts = torch.arange(2 * num_rows).view(num_rows, 2)
    texts[1::3, 1] = texts[::3, 1][: len(texts[1::3])]  # of three rows the second has the first one's positive
    known = {"texts_BC": texts} if kind == "masked and symmetric" else {}
    directions = ("query_to_doc", "doc_to_query") if kind == "masked and symmetric" else ("query_to_doc",)
    _assert_same(InfoNCE(directions=directions), columns, **known)


def test_siglip_in_blocks_gives_value_and_gradient_of_the_whole() -> None:
    loss = SigLIP()
    loss.build(16)
    _assert_same(loss, _columns(300, 3, 16), max_whole=16 * 600)


def _assert_same(loss: Loss, columns: list[Tensor], max_whole: int = 1, **known: Tensor) -> None:
    targets, found = targets_of(len(columns[0]), **known), []
    for size in (2**40, max_whole):
        loss.max_whole = size  # type: ignore[assignment]
        loss.zero_grad()
        value, gradients = value_and_gradients(lambda x: loss(x, targets), columns)
        found.append((value, [*gradients, *(p.grad.clone() for p in loss.parameters() if p.grad is not None)]))
    (whole, whole_gradients), (tiled, tiled_gradients) = found
    assert float(tiled) == pytest.approx(float(whole), rel=1e-5)
    for ours, theirs in zip(tiled_gradients, whole_gradients, strict=True):
        assert theirs.norm() > 0.0
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_memory_of_tiles_does_not_hold_all_logits() -> None:
    """What autograd keeps for the backward pass: embeddings and one number per query, no matrix."""
    columns = [F.normalize(column, dim=-1).requires_grad_() for column in _columns(2000, 2, 16)]
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    loss = InfoNCE()
    for size, most in ((2**24, 2000 * 2000), (1, 2000 * 16)):
        kept.clear()
        loss.max_whole = size
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss(columns, targets_of(2000))
        assert max(kept) == most
