"""Metrics of validation sets: rank 0 scores what all ranks have embedded, and all of them get the metrics.

Shape suffixes: N texts of a set, U distinct texts of it, B rows, D embedding, L classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from trainer.distributed import gather
from trainer.evaluation.base import num_not_finite, refuse_not_finite
from trainer.evaluation.classification import Classification
from trainer.evaluation.search import Search
from trainer.evaluation.sharded import Encode, TokenizedSet, embed_set, of_all_texts, search, tokenize_set

if TYPE_CHECKING:
    from trainer.data.validation import ValidationSet

# Of the loss with this name (None: model.loss): columns of (B, D) embeddings -> (B, L) logits.
Classify = Callable[[Optional[str], Sequence[Tensor]], Tensor]

_CLASSIFIED_ROWS = 4096  # whose embeddings are taken from those of distinct texts at once


# What else rank 0 does with a set, the embeddings (U, D) of its distinct texts, and which of them each text is (N,); of
# a search, its queries.
Observe = Callable[[TokenizedSet, Tensor, Tensor], None]


def _scorer(
    one: TokenizedSet, encode: Encode, classify: Classify | None, rank: int, world_size: int, max_tokens: int
) -> tuple[Callable[[], dict[str, float]], tuple[Tensor, Tensor]]:
    """Does what all ranks must do together; what comes back is for rank 0, to call and to observe."""
    evaluator, rows = one.evaluator, one.rows
    if isinstance(evaluator, Search):
        found, documents = search(encode, one, rank, world_size, max_tokens), one.documents

        def score_search() -> dict[str, float]:
            assert found.neighbours is not None
            assert documents is not None
            refuse_not_finite(found.num_bad, len(one.texts.ids_U) + len(documents.ids_U))
            neighbours = of_all_texts(found.neighbours, one.texts, documents, evaluator.depth)
            return evaluator.score_neighbours(neighbours, rows)

        return score_search, (found.queries_UD, one.texts.text_N)
    is_classified = isinstance(evaluator, Classification)
    embeddings_UD, text_N = embed_set(encode, one, rank, world_size, max_tokens, everywhere=is_classified)
    if not isinstance(evaluator, Classification):
        return lambda: evaluator.score(embeddings_UD[text_N], rows), (embeddings_UD, text_N)
    assert classify is not None
    logits_BL = _logits(classify, evaluator, embeddings_UD, text_N)

    def score_logits() -> dict[str, float]:
        refuse_not_finite(num_not_finite(embeddings_UD), len(embeddings_UD))
        try:
            return evaluator.score_logits(logits_BL, rows)
        except ValueError as error:  # of labels that the head does not have
            raise ValueError(f"{one.name}: {error}") from error

    return score_logits, (embeddings_UD, text_N)


def _logits(classify: Classify, evaluator: Classification, embeddings_UD: Tensor, text_N: Tensor) -> Tensor:
    """Of all rows, on the CPU. Every rank computes all of them: a head may be shared out (ZeRO-3), and it is small."""
    columns = text_N.to(embeddings_UD.device).chunk(len(evaluator.text_columns))
    blocks = zip(*(column.split(_CLASSIFIED_ROWS) for column in columns), strict=True)
    parts = [classify(evaluator.loss, [embeddings_UD[numbers] for numbers in block]) for block in blocks]
    return torch.cat([part.float().cpu() for part in parts])


def _as_floats(one: TokenizedSet, found: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of NumPy and tensors of one value too: an evaluator of the user may give them, and JSON takes neither."""
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{one.name}: score() of {type(one.evaluator).__name__} gives {type(found).__name__}; return a dict, "
            "metric -> float"
        )
    metrics = {}
    for metric, value in found.items():
        try:
            metrics[metric] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{one.name}: {type(one.evaluator).__name__} gives {type(value).__name__} for the metric {metric}, "
                "which is no single number; return a float"
            ) from error
    return metrics


def _score(
    one: TokenizedSet,
    score: Callable[[], dict[str, float]],
    observe: Callable[[], None] | None,
    rank: int,
    world_size: int,
) -> dict[str, float]:
    """Score and observe on rank 0 and tell the others, a failure too: nobody may wait for a rank that has raised."""
    metrics: dict[str, float] = {}
    failure = None
    if rank == 0:
        try:
            metrics = _as_floats(one, score())
            if (primary := one.evaluator.primary) not in metrics:
                raise ValueError(
                    f"{one.name}: primary of {type(one.evaluator).__name__} is '{primary}', but its score returns "
                    f"{', '.join(metrics) or 'nothing'}"
                )
            if observe is not None:
                observe()
        except Exception as error:
            failure = error
    if world_size > 1:
        metrics, message = gather.broadcast_object((metrics, str(failure) if failure else None))
        if message is not None and rank != 0:  # it may be empty
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
    classify: Classify | None = None,
    observe: Observe | None = None,
) -> dict[str, float]:
    """Metrics of all sets, the same on every rank. All ranks call it together.

    Args:
        encode: embeddings (S, D) of the texts of a batch, in their order, in evaluation mode.
        sets: what to evaluate; every rank passes the same sets.
        rank: of this process among `world_size`.
        world_size: ranks that share the texts; 1 evaluates everything here, without any collective.
        max_tokens: of one forward on one rank.
        classify: the head of a loss, for the evaluators that ask for classes.
        observe: called on rank 0 for each set that was scored.

    Returns:
        `eval/<set>/<metric>` -> value; of several sets of a suite `eval/<suite>/<set>/<metric>`, and their mean as
        `eval/<suite>/<metric>`.

    Raises:
        ValueError: on every rank, what an evaluator can't score or ``observe`` refuses.
    """
    metrics: dict[str, float] = {}
    of_suite: dict[str, dict[str, list[float]]] = {}
    for validation_set in sets:
        gather.enter(f"evaluation of {validation_set.name}")
        one = validation_set if isinstance(validation_set, TokenizedSet) else tokenize_set(validation_set)
        score, embedded = _scorer(one, encode, classify, rank, world_size, max_tokens)
        observe_set = None if observe is None else partial(observe, one, *embedded)
        found = _score(one, score, observe_set, rank, world_size)
        metrics |= found
        for key, value in found.items() if one.suite else ():
            mean_key = f"eval/{one.suite}/{key.rpartition('/')[2]}"
            of_suite.setdefault(one.suite, {}).setdefault(mean_key, []).append(value)
    for values_of in of_suite.values():
        metrics |= {key: math.fsum(values) / len(values) for key, values in values_of.items()}
    return metrics
