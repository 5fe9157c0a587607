"""Several losses of the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Optional, cast

import torch
from torch import Tensor, nn

from trainer.batch import Targets
from trainer.losses.base import Loss
from trainer.messages import refuse_not_positive


class WeightedSum(Loss):
    """Sum of w_i times loss i, all of the same embeddings.

    What several of them log under one name is logged of each, as <name>/<loss>, and of two of one class as
    <name>/<loss>_1 and <name>/<loss>_2.

    Args:
        losses: what is summed; the data must suit each of them.
        weights: one for each loss; unset: 1.
    """

    def __init__(self, losses: list[Loss], weights: Optional[list[float]] = None) -> None:
        super().__init__()
        if not losses:
            raise ValueError("WeightedSum has no losses; name one or more")
        if weights is not None and len(weights) != len(losses):
            raise ValueError(f"WeightedSum has {len(losses)} losses and {len(weights)} weights; give one for each")
        for weight in weights or []:
            refuse_not_positive("WeightedSum: a weight", weight)
        self.losses = nn.ModuleList(losses)
        self.weights = weights or [1.0] * len(losses)
        self.needs = frozenset[str]().union(*(loss.needs for loss in losses))
        self.min_columns = max(loss.min_columns for loss in losses)
        limits = [loss.max_columns for loss in losses if loss.max_columns is not None]
        self.max_columns = min(limits, default=None)
        if self.max_columns is not None and self.min_columns > self.max_columns:
            most = next(type(loss).__name__ for loss in losses if loss.min_columns == self.min_columns)
            least = next(type(loss).__name__ for loss in losses if loss.max_columns == self.max_columns)
            raise ValueError(
                f"WeightedSum: {most} takes {self.min_columns} text columns at least, {least} {self.max_columns} at "
                "most, so no data suits both; leave one out, or train it on a source of its own (model.losses)"
            )
        self.num_labels = min((n for loss in losses if (n := loss.num_labels) is not None), default=None)
        ranges = [loss.score_range for loss in losses if loss.score_range is not None]
        self.score_range = (max(low for low, _ in ranges), min(high for _, high in ranges)) if ranges else None
        self.in_batch_negatives = any(loss.in_batch_negatives for loss in losses)
        self.positives_by_label = any(loss.positives_by_label for loss in losses)
        self.absent_texts = all(loss.absent_texts for loss in losses)

    @property
    def _summed(self) -> list[Loss]:
        return [cast(Loss, loss) for loss in self.losses]

    def parts(self) -> Iterator[Loss]:
        yield self
        for loss in self._summed:
            yield from loss.parts()

    def build(self, embedding_dimension: int) -> None:
        for loss in self._summed:
            loss.build(embedding_dimension)

    def truncated(self, targets: Targets, dimension: int) -> Targets:
        for loss in self._summed:
            targets = loss.truncated(targets, dimension)
        return targets

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        values = [weight * loss(columns, targets) for loss, weight in zip(self._summed, self.weights, strict=True)]
        self.last_metrics = self._metrics()
        return torch.stack(values).sum()

    def _metrics(self) -> dict[str, Tensor]:
        """What the losses found: names that several of them use get the loss's."""
        times = Counter(name for loss in self._summed for name in loss.last_metrics)
        of_class = Counter(type(loss).__name__ for loss in self._summed)
        before: Counter[str] = Counter()
        metrics: dict[str, Tensor] = {}
        for loss in self._summed:
            label = type(loss).__name__
            before[label] += 1
            apart = f"{label}_{before[label]}" if of_class[label] > 1 else label
            metrics |= {name if times[name] == 1 else f"{name}/{apart}": v for name, v in loss.last_metrics.items()}
        return metrics

    def describe(self) -> dict[str, Any]:
        described = [{type(loss).__name__: loss.describe()} for loss in self._summed]
        return {"losses": described, "weights": self.weights}
