"""Packed batches of given texts, and how far two gradients lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.batch import PackedBatch, Targets
from trainer.data.collate import pack
from trainer.data.order import split_rows


def build_batch(
    columns: Sequence[Sequence[Sequence[int]]],
    labels: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
    world_size: int = 1,
    rank: int = 0,
    known: Mapping[str, Tensor] | None = None,
    extras: Mapping[str, Tensor] | None = None,
) -> PackedBatch:
    """One rank's share of a global batch, as the loader would build it.

    Columns hold the token ids of each row; ``known`` and ``extras`` what else the targets have of all rows.
    """
    rows_per_rank = split_rows(len(columns[0]), world_size)
    first = sum(rows_per_rank[:rank])
    rows = range(first, first + rows_per_rank[rank])
    embedded = rows if len(rows) else range(1)
    targets = Targets(
        rows_per_rank=rows_per_rank,
        row_ids_B=torch.tensor(rows, dtype=torch.int64),
        labels_B=None if labels is None else torch.tensor([labels[row] for row in rows], dtype=torch.int64),
        scores_B=None if scores is None else torch.tensor([scores[row] for row in rows], dtype=torch.float32),
        rank=rank,
        **{name: values[rows.start : rows.stop] for name, values in (known or {}).items()},
        extras={name: values[rows.start : rows.stop] for name, values in (extras or {}).items()},
    )
    return pack([[np.array(column[row]) for row in embedded] for column in columns], targets, num_rows=len(rows))


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest difference of any element of any tensor, relative to the largest element of all."""
    assert ours.keys() == theirs.keys()
    most = max(float(x.abs().max()) for x in theirs.values())
    difference = max(float((ours[name] - x).abs().max()) for name, x in theirs.items())
    return difference / most if most else difference


def relative_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Euclidean norm of the difference of all elements over the norm of theirs."""
    assert ours.keys() == theirs.keys()
    return norm_of({name: ours[name] - x for name, x in theirs.items()}) / norm_of(theirs)


def norm_of(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.stack([x.double().square().sum() for x in tensors.values()]).sum().sqrt())


def gradients_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients of the parameters that have one."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
