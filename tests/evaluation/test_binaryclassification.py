"""BinaryClassification against sentence-transformers' evaluator, on the same embeddings."""

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import BinaryClassificationEvaluator

from tests.evaluation.test_scores import NAMES, make_rows
from trainer.evaluation import BinaryClassification


@pytest.mark.parametrize("ties", [False, True])
def test_equals_sentence_transformers(ties: bool) -> None:
    """With ties, many pairs of both classes have the same similarity: no threshold falls between them."""
    rows, model, embeddings = make_rows(("anchor", "positive"))
    if ties:
        embeddings = embeddings.round()
        texts = [*rows["anchor"], *rows["positive"]]
        model.embeddings = dict(zip(texts, embeddings.numpy(), strict=True))
    labels = (np.array(rows["score"]) > 0.5).astype(int).tolist()
    rows = rows.add_column("label", labels)
    peer = BinaryClassificationEvaluator(
        rows["anchor"], rows["positive"], labels, similarity_fn_names=NAMES, write_csv=False
    )
    theirs = peer(model)
    ours = BinaryClassification().score(embeddings, rows)
    left_out = {"max_accuracy_threshold", "max_f1_threshold"}  # of unlike similarities: a maximum says nothing
    assert ours.keys() == theirs.keys() - left_out
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6), name
    assert 0.6 < ours[BinaryClassification.primary] < 0.999
    assert ours["euclidean_f1_threshold"] > 0


def test_no_threshold_is_better_than_none() -> None:
    """Negatives are all nearer than the one positive: to call no pair positive is right most often."""
    rows = {"anchor": ["a"] * 4, "positive": ["b"] * 4, "label": [1, 0, 0, 0]}
    anchors = torch.tensor([[1.0, 0.0]] * 4)
    positives = torch.tensor([[0.0, 1.0], [1.0, 0.1], [1.0, 0.2], [1.0, 0.3]])
    metrics = BinaryClassification().score(torch.cat([anchors, positives]), rows)
    assert metrics["cosine_accuracy"] == 0.75
    assert metrics["cosine_accuracy_threshold"] > 0.99
    assert metrics["cosine_recall"] == 1.0
    assert metrics["cosine_precision"] == 0.25


def test_of_equal_f1_the_strictest_threshold_counts() -> None:
    """The first 6 of 17 pairs, all right, or the first 14, 9 of them right: F1 is 0.75 of both."""
    labels = [1] * 6 + [0] * 5 + [1] * 3 + [0] * 2 + [1]
    cosines = torch.linspace(1.0, 0.0, len(labels))
    anchors = torch.tensor([[1.0, 0.0]] * len(labels))
    positives = torch.stack([cosines, (1.0 - cosines.square()).sqrt()], dim=1)
    rows = {"anchor": ["a"] * len(labels), "positive": ["b"] * len(labels), "label": labels}
    metrics = BinaryClassification().score(torch.cat([anchors, positives]), rows)
    assert (metrics["cosine_f1"], metrics["cosine_precision"], metrics["cosine_recall"]) == (0.75, 1.0, 0.6)
    theirs = BinaryClassificationEvaluator.find_best_f1_and_threshold(cosines.numpy(), np.array(labels), True)
    assert theirs[:3] == pytest.approx((0.75, 9 / 14, 0.9)), "the documentation says that theirs may differ"


@pytest.mark.parametrize("labels", [[0, 1, 2], [1, 1, 1]])
def test_other_labels_are_refused(labels: list[int]) -> None:
    rows = {"anchor": ["a", "b", "c"], "positive": ["d", "e", "f"], "label": labels}
    with pytest.raises(ValueError, match=r"needs labels 0 and 1, both of them; the 3 rows hold"):
        BinaryClassification().score(torch.randn(6, 4), rows)
