"""Translation against sentence-transformers' evaluator, on the same embeddings."""

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import TranslationEvaluator

from tests.evaluation.test_scores import make_rows
from trainer.evaluation import Translation


def test_equals_sentence_transformers() -> None:
    rows, model, embeddings = make_rows(("anchor", "positive"))
    # Two rows with the same translation, as equal texts have equal embeddings: either counts as found.
    rows = rows.map(lambda row, i: {"positive": rows[0]["positive"] if i == 7 else row["positive"]}, with_indices=True)
    embeddings[200 + 7] = embeddings[200]
    model.encode = lambda texts, **kwargs: [torch.from_numpy(np.array(model.embeddings[text])) for text in texts]
    peer = TranslationEvaluator(rows["anchor"][:], rows["positive"][:], write_csv=False)
    theirs = peer(model)
    ours = Translation().score(embeddings, rows)
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert 0.3 < ours["mean_accuracy"] < 0.95
    assert ours["src2trg_accuracy"] != ours["trg2src_accuracy"]
