"""MSE against sentence-transformers' evaluator, on the same embeddings."""

import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import MSEEvaluator

from tests.evaluation.test_scores import make_rows
from trainer.evaluation import MSE


def test_equals_sentence_transformers() -> None:
    """The teacher embeds the anchor, the student the positive."""
    rows, model, embeddings = make_rows(("anchor", "positive"))
    teacher, student = embeddings.chunk(2)
    peer = MSEEvaluator(rows["anchor"][:], rows["positive"][:], teacher_model=model, write_csv=False)
    ours = MSE().score(student, {"anchor": rows["anchor"], "positive": rows["positive"], "teacher": teacher})
    assert ours == pytest.approx(peer(model), rel=1e-6)
    assert ours["negative_mse"] < -1
    assert MSE().texts(rows) == rows["positive"][:]


def test_a_teacher_of_another_size_is_refused() -> None:
    rows = {"anchor": ["a"], "positive": ["b"], "teacher": torch.zeros(1, 8)}
    with pytest.raises(ValueError, match="teacher's embeddings have 8 dimensions, the student's 4"):
        MSE().score(torch.zeros(1, 4), rows)
