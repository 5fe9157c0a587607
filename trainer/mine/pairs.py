"""Who is searched for what: the distinct anchors and documents of pairs and a corpus, by numbers.

Shape suffixes: N pairs, P places of a document's text (rows of the corpus, then pairs), Q distinct anchors, M distinct
documents, K distinct (anchor, positive).
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_BATCH_TEXTS = 10_000


@dataclass(frozen=True)
class Pairs:
    """Anchors, their positives, and all documents that may become negatives.

    Attributes:
        rows_Q: the first pair of each anchor.
        is_first_P: whether the text of this place stands at no place before: these are the documents, in this order.
        places_M: place of each document.
        starts_Q: where an anchor's positives begin in positives_K; they end where the next one's begin.
        positives_K: documents that are positives, those of one anchor side by side in the order of the data.
        pairs_K: the first pair that says so.
        own_Q: the document whose text is the anchor's, -1 where there is none.
        most_positives: pairs of the anchor that has most.
    """

    rows_Q: NDArray[np.int64]
    is_first_P: NDArray[np.bool_]
    places_M: NDArray[np.int64]
    starts_Q: NDArray[np.int64]
    positives_K: NDArray[np.int64]
    pairs_K: NDArray[np.int64]
    own_Q: NDArray[np.int64]
    most_positives: int

    @property
    def num_anchors(self) -> int:
        return len(self.rows_Q)

    @property
    def num_documents(self) -> int:
        return len(self.places_M)

    def positives_of(self, anchors: slice) -> slice:
        """Where the positives of consecutive anchors stand in positives_K."""
        ends = np.append(self.starts_Q, len(self.positives_K))
        return slice(int(ends[anchors.start]), int(ends[anchors.stop]))

    def query_of_positives(self, anchors: slice) -> NDArray[np.int64]:
        """For each of these positives which of the anchors it belongs to, from 0."""
        here = self.positives_of(anchors)
        return np.searchsorted(self.starts_Q[anchors], np.arange(here.start, here.stop), "right") - 1


def number_pairs(anchors: pa.ChunkedArray, positives: pa.ChunkedArray, corpus: pa.ChunkedArray | None) -> Pairs:
    """Number the texts of N pairs and of a corpus; equal texts are one.

    Texts are told apart by 64 bits of a hash, 8 bytes a text. Two of ten million share them with a chance of 1 in 10^5;
    then one of the two is no candidate.
    """
    anchors_N, positives_N = _keys(anchors), _keys(positives)
    documents_P = positives_N if corpus is None else np.concatenate([_keys(corpus), positives_N])
    rows_Q, query_N = _distinct(anchors_N)
    places_M, document_P = _distinct(documents_P)
    is_first_P = np.zeros(len(documents_P), dtype=bool)
    is_first_P[places_M] = True
    document_N = document_P[len(documents_P) - len(positives_N) :]
    _, first = np.unique(query_N * len(places_M) + document_N, return_index=True)
    first.sort()
    pairs_K = first[np.argsort(query_N[first], kind="stable")]
    return Pairs(
        rows_Q=rows_Q,
        is_first_P=is_first_P,
        places_M=places_M,
        starts_Q=np.searchsorted(query_N[pairs_K], np.arange(len(rows_Q))),
        positives_K=document_N[pairs_K],
        pairs_K=pairs_K,
        own_Q=_find(anchors_N[rows_Q], documents_P[places_M]),
        most_positives=int(np.bincount(query_N).max()),
    )


def _keys(texts: pa.ChunkedArray) -> NDArray[np.int64]:
    parts = [
        b"".join(blake2b(text.encode(), digest_size=8).digest() for text in batch.to_pylist())
        for chunk in texts.chunks
        for batch in (chunk.slice(i, _BATCH_TEXTS) for i in range(0, len(chunk), _BATCH_TEXTS))
    ]
    return np.frombuffer(b"".join(parts), dtype=np.int64)


def _distinct(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each distinct key stands first, ascending, and for each key which of them it is."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]


def _find(wanted: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each wanted key, -1 where there is none."""
    order = np.argsort(keys)
    places = order[np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)]
    return np.where(keys[places] == wanted, places, -1)
