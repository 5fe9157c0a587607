"""The texts of validation sets, shared out over ranks: tokenised, embedded, gathered or searched where they are.

Of a set that is searched only the queries are gathered. A document's embedding stays on the rank that made it, each
rank finds the nearest of its own documents, and these are merged: a rank holds N / W documents and the neighbours.

Shape suffixes: N texts of a set, U distinct texts of it, B texts of this rank, b of all ranks, D embedding, Q queries,
k neighbours of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.batch import PackedBatch
from trainer.data.collate import TokenSpans, pack_texts, plan_rounds
from trainer.distributed import gather
from trainer.encoder.spec import EncoderSpec
from trainer.encoder.text import TextPreparation
from trainer.evaluation.base import Evaluator, Rows, num_not_finite
from trainer.evaluation.search import Search
from trainer.evaluation.topk import Neighbours, merge_top_k, top_k

if TYPE_CHECKING:
    from trainer.data.validation import ValidationSet

Encode = Callable[[PackedBatch], Tensor]

_TOKENIZED_TEXTS = 10_000  # lists of Python numbers in memory at once
_MERGED_QUERIES = 1024  # whose neighbours of all ranks are in memory at once


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of some texts, each distinct one once.

    Attributes:
        ids_U: of each text that differs from the others in them.
        text_N: for each text which of these it is.
        tower: which encoder takes them, where queries and documents have one each.
    """

    ids_U: TokenSpans
    text_N: Tensor
    tower: str = "query"


@dataclass(frozen=True)
class TokenizedSet:
    """A validation set with the token ids of its texts.

    Attributes:
        texts: what is embedded; of a search, and of separate towers, the queries, and ``documents`` apart.
        suite: of which it is one of several sets; empty for none.
        teacher: that embeds the teacher's column of the rows; None for none, and when it has done so.
        teacher_prompt: the student's, before each text of that column; the teacher reads the text behind it.
    """

    name: str
    evaluator: Evaluator
    rows: Rows
    texts: TokenizedTexts
    documents: TokenizedTexts | None = None
    suite: str = ""
    teacher: EncoderSpec | None = None
    teacher_prompt: str = ""


def tokenize_set(validation_set: ValidationSet) -> TokenizedSet:
    """Tokenise each distinct text of a set once.

    Raises:
        ValueError: a column that the evaluator needs is not there, or there are no rows.
    """
    name, evaluator, rows = validation_set.name, validation_set.evaluator, validation_set.rows
    suite, text = validation_set.suite, validation_set.text
    teacher, prompt = validation_set.teacher, validation_set.teacher_prompt
    if isinstance(evaluator, Search):
        queries = tokenize(rows.queries, text.of_column("anchor"))
        documents = tokenize(rows.documents, text.of_column("document"), text.tower_of("document"))
        return TokenizedSet(name, evaluator, rows, queries, documents, suite)
    found = list(rows) if isinstance(rows, Mapping) else list(rows.column_names)
    missing = [column for column in evaluator.columns if column not in found]
    if missing:
        raise ValueError(
            f"Validation set '{name}': {type(evaluator).__name__} needs {', '.join(missing)}, "
            f"but the set has {', '.join(found)}. Map it under `columns`, or choose another evaluator."
        )
    texts = evaluator.texts(rows)
    if not texts:
        raise ValueError(f"Validation set '{name}' has no rows. Remove it or check its path.")
    first = evaluator.text_columns[0]  # an anchor comes before all documents
    tower, num_first = text.tower_of(first), len(rows[first])
    if text.documents is None or tower == "document" or len(texts) == num_first:
        tokens = tokenize(texts, text.of_column(first), tower)
        return TokenizedSet(name, evaluator, rows, tokens, teacher=teacher, teacher_prompt=prompt)
    queries = tokenize(texts[:num_first], text.of_column(first))
    documents = tokenize(texts[num_first:], text.documents, "document")
    return TokenizedSet(name, evaluator, rows, queries, documents, teacher=teacher, teacher_prompt=prompt)


