"""Metrics of validation sets: texts are shared out over ranks, embedded, gathered and scored as one whole.

Shape suffixes: N texts of a set, U distinct texts of it, B texts of this rank, b of all ranks, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.batch import PackedBatch
from trainer.data.collate import pack_texts
from trainer.distributed import gather
from trainer.evaluation.base import Evaluator, Rows

if TYPE_CHECKING:
    from trainer.data.module import ValidationSet

Encode = Callable[[PackedBatch], Tensor]


@dataclass(frozen=True)
class TokenizedSet:
    """A validation set with the token ids of its distinct texts.

    Attributes:
        ids_U: token ids of each distinct text.
        text_N: for each text of the evaluator the distinct text it is.
    """

    name: str
    evaluator: Evaluator
    rows: Rows
    ids_U: list[list[int]]
    text_N: Tensor


def tokenize_set(validation_set: ValidationSet) -> TokenizedSet:
    """Tokenise each distinct text of a set once.

    Raises:
        ValueError: a column that the evaluator needs is not there, or there are no rows.
    """
    evaluator, rows = validation_set.evaluator, validation_set.rows
    found = list(rows) if isinstance(rows, Mapping) else list(rows.column_names)
    missing = [column for column in evaluator.columns if column not in found]
    if missing:
        raise ValueError(
            f"Validation set '{validation_set.name}': {type(evaluator).__name__} needs {', '.join(missing)}, "
            f"but the set has {', '.join(found)}. Map it under `columns`, or choose another evaluator."
        )
    texts = evaluator.texts(rows)
    if not texts:
        raise ValueError(f"Validation set '{validation_set.name}' has no rows. Remove it or check its path.")
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    ids_U = validation_set.text(list(number))
    text_N = torch.tensor([number[text] for text in texts])
    return TokenizedSet(validation_set.name, evaluator, rows, ids_U, text_N)


def plan_rounds(lengths: Sequence[int], world_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Which texts each rank embeds in each forward: rounds, ranks, texts.

    Every text is in one place. All ranks have the same number of rounds, and their shares of a round differ
    by one text at most, so a rank's share is empty only where there are fewer texts than ranks. A forward
    takes max_tokens at most even if it is padded, except for a single longer text. Longest texts come first:
    what doesn't fit into memory fails at once.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    rounds: list[list[list[int]]] = []
    longest = 0
    for start in range(0, len(by_length), world_size):
        one_each = by_length[start : start + world_size]
        if not rounds or (len(rounds[-1][0]) + 1) * longest > max_tokens:
            rounds.append([[] for _ in range(world_size)])
            longest = lengths[one_each[0]]
        for share, text in zip(rounds[-1], one_each, strict=False):
            share.append(text)
    return rounds


def embed_texts(encode: Encode, ids_U: Sequence[list[int]], rank: int, world_size: int, max_tokens: int) -> Tensor:
    """Embeddings of all texts, (U, D) float32 on the CPU; only rank 0 keeps them, others return nothing."""
    parts, order = [], []
    for shares in plan_rounds([len(ids) for ids in ids_U], world_size, max_tokens):
        # A rank without a share embeds a text whose embedding is dropped: under ZeRO-3 a forward is a
        # collective, so all ranks must do the same number of them.
        mine = shares[rank] or shares[0][:1]
        embeddings_BD = encode(pack_texts([ids_U[i] for i in mine])).float()[: len(shares[rank])]
        gathered_bD = gather.gather_rows(embeddings_BD, [len(share) for share in shares])
        if rank == 0:
            parts.append(gathered_bD.cpu())
            order += [text for share in shares for text in share]
    if rank != 0:
        return torch.empty(0)
    embeddings_UD = torch.empty(len(ids_U), parts[0].shape[1])
    embeddings_UD[torch.tensor(order)] = torch.cat(parts)
    return embeddings_UD


def _score(one: TokenizedSet, embeddings_UD: Tensor, rank: int, world_size: int) -> dict[str, float]:
    """Score on rank 0 and tell the others, a failure too: nobody may wait for a rank that has raised."""
    metrics: dict[str, float] = {}
    failure = None
    if rank == 0:
        try:
            metrics = one.evaluator.score(embeddings_UD[one.text_N], one.rows)
        except Exception as error:
            failure = error
    if world_size > 1:
        metrics, message = gather.broadcast_object((metrics, str(failure) if failure else None))
        if message and rank != 0:
            failure = gather.SharedError(message)
    if failure:
        raise failure
    return {f"eval/{one.name}/{metric}": value for metric, value in metrics.items()}


@torch.no_grad()
def evaluate(
    encode: Encode,
    sets: Sequence[ValidationSet | TokenizedSet],
    rank: int,
    world_size: int,
    max_tokens: int,
) -> dict[str, float]:
    """Metrics of all sets, the same on every rank. All ranks call it together.

    Args:
        encode: embeddings (S, D) of the texts of a batch, in their order, in evaluation mode.
        sets: what to evaluate; every rank passes the same sets.
        rank: of this process among `world_size`.
        world_size: ranks that share the texts; 1 evaluates everything here, without any collective.
        max_tokens: of one forward on one rank.

    Returns:
        `eval/<set>/<metric>` -> value.

    Raises:
        ValueError: on every rank, what an evaluator can't score.
    """
    metrics: dict[str, float] = {}
    for validation_set in sets:
        gather.enter(f"evaluation of {validation_set.name}")
        one = validation_set if isinstance(validation_set, TokenizedSet) else tokenize_set(validation_set)
        metrics |= _score(one, embed_texts(encode, one.ids_U, rank, world_size, max_tokens), rank, world_size)
    return metrics
