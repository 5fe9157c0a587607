"""Exact nearest neighbours of queries in a corpus, chunk by chunk: no matrix of all scores is ever held.

Shape suffixes: Q queries, N documents, C documents of a chunk, D embedding, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

Similarity = Literal["cosine", "dot"]

_MAX_ID = 2**32 - 1


class Neighbours(NamedTuple):
    """The nearest documents of each query, nearest first; of equal scores the lower id first.

    Attributes:
        scores_Qk: float32, descending.
        ids_Qk: int64 numbers of the documents. k is the number of documents where there are fewer than asked for.
    """

    scores_Qk: Tensor
    ids_Qk: Tensor


@torch.no_grad()
def top_k(
    queries_QD: Tensor,
    corpus: Tensor | Iterable[Tensor],
    k: int,
    *,
    similarity: Similarity = "cosine",
    query_chunk: int = 512,
    corpus_chunk: int = 16_384,
) -> Neighbours:
    """The k documents that are most similar to each query, by exact float32 products.

    One chunk of scores takes about ``20 * query_chunk * corpus_chunk`` bytes (160 MB by default), on the device of the
    queries; the answer takes ``8 * Q * k``.

    Args:
        queries_QD: finite, any float type, on the device that shall do the work.
        corpus: (N, D), or pieces of it one behind the other, (C, D) each, as an iterator over a memory-mapped file
            gives them; on any device.
        k: neighbours of a query, 1 or more.
        similarity: cosine divides both sides by their length.
        query_chunk, corpus_chunk: queries and documents of one product.

    Returns:
        On the device of the queries.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be 1 or more")
    queries_QD = queries_QD.float()
    if similarity == "cosine":
        queries_QD = normalize(queries_QD, dim=-1)
    first_id = 0
    best_Qk = torch.empty((len(queries_QD), 0), dtype=torch.int64, device=queries_QD.device)
    with _exact_products(queries_QD.device):
        for chunk_CD in _chunks(corpus, corpus_chunk):
            documents_CD = chunk_CD.to(queries_QD.device).float()
            if similarity == "cosine":
                documents_CD = normalize(documents_CD, dim=-1)
            assert first_id + len(documents_CD) - 1 <= _MAX_ID, "ids are packed into 32 bits"
            ids_C = torch.arange(first_id, first_id + len(documents_CD), device=queries_QD.device)
            first_id += len(documents_CD)
            parts = [
                _largest(torch.cat([best, _pack(rows @ documents_CD.T, ids_C)], dim=1), k)
                for rows, best in zip(queries_QD.split(query_chunk), best_Qk.split(query_chunk), strict=True)
            ]
            best_Qk = torch.cat(parts)
    return _unpack(best_Qk)


def merge_top_k(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """The k nearest of several shards' neighbours of the same queries; ids are numbers in the whole corpus."""
    keys = [_pack(part.scores_Qk, part.ids_Qk) for part in parts]
    return _unpack(_largest(torch.cat(keys, dim=1), k))


def _chunks(corpus: Tensor | Iterable[Tensor], size: int) -> Iterator[Tensor]:
    for piece in [corpus] if isinstance(corpus, Tensor) else corpus:
        if len(piece):
            yield from piece.split(size)


def _largest(keys_QC: Tensor, k: int) -> Tensor:
    return keys_QC.topk(min(k, keys_QC.shape[1]), dim=1, sorted=True).values


def _pack(scores: Tensor, ids: Tensor) -> Tensor:
    """One integer that sorts by score, then by the lower id: torch.topk promises nothing about equal values."""
    # The bits of a float sort like an integer of sign and magnitude; + 0.0 makes -0.0 and 0.0 the same zero.
    bits = (scores + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) + (_MAX_ID - ids)


def _unpack(keys: Tensor) -> Neighbours:
    ordered = keys >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return Neighbours(bits.int().view(torch.float32), _MAX_ID - (keys & _MAX_ID))


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """float32 all the way: neither autocast nor TF32 may round what decides an order."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