def tokenize(texts: Sequence[str], text: TextPreparation, tower: str = "query") -> TokenizedTexts:
    """Token ids of each distinct text; their numbers are in the order in which they first stand in ``texts``.

    Texts that the encoder can't tell apart, as an uncased one reads capitals, are one. Embedded twice they would differ
    by rounding, and which of them is nearer to a query would depend on the number of ranks.
    """
    distinct = list(dict.fromkeys(texts))
    number_of_text: dict[str, int] = {}
    number_of_ids: dict[bytes, int] = {}
    values: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    for start in range(0, len(distinct), _TOKENIZED_TEXTS):
        some = distinct[start : start + _TOKENIZED_TEXTS]
        new: list[int] = []
        for one, ids in zip(some, text(some), strict=True):
            digest = blake2b(np.array(ids, np.int32).tobytes(), digest_size=16).digest()
            number_of_text[one] = number_of_ids.setdefault(digest, len(lengths))
            if number_of_text[one] == len(lengths):
                lengths.append(len(ids))
                new += ids
        values.append(np.array(new, np.int32))
    lengths_U = np.array(lengths, dtype=np.int64)
    spans = TokenSpans(np.concatenate(values), np.cumsum(lengths_U) - lengths_U, lengths_U)
    return TokenizedTexts(spans, torch.tensor([number_of_text[one] for one in texts]), tower)


def _rounds(
    encode: Encode, texts: TokenizedTexts, rounds: Sequence[list[list[int]]], rank: int
) -> Iterator[tuple[Tensor, list[list[int]]]]:
    """Embeddings of this rank's share of each round, (B, D) float32 on its device, and the shares of all ranks."""
    for shares in rounds:
        # A rank without a share embeds a text whose embedding is dropped: under ZeRO-3 a forward is a
        # collective, so all ranks must do the same number of them.
        mine = shares[rank] or shares[0][:1]
        yield encode(pack_texts([texts.ids_U[i] for i in mine], texts.tower)).float()[: len(shares[rank])], shares


def embed(
    encode: Encode, texts: TokenizedTexts, rank: int, world_size: int, max_tokens: int, everywhere: bool = False
) -> Tensor:
    """Embeddings of the distinct texts, (U, D) float32: on the CPU of rank 0, where others get none, or everywhere."""
    parts, order = [], []
    rounds = plan_rounds(texts.ids_U.lengths_S.tolist(), world_size, max_tokens)
    for embeddings_BD, shares in _rounds(encode, texts, rounds, rank):
        gathered_bD = gather.gather_rows(embeddings_BD, [len(share) for share in shares])
        if everywhere or rank == 0:
            parts.append(gathered_bD if everywhere else gathered_bD.cpu())
            order += [text for share in shares for text in share]
    if not parts:
        return torch.empty(0)
    gathered_UD = torch.cat(parts)
    embeddings_UD = torch.empty_like(gathered_UD)
    embeddings_UD[torch.tensor(order, device=gathered_UD.device)] = gathered_UD
    return embeddings_UD


def embed_set(
    encode: Encode, one: TokenizedSet, rank: int, world_size: int, max_tokens: int, everywhere: bool = False
) -> tuple[Tensor, Tensor]:
    """Embeddings of a set's distinct texts, as `embed` gives them, and for each of its N texts which of them it is."""
    parts = [one.texts] if one.documents is None else [one.texts, one.documents]
    embeddings_UD = torch.cat([embed(encode, part, rank, world_size, max_tokens, everywhere) for part in parts])
    starts = [0, len(one.texts.ids_U)][: len(parts)]
    return embeddings_UD, torch.cat([start + part.text_N for start, part in zip(starts, parts, strict=True)])


@torch.no_grad()
def ask_teacher(
    encode: Encode, text: TextPreparation, one: TokenizedSet, rank: int, world_size: int, max_tokens: int
) -> TokenizedSet:
    """The set with the teacher's embeddings in its rows (on rank 0, which scores). All ranks call it together.

    Args:
        encode, text: of the teacher.
    """
    evaluator = one.evaluator
    assert evaluator.teacher_column is not None
    texts = tokenize([row.removeprefix(one.teacher_prompt) for row in one.rows[evaluator.teacher_column]], text)
    teacher_UD = embed(encode, texts, rank, world_size, max_tokens)
    columns: dict[str, Any] = {column: one.rows[column][:] for column in evaluator.columns}
    if rank == 0:
        columns["teacher"] = teacher_UD[texts.text_N]
    return replace(one, rows=columns, teacher=None)


