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
        (3, 2),
        torch.tensor([8, 9]),
        labels_B=torch.tensor([1, 0]),
        scores_B=torch.tensor([0.5, 0.25]),
        rank=1,
        texts_BC=torch.tensor([[4], [5]]),
        groups_B=torch.tensor([0, 0]),
        present_BC=torch.tensor([[True], [False]]),
        extras={"teacher": torch.ones(2, 1, 3)},
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


def tensors_of(holder: PackedBatch | Targets) -> dict[str, Tensor]:
    values = {f.name: getattr(holder, f.name) for f in fields(holder)}
    extras = values.pop("extras", {})
    return {name: value for name, value in (values | extras).items() if isinstance(value, Tensor)}


def test_to_moves_every_tensor() -> None:
    moved = _batch().to("meta")
    for holder, number in ((moved, 3), (moved.targets, 7)):
        tensors = tensors_of(holder)
        assert len(tensors) == number
        assert {name for name, value in tensors.items() if value.device.type != "meta"} == set()
    assert moved.lengths == _batch().lengths
    assert moved.targets.rank == 1


def test_a_batch_travels_to_another_process_as_it_is() -> None:
    """As bytes: no shared memory, which a process could still hold or have lost."""
    batch = _batch()
    again = pickle.loads(ForkingPickler.dumps(batch))
    for ours, theirs in ((batch, again), (batch.targets, again.targets)):
        sent, found = tensors_of(ours), tensors_of(theirs)
        assert sent.keys() == found.keys()
        for name, tensor in sent.items():
            assert tensor.dtype == found[name].dtype
            assert torch.equal(tensor, found[name])
            assert not found[name].is_shared()
        plain = {f.name for f in fields(ours)} - sent.keys() - {"targets", "extras"}
        assert all(getattr(ours, name) == getattr(theirs, name) for name in plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_pin_memory_pins_every_tensor() -> None:
    pinned = _batch().pin_memory()
    for holder in (pinned, pinned.targets):
        assert all(tensor.is_pinned() for tensor in tensors_of(holder).values())
