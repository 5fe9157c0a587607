from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor

from tests.losses.side_by_side import assert_equals_peer, draw, embedded, targets_of, value_and_gradients
from trainer.losses import InfoNCE
from trainer.losses.similarity import Similarity


@pytest.mark.parametrize(("similarity", "scale"), [("cosine", 20.0), ("cosine", 1.0), ("dot", 0.5)])
@pytest.mark.parametrize("num_columns", [2, 3, 4])
def test_equals_sentence_transformers(similarity: Similarity, scale: float, num_columns: int) -> None:
    columns = draw(num_columns, 12, spread=1.0)
    peer = MultipleNegativesRankingLoss(
        embedded(), scale=scale, similarity_fct=cos_sim if similarity == "cosine" else dot_score
    )
    value = assert_equals_peer(InfoNCE(scale, similarity), peer, columns, targets_of(12))
    logits = _logits(columns, scale, similarity)
    assert value == pytest.approx(np.mean(logsumexp(logits, axis=1) - np.diag(logits[:, :12])), rel=1e-5)


def _logits(columns: list[Tensor], scale: float = 20.0, similarity: Similarity = "cosine") -> Any:
    """Of anchors and all other columns, in double precision."""
    anchors, *candidates = (column.double().numpy() for column in columns)
    stacked = np.concatenate(candidates)
    if similarity == "cosine":
        anchors = anchors / np.linalg.norm(anchors, axis=1, keepdims=True)
        stacked = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
    return scale * anchors @ stacked.T


def test_one_row_without_negatives_has_nothing_to_learn() -> None:
    peer = MultipleNegativesRankingLoss(embedded())
    assert assert_equals_peer(InfoNCE(), peer, draw(2, 1), targets_of(1)) == 0.0


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
OPTIONS: dict[str, dict[str, Any]] = {
    "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition": "per_direction"},
    "symmetric in one sum": {"directions": ("query_to_doc", "doc_to_query")},
    "the four of GTE": {"directions": ALL},
    "harder others": {"hardness": "in_batch_negatives", "hardness_strength": 9.0},
    "harder own": {"hardness": "hard_negatives", "hardness_strength": 9.0},
    "harder negatives": {"hardness": "all_negatives", "hardness_strength": 5.0, "directions": ALL},
}


