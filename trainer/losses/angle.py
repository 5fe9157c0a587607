"""Ranking of pairs by their scores, on angles that do not saturate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.losses.cosent import CoSENT


class AnglE(CoSENT):
    """CoSENT with |cos(u, v) + sin(u, v)| in place of the cosine, on the global batch.

    Dimension i and i + D/2 of a vector of length 1 are the real and the imaginary part of a complex number; the sine
    is the sum of the imaginary parts of u_i conj(v_i). Its gradient does not vanish where the cosine's does, near 1
    and -1. Li and Li 2024, https://arxiv.org/abs/2309.12871; sentence-transformers' AnglELoss.

    Args:
        scale: s, the inverse temperature.
    """

    citation = """@inproceedings{li-li-2024-aoe,
    title = "{A}o{E}: Angle-optimized Embeddings for Semantic Textual Similarity",
    author = "Li, Xianming and Li, Jing",
    booktitle = "Proceedings of ACL 2024",
    year = "2024",
    url = "https://aclanthology.org/2024.acl-long.101/",
    doi = "10.18653/v1/2024.acl-long.101",
}"""

    def similarities(self, columns: Sequence[Tensor]) -> Tensor:
        # An odd dimension gets a partner of 0.
        u_BD, v_BD = (F.normalize(F.pad(column, (0, column.shape[1] % 2)), dim=-1) for column in columns)
        u_real, u_imaginary = u_BD.chunk(2, dim=-1)
        v_real, v_imaginary = v_BD.chunk(2, dim=-1)
        cosines_B = (u_BD * v_BD).sum(dim=-1)
        return torch.abs(cosines_B + (u_imaginary * v_real - u_real * v_imaginary).sum(dim=-1))
