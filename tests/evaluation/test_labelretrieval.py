"""Label retrieval against ranked lists by NumPy, and against scikit-learn's nearest neighbours."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from trainer.evaluation import LabelRetrieval


def by_numpy(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """As the paper writes the metrics, text by text."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    first, r_precision, map_r = [], [], []
    for i in range(len(labels)):
        others = np.delete(np.arange(len(labels)), i)
        right = int((labels[others] == labels[i]).sum())
        if right == 0:
            continue
        order = others[np.argsort(-(unit[others] @ unit[i]), kind="stable")][:right]
        hits = labels[order] == labels[i]
        first.append(hits[0])
        r_precision.append(hits.mean())
        map_r.append(sum(hits[: j + 1].mean() for j in range(right) if hits[j]) / right)
    return {"precision@1": np.mean(first), "r_precision": np.mean(r_precision), "map@r": np.mean(map_r)}


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    labels = draw.choice([0, 1, 2, 7], 1100, p=[0.6, 0.2, 0.15, 0.05])
    labels[5] = 9  # alone in its class
    centres = draw.normal(size=(10, 16))
    return (centres[labels] + 1.5 * draw.normal(size=(1100, 16))).astype(np.float32), labels


def test_equals_the_definition(rows: tuple[np.ndarray, np.ndarray]) -> None:
    embeddings, labels = rows
    ours = LabelRetrieval().score(torch.from_numpy(embeddings), {"text": [""] * 1100, "label": labels.tolist()})
    # Two cosines may round to another order in a product of matrices.
    assert ours == pytest.approx(by_numpy(embeddings, labels), abs=1e-6)
    assert 0.2 < ours["map@r"] < ours["r_precision"] < ours["precision@1"] < 0.98


def test_the_nearest_is_that_of_scikit_learn(rows: tuple[np.ndarray, np.ndarray]) -> None:
    embeddings, labels = (part[np.arange(len(rows[1])) != 5] for part in rows)
    nearest = KNeighborsClassifier(1, metric="cosine").fit(embeddings, labels)
    theirs = np.mean(labels[nearest.kneighbors(n_neighbors=1, return_distance=False)[:, 0]] == labels)
    ours = LabelRetrieval().score(torch.from_numpy(embeddings), {"text": [""] * len(labels), "label": labels.tolist()})
    assert ours["precision@1"] == pytest.approx(theirs, abs=1e-9)


def test_a_text_that_stands_often_does_not_find_itself() -> None:
    embeddings = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 2)
    labels = [0, 0, 0, 1, 1, 1, 2, 2]
    ours = LabelRetrieval().score(embeddings, {"text": [""] * 8, "label": labels})
    assert ours == pytest.approx(by_numpy(embeddings.numpy(), np.array(labels)), abs=1e-9)


def test_labels_that_all_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="the 3 texts have 3 labels, each its own; give two texts or more"):
        LabelRetrieval().score(torch.eye(3), {"text": ["a", "b", "c"], "label": [0, 1, 2]})
