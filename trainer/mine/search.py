"""The nearest documents of all anchors, chunk by chunk over the ranks; what is chosen of a chunk is a file.

Shape suffixes: Q anchors of a chunk, C candidates, K positives of these anchors, n negatives of an anchor.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer import interruption
from trainer.data.progress import shown_progress
from trainer.distributed import gather
from trainer.distributed.shared_work import SharedWork
from trainer.evaluation.topk import top_k
from trainer.files import whole_file
from trainer.mine.pairs import Pairs
from trainer.mine.select import Rules, Selected, select
from trainer.predict.shards import Shards

CHUNK_ANCHORS = 4096
_SHOWN_ANCHORS = 20_000


@dataclass(frozen=True)
class Vectors:
    """Embeddings of the pairs and of a corpus, row by row.

    Attributes:
        anchors, positives: of the pairs.
        corpus: of the other documents, if there are any.
    """

    anchors: Shards
    positives: Shards
    corpus: Shards | None = None

    def documents(self, pairs: Pairs) -> Iterator[Tensor]:
        """Embeddings of the distinct documents, piece by piece: memory holds one piece."""
        place = 0
        for shards in (self.corpus, self.positives):
            for piece in shards.pieces() if shards is not None else ():
                wanted = pairs.is_first_P[place : place + len(piece)]
                place += len(piece)
                yield torch.from_numpy(piece[wanted])


@dataclass(frozen=True)
class Chunk:
    """What was found for consecutive anchors.

    Attributes:
        anchors: which.
        positive_scores_K: similarity of each anchor to each of its positives.
        negatives: of each anchor.
    """

    anchors: slice
    positive_scores_K: NDArray[np.float32]
    negatives: Selected


def search(pairs: Pairs, vectors: Vectors, rules: Rules, folder: Path, device: torch.device) -> None:
    """Write the chunks that are not in ``folder`` yet. All ranks call it together.

    Raises:
        ValueError: the rules leave too few candidates, or the folder can't be written.
        Interrupted: a rank was asked to stop; finished chunks are kept.
    """
    range_max = rules.resolved(pairs.most_positives)
    left = gather.broadcast_object(
        [n for n in range(num_chunks(pairs)) if not _is_whole(_path(folder, n))] if gather.rank() == 0 else []
    )
    what = f"searching {pairs.num_documents:,} documents for {pairs.num_anchors:,} anchors"
    shown = gather.rank() == 0 and pairs.num_anchors >= _SHOWN_ANCHORS
    finished = 0
    with (
        SharedWork(len(left)) as pieces,
        shown_progress(what, len(left) * CHUNK_ANCHORS, "anchors", shown) as advance,
    ):
        for piece in pieces:
            interruption.stop_if_asked()
            chunk = _search(pairs, vectors, rules, range_max, left[piece], device)
            _write(_path(folder, left[piece]), chunk)
            advance((piece + 1 - finished) * CHUNK_ANCHORS)
            finished = piece + 1


def num_chunks(pairs: Pairs) -> int:
    return -(-pairs.num_anchors // CHUNK_ANCHORS)


def read_chunks(pairs: Pairs, folder: Path) -> Iterator[Chunk]:
    """All chunks of a finished search, in the order of the anchors."""
    for number in range(num_chunks(pairs)):
        with np.load(_path(folder, number)) as saved:
            removed = {name.removeprefix("removed-"): int(saved[name]) for name in saved if name.startswith("removed-")}
            negatives = Selected(saved["scores"], saved["ids"], removed)
            yield Chunk(_anchors(pairs, number), saved["positive_scores"], negatives)


def _anchors(pairs: Pairs, number: int) -> slice:
    start = number * CHUNK_ANCHORS
    return slice(start, min(start + CHUNK_ANCHORS, pairs.num_anchors))


def _search(pairs: Pairs, vectors: Vectors, rules: Rules, range_max: int, number: int, device: torch.device) -> Chunk:
    anchors = _anchors(pairs, number)
    anchors_QD = torch.from_numpy(vectors.anchors.take(pairs.rows_Q[anchors]))
    # As many as sentence-transformers looks at, and one more in place of the anchor's own text.
    wanted = range_max + pairs.most_positives
    nearest = top_k(anchors_QD.to(device), vectors.documents(pairs), min(wanted + 1, pairs.num_documents))
    scores_QC, ids_QC = nearest.scores_Qk.cpu().numpy(), nearest.ids_Qk.cpu().numpy()
    is_own_QC = ids_QC == pairs.own_Q[anchors, None]
    scores_QC[is_own_QC] = -np.inf
    if scores_QC.shape[1] > wanted:
        scores_QC[~is_own_QC.any(axis=1), -1] = -np.inf
    here = pairs.positives_of(anchors)
    starts_Q = pairs.starts_Q[anchors] - here.start
    query_K = pairs.query_of_positives(anchors)
    positives_KD = torch.from_numpy(vectors.positives.take(pairs.pairs_K[here]))
    positive_scores_K = torch.nn.functional.cosine_similarity(anchors_QD[query_K], positives_KD).numpy()
    # Numbers that stand for (anchor, document).
    positive_K = query_K * pairs.num_documents + pairs.positives_K[here]
    candidate_QC = np.arange(len(ids_QC))[:, None] * pairs.num_documents + ids_QC
    chosen = select(
        scores_QC,
        ids_QC,
        np.minimum.reduceat(positive_scores_K, starts_Q),
        np.isin(candidate_QC, positive_K),
        rules,
        range_max,
        anchors.start,
    )
    return Chunk(anchors, positive_scores_K, chosen)


def _path(folder: Path, number: int) -> Path:
    return folder / f"negatives-{number:05d}.npz"


def _is_whole(path: Path) -> bool:
    try:
        with np.load(path) as saved:
            return "ids" in saved.files
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
        return False


def _write(path: Path, chunk: Chunk) -> None:
    negatives = chunk.negatives
    removed = {f"removed-{rule}": np.array(count) for rule, count in negatives.removed.items()}
    try:
        with whole_file(path) as file:
            np.savez(
                file,
                scores=negatives.scores_Qn,
                ids=negatives.ids_Qn,
                positive_scores=chunk.positive_scores_K,
                **removed,  # type: ignore[arg-type]
            )
    except OSError as error:
        raise ValueError(
            f"{path} can't be written: {error.strerror}; make room, and the same command goes on from there"
        ) from error
