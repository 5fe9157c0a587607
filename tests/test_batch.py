from __future__ import annotations

import pickle
from dataclasses import fields
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.batch import PackedBatch, Targets
from trainer.data.collate import pack


def _batch() -> PackedBatch:
    targets = Targets(
        (3, 2), torch.tensor([8, 9]), labels_B=torch.tensor([1, 0]), scores_B=torch.tensor([0.5, 0.25]), rank=1
    )
    return pack([[np.array([1, 2]), np.array([3])]], targets, num_rows=2, source=1)


@pytest.mark.parametrize("split", [(5,), (3, 2), (1, 0), (1, 1, 1, 0)])
def test_weighted_sums_average_to_the_mean_over_the_global_batch(split: tuple[int, ...]) -> None:
    """mean over ranks of weight * (sum of own terms) = mean over the b global rows."""
    terms_b = torch.arange(1.0, sum(split) + 1)
    values = []
    for rank, own in enumerate(terms_b.split(list(split))):
        targets = Targets(split, torch.arange(len(own)), rank=rank)
        assert terms_b[targets.first_row : targets.first_row + split[rank]].equal(own)
        assert targets.num_global_rows == sum(split)
        values.append(targets.weight * own.sum())
    assert torch.stack(values).mean() == terms_b.mean()


def test_to_moves_every_tensor() -> None:
    moved = _batch().to("meta")
    for holder in (moved, moved.targets):
        tensors = {f.name: getattr(holder, f.name) for f in fields(holder)}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
        assert len(tensors) == 3
        assert {name for name, value in tensors.items() if value.device.type != "meta"} == set()
    assert moved.lengths == _batch().lengths
    assert moved.targets.rank == 1


def test_a_batch_travels_to_another_process_as_it_is() -> None:
    """As bytes: no shared memory, which a process could still hold or have lost."""
    batch = _batch()
    again = pickle.loads(ForkingPickler.dumps(batch))
    for ours, theirs in ((batch, again), (batch.targets, again.targets)):
        for f in fields(ours):
            sent, found = getattr(ours, f.name), getattr(theirs, f.name)
            if isinstance(sent, Tensor):
                assert sent.dtype == found.dtype
                assert torch.equal(sent, found)
                assert not found.is_shared()
            elif f.name != "targets":
                assert sent == found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_pin_memory_pins_every_tensor() -> None:
    pinned = _batch().pin_memory()
    for holder in (pinned, pinned.targets):
        assert all(x.is_pinned() for f in fields(holder) if isinstance(x := getattr(holder, f.name), Tensor))