# -- search -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What rank 0 knows after a search.

    Attributes:
        neighbours: of the distinct queries among the distinct documents; None on other ranks.
        num_bad: documents and queries whose embeddings are not finite.
        queries_UD: embeddings of the distinct queries.
    """

    neighbours: Neighbours | None
    num_bad: int
    queries_UD: Tensor


def search(encode: Encode, one: TokenizedSet, rank: int, world_size: int, max_tokens: int) -> Found:
    """The nearest documents of each query of a set whose evaluator searches."""
    evaluator, documents = one.evaluator, one.documents
    assert isinstance(evaluator, Search)
    assert documents is not None
    queries_UD = embed(encode, one.texts, rank, world_size, max_tokens, everywhere=True)
    rounds = plan_rounds(documents.ids_U.lengths_S.tolist(), world_size, max_tokens)
    num_held = [sum(len(shares[r]) for shares in rounds) for r in range(world_size)]
    # In the order of the corpus: of equal scores the earlier document comes first, on any number of ranks.
    held = sorted(text for shares in rounds for text in shares[rank])
    place = {text: i for i, text in enumerate(held)}
    documents_BD = queries_UD.new_empty(len(held), queries_UD.shape[1])
    for embeddings_BD, shares in _rounds(encode, documents, rounds, rank):
        places = torch.tensor([place[text] for text in shares[rank]], dtype=torch.int64)
        documents_BD[places.to(documents_BD.device)] = embeddings_BD
    num_bad = torch.tensor([num_not_finite(documents_BD)], device=queries_UD.device)
    if world_size > 1:  # 1 does without any collective, whatever group there is
        num_bad = gather.reduce_sum(num_bad)
    best = top_k(queries_UD, documents_BD, evaluator.depth, similarity=evaluator.similarity)
    ids_Uk = torch.tensor(held, dtype=torch.int64, device=queries_UD.device)[best.ids_Qk]
    merged = _merge(Neighbours(best.scores_Qk, ids_Uk), evaluator.depth, num_held, rank)
    return Found(merged, int(num_bad) + num_not_finite(queries_UD), queries_UD)


def _merge(own: Neighbours, k: int, num_held: Sequence[int], rank: int) -> Neighbours | None:
    """The nearest of all ranks' documents, on the CPU of rank 0."""
    widths = [min(k, num) for num in num_held]
    parts = []
    for scores_Qk, ids_Qk in zip(own.scores_Qk.split(_MERGED_QUERIES), own.ids_Qk.split(_MERGED_QUERIES), strict=True):
        # Neighbours as rows, for ranks may have different numbers of them.
        scores_kQ = gather.gather_rows(scores_Qk.T.contiguous(), widths)
        ids_kQ = gather.gather_rows(ids_Qk.T.contiguous(), widths)
        if rank == 0:
            parts.append(merge_top_k([Neighbours(scores_kQ.T, ids_kQ.T)], k))
    if rank != 0:
        return None
    return Neighbours(torch.cat([p.scores_Qk for p in parts]).cpu(), torch.cat([p.ids_Qk for p in parts]).cpu())


def of_all_texts(found: Neighbours, queries: TokenizedTexts, documents: TokenizedTexts, k: int) -> Neighbours:
    """Neighbours of every query, among all documents: nearest first, and of equal scores the earlier document first."""
    scores_Qk, ids_Qk = found.scores_Qk[queries.text_N], found.ids_Qk[queries.text_N]
    num_documents, num_distinct = len(documents.text_N), len(documents.ids_U)
    if num_documents == num_distinct:
        return Neighbours(scores_Qk, ids_Qk)
    with_text: list[list[int]] = [[] for _ in range(num_distinct)]
    for number, text in enumerate(documents.text_N.tolist()):
        with_text[text].append(number)
    width = min(k, num_documents)
    scores, ids = [], []
    for row_scores, row_texts in zip(scores_Qk.tolist(), ids_Qk.tolist(), strict=True):
        row = [(s, number) for s, text in zip(row_scores, row_texts, strict=True) for number in with_text[text]]
        row.sort(key=lambda found: (-found[0], found[1]))
        scores.append([s for s, _ in row[:width]])
        ids.append([number for _, number in row[:width]])
    return Neighbours(torch.tensor(scores), torch.tensor(ids))