@pytest.mark.parametrize("max_whole", [2**24, 1], ids=["whole", "tiled"])
@pytest.mark.parametrize("num_columns", [2, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_equal_those_of_sentence_transformers(
    options: dict[str, Any], num_columns: int, max_whole: int
) -> None:
    columns = draw(num_columns, 12, spread=1.0)
    names = {"partition": "partition_mode", "hardness": "hardness_mode"}
    peer = MultipleNegativesRankingLoss(embedded(), **{names.get(k, k): value for k, value in options.items()})
    loss = InfoNCE(**options)
    loss.max_whole = max_whole
    value = assert_equals_peer(loss, peer, columns, targets_of(12))
    if num_columns > 2 or options.get("hardness") != "hard_negatives":  # pairs have no hard negatives
        plain = InfoNCE()(columns, targets_of(12))
        assert abs(value - float(plain)) > 1e-2


@pytest.mark.parametrize("max_whole", [2**24, 1], ids=["whole", "tiled"])
def test_one_row_in_all_directions(max_whole: int) -> None:
    """Which has no other anchor and no other document: sums over nothing."""
    loss = InfoNCE(directions=ALL)
    loss.max_whole = max_whole
    value, gradients = value_and_gradients(lambda x: loss(x, targets_of(1)), draw(2, 1))
    assert float(value) == pytest.approx(np.log(2.0), rel=1e-6)  # the pair stands in it twice
    assert all(gradient.isfinite().all() for gradient in gradients)


# -- what is no negative ----------------------------------------------------------------------------------

# Row 1 has row 0's positive; row 2's positive is row 3's anchor; row 4 has row 0's anchor, and its negative is its own
# positive once more.
TEXTS = torch.tensor([[0, 10, 20], [1, 10, 21], [2, 12, 22], [12, 13, 23], [0, 14, 14], [5, 15, 25]])
GROUPS = torch.tensor([0, 1, 2, 3, 4, 2])
PRESENT = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()


def _left_out(texts: Tensor | None, groups: Tensor | None, present: Tensor | None) -> Any:
    """Row by row from the words of the documentation: (rows, candidates), of which 0-5 are positives."""
    left_out = np.zeros((6, 12), dtype=bool)
    for i in range(6):
        for j in range(12):
            row, column = j % 6, 1 + j // 6
            if j == i:
                continue
            if texts is not None and texts[row, column] in (texts[i, 0], texts[i, 1]):
                left_out[i, j] = True
            if texts is not None and column == 1 and (texts[row, :2] == texts[i, :2]).any():
                left_out[i, j] = True
            if groups is not None and column == 1 and groups[row] == groups[i]:
                left_out[i, j] = True
            if present is not None and not present[row, column]:
                left_out[i, j] = True
    return left_out


@pytest.mark.parametrize("max_whole", [2**24, 1], ids=["whole", "tiled"])
@pytest.mark.parametrize("known", ["texts", "groups", "present", "all"])
def test_false_negatives_and_absent_texts_are_no_candidates(known: str, max_whole: int) -> None:
    columns = draw(3, 6, spread=1.0)
    texts = TEXTS if known in ("texts", "all") else None
    groups = GROUPS if known in ("groups", "all") else None
    present = PRESENT if known in ("present", "all") else None
    targets = targets_of(6, texts_BC=texts, groups_B=groups, present_BC=present)
    loss = InfoNCE()
    loss.max_whole = max_whole
    value, gradients = value_and_gradients(lambda x: loss(x, targets), columns)
    left_out, logits = _left_out(texts, groups, present), _logits(columns)
    assert left_out.sum() > 1
    terms = logsumexp(np.where(left_out, -np.inf, logits), axis=1) - np.diag(logits[:, :6])
    assert float(value) == pytest.approx(terms.mean(), rel=1e-5)
    if present is not None:  # a placeholder moves nothing
        assert not gradients[2][~present[:, 2]].any()
        assert gradients[2][present[:, 2]].any(dim=1).all()
    if known == "present":
        assert loss.last_metrics == {}
        return
    false = _left_out(texts, groups, None) & ~_left_out(None, None, present)
    others = 11 if present is None else 9
    assert float(loss.last_metrics["false_negative_rate"]) == pytest.approx(false.sum() / 6 / others, rel=1e-6)


def test_masking_can_be_turned_off() -> None:
    columns, targets = draw(3, 6), targets_of(6, texts_BC=TEXTS, groups_B=GROUPS)
    loss = InfoNCE(mask_false_negatives=False)
    assert_equals_peer(loss, MultipleNegativesRankingLoss(embedded()), columns, targets)
    assert loss.last_metrics == {}


def test_different_texts_mask_nothing() -> None:
    columns, targets = draw(3, 6), targets_of(6, texts_BC=torch.arange(18).view(6, 3), groups_B=torch.arange(6))
    loss = InfoNCE(directions=ALL)
    assert_equals_peer(loss, MultipleNegativesRankingLoss(embedded(), directions=ALL), columns, targets)
    assert float(loss.last_metrics["false_negative_rate"]) == 0.0


@pytest.mark.parametrize("max_whole", [2**24, 1], ids=["whole", "tiled"])
def test_every_direction_leaves_out_what_is_no_negative(max_whole: int) -> None:
    """Row by row, from the definition: logits of the texts that are left, in all four directions."""
    columns = draw(3, 6, spread=1.0)
    loss = InfoNCE(directions=ALL)
    loss.max_whole = max_whole
    targets = targets_of(6, texts_BC=TEXTS, groups_B=GROUPS, present_BC=PRESENT)
    value, _ = value_and_gradients(lambda x: loss(x, targets), columns)
    a, p, n = (column.double().numpy() for column in columns)
    a, p, n = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, p, n))
    terms = []
    for i in range(6):

        def wrong(row: int, column: int, i: int = i) -> bool:
            same_text = int(TEXTS[row, column]) in (int(TEXTS[i, 0]), int(TEXTS[i, 1]))
            same_row = GROUPS[row] == GROUPS[i] or (TEXTS[row, :2] == TEXTS[i, :2]).any()
            return bool(same_text or (column < 2 and same_row) or not PRESENT[row, column])

        logits = [20.0 * a[i] @ p[i], 20.0 * a[i] @ p[i]]  # query to its document, and back
        for j in range(6):
            documents = [(1, p[j])] * (j != i) + [(2, n[j])]
            logits += [20.0 * a[i] @ x for column, x in documents if not wrong(j, column)]
            if j != i and not wrong(j, 0):
                logits += [20.0 * a[i] @ a[j], 20.0 * p[i] @ a[j]]
            logits += [20.0 * p[i] @ x for column, x in documents if j != i and not wrong(j, column)]
        terms.append(logsumexp(logits) - 20.0 * a[i] @ p[i])
    assert float(value) == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"directions": ["doc_to_query"]}, "InfoNCE directions are doc_to_query; add query_to_doc"),
        ({"directions": ALL, "partition": "per_direction"}, "doc_to_doc and query_to_query have no positive to find"),
        ({"directions": (*ALL, "doc_to_query")}, "directions name doc_to_query more than once; name each once"),
        ({"hardness": "hard_negatives"}, "hardness is hard_negatives and hardness_strength 0: set both"),
        ({"hardness_strength": 2.0}, "hardness is None and hardness_strength 2: set both"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        InfoNCE(**options)
