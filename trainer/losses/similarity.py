"""Similarities and distances between embeddings, in the precision of the embeddings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Similarity = Literal["cosine", "dot"]
Distance = Literal["cosine", "euclidean", "manhattan"]


def pairwise_cosine(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Cosine of row i of a and row i of b, (B,)."""
    return F.cosine_similarity(a_BD, b_BD, dim=-1)


def pairwise_similarity(a_BD: Tensor, b_BD: Tensor, similarity: Similarity) -> Tensor:
    """Similarity of row i of a and row i of b, (B,)."""
    return pairwise_cosine(a_BD, b_BD) if similarity == "cosine" else (a_BD * b_BD).sum(dim=-1)


def similarity_matrix(a_BD: Tensor, b_ND: Tensor, similarity: Similarity) -> Tensor:
    """Similarity of every row of a with every row of b, (B, N)."""
    if similarity == "cosine":
        a_BD, b_ND = F.normalize(a_BD, dim=-1), F.normalize(b_ND, dim=-1)
    # Autocast would round cosines to 3 digits: other hardest texts, and logits off by 0.04 at scale 20.
    with torch.autocast(a_BD.device.type, enabled=False):
        return a_BD @ b_ND.T


def pairwise_distance(a_BD: Tensor, b_BD: Tensor, distance: Distance) -> Tensor:
    """Distance of row i of a and row i of b, (B,): 1 - cosine, euclidean or manhattan.

    The gradient at a euclidean distance of 0 is 0.
    """
    if distance == "cosine":
        return 1.0 - pairwise_cosine(a_BD, b_BD)
    return torch.linalg.vector_norm(a_BD - b_BD, ord=2 if distance == "euclidean" else 1, dim=-1)


def distance_matrix(a_BD: Tensor, b_ND: Tensor, distance: Literal["cosine", "euclidean"]) -> Tensor:
    """Distance of every row of a to every row of b, (B, N); the gradient at a euclidean distance of 0 is 0.

    Euclidean distances are taken from differences. The expansion |a|^2 - 2ab + |b|^2 would leave the root of a
    rounding error between equal texts, with a gradient of noise, and a bfloat16 product under autocast.
    """
    if distance == "cosine":
        return 1.0 - similarity_matrix(a_BD, b_ND, "cosine")
    return torch.cdist(a_BD, b_ND, compute_mode="donot_use_mm_for_euclid_dist")


def distance_limit(distance: Distance, normalized: bool) -> float | None:
    """The largest distance there is: 2 between directions, and between vectors of length 1; None: there is none."""
    return 2.0 if distance == "cosine" or (distance == "euclidean" and normalized) else None
