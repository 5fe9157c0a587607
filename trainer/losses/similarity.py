"""Similarities between embeddings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Similarity = Literal["cosine", "dot"]


def pairwise_cosine(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Cosine of row i of a and row i of b, (B,)."""
    return F.cosine_similarity(a_BD, b_BD, dim=-1)


def similarity_matrix(a_BD: Tensor, b_ND: Tensor, similarity: Similarity) -> Tensor:
    """Similarity of every row of a with every row of b, (B, N), in the precision of the embeddings."""
    if similarity == "cosine":
        a_BD, b_ND = F.normalize(a_BD, dim=-1), F.normalize(b_ND, dim=-1)
    # Autocast would round cosines to 3 digits: other hardest texts, and logits off by 0.04 at scale 20.
    with torch.autocast(a_BD.device.type, enabled=False):
        return a_BD @ b_ND.T
