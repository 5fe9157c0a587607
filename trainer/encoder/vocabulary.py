"""Exact compaction of the embedding matrix: train only the rows that the training texts use.

A row that no training text uses has gradient 0 at every step. AdamW, and SGD without momentum, then change it by
weight decay alone: w_t = w_{t-1} (1 - lr_t * decay), and moments stay 0. So a small dense matrix of the used rows is
trained (parameter, gradient, optimizer state, all-reduce), the others are looked up in a frozen copy times the running
product of (1 - lr_t * decay), and the full matrix is written at export.

Shape suffixes: V pieces of the full vocabulary, U used pieces, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.manifest import tensor_digest


class CompactEmbedding(nn.Module):
    """Stands in for an ``nn.Embedding`` of (V, H) and trains (U, H) of it.

    Args:
        full: the matrix, (V, H); not copied, not trained.
        used_ids: rows to train, ascending, int64 (U,).
        padding_id: the piece whose row gets no gradient even where a text holds it, as in ``nn.Embedding``. Decoders
            may pad with the piece that ends every text.
        scale: by what every row is multiplied when it is looked up, as Gemma's are.
    """

    used_ids: Tensor
    decay: Tensor
    frozen_VH: Tensor
    place_V: Tensor
    scale: Tensor | None

    def __init__(
        self, full: Tensor, used_ids: Tensor, padding_id: int | None = None, scale: float | Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(full.detach()[used_ids].clone())
        self.register_buffer("used_ids", used_ids)
        # float64: a product of thousands of factors next to 1
        self.register_buffer("decay", torch.ones((), dtype=torch.float64))
        self.register_buffer("frozen_VH", full.detach(), persistent=False)
        place_V = torch.full((full.shape[0],), -1, dtype=torch.int64)
        place_V[used_ids] = torch.arange(len(used_ids))
        self.register_buffer("place_V", place_V, persistent=False)
        self.padding_id = padding_id
        self.register_buffer("scale", None if scale is None else torch.as_tensor(scale), persistent=False)
        place = -1 if padding_id is None else int(place_V[padding_id])
        self._padding_place = place if place >= 0 else None

    def forward(self, input_ids: Tensor) -> Tensor:
        found = self._look_up(input_ids)
        return found if self.scale is None else found * self.scale.to(found.dtype)

    def _look_up(self, input_ids: Tensor) -> Tensor:
        places = self.place_V[input_ids]
        if self.training:
            # Every training text was counted, so each id has a place; -1 would raise here.
            return F.embedding(places, self.weight, self._padding_place)
        trained = F.embedding(places.clamp(min=0), self.weight)
        frozen = F.embedding(input_ids, self.frozen_VH) * self.decay.to(self.frozen_VH.dtype)
        return torch.where((places < 0)[..., None], frozen, trained)

    @torch.no_grad()
    def decay_unused(self, factor: float) -> None:
        """Replay one step's weight decay, w * (1 - lr * decay), on all unused rows."""
        self.decay.mul_(factor)

    @torch.no_grad()
    def full_weight(self) -> Tensor:
        """The (V, H) matrix that full training would have given."""
        full = self.frozen_VH * self.decay.to(self.frozen_VH.dtype)
        full[self.used_ids] = self.weight.to(full.dtype)
        return full

    def base_checksum(self) -> str:
        """sha256 of the frozen matrix, so that a checkpoint is not continued on another base."""
        return tensor_digest([("", self.frozen_VH)])
