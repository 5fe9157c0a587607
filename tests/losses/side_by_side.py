"""A loss of ours and one of sentence-transformers on the same embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from trainer.batch import Targets
from trainer.losses import Loss

D = 24


class _Embedded(nn.Module):
    """In place of a SentenceTransformer: its input features already are the embeddings."""

    device = torch.device("cpu")

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features


def embedded() -> Any:
    """A stand-in for the model that a loss of sentence-transformers holds."""
    return _Embedded()


def draw(num_columns: int, num_rows: int, seed: int = 0, spread: float = 0.3) -> list[Tensor]:
    """Columns of (num_rows, D) embeddings; those of a row resemble each other, as in training."""
    generator = torch.Generator().manual_seed(seed)
    topic_BD = torch.randn(num_rows, D, generator=generator)
    return [topic_BD + spread * torch.randn(num_rows, D, generator=generator) for _ in range(num_columns)]


def targets_of(
    num_rows: int,
    labels: Sequence[int] | None = None,
    scores: Sequence[float] | Tensor | None = None,
    **known: Any,
) -> Targets:
    """The targets of one process that holds all rows."""
    return Targets(
        rows_per_rank=(num_rows,),
        row_ids_B=torch.arange(num_rows),
        labels_B=None if labels is None else torch.tensor(labels),
        scores_B=None if scores is None else torch.as_tensor(scores, dtype=torch.float32),
        **known,
    )


def value_and_gradients(
    function: Callable[[list[Tensor]], Tensor], columns: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    leaves = [column.clone().requires_grad_() for column in columns]
    value = function(leaves)
    value.backward()
    return value.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def assert_equals_peer(
    loss: Loss,
    peer: Callable[[list[dict[str, Tensor]], Any], Any],
    columns: Sequence[Tensor],
    targets: Targets,
    peer_labels: Tensor | None = None,
) -> float:
    """Value and gradient of both are equal to 1e-5 of their size; returns the value.

    The peer gets ``peer_labels``, or the scores or labels of the targets.
    """
    labels = next((x for x in (peer_labels, targets.scores_B, targets.labels_B) if x is not None), None)
    ours, our_gradients = value_and_gradients(lambda x: loss(x, targets), columns)
    theirs, their_gradients = value_and_gradients(
        lambda x: peer([{"sentence_embedding": column} for column in x], labels), columns
    )
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for our, their in zip(our_gradients, their_gradients, strict=True):
        assert_close(our, their, rtol=0.0, atol=max(1e-5 * float(their.abs().max()), 1e-9))
    return float(ours)


def assert_no_rows_give_zero(loss: Loss, columns: Sequence[Tensor], targets: Targets) -> None:
    """A rank without rows returns 0, and its backward still reaches every embedding and every head, or DDP would
    wait for ever."""
    leaves = [column.requires_grad_() for column in columns]
    value = loss([column[:0] for column in leaves], targets)
    assert value.item() == 0.0
    value.backward()
    for x in [*leaves, *loss.parameters()]:
        assert x.grad is not None
        assert not x.grad.any()
