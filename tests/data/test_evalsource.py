"""What a validation set may be called, measure and ask for; retrieval sets are in test_retrieval."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from trainer.data.evalsource import EvalSource
from trainer.data.sources import Source
from trainer.encoder import EncoderSpec
from trainer.evaluation import MSE, STS, InformationRetrieval, Triplet
from trainer.evaluation.base import Evaluator, Rows

PAIR = {"anchor": "a", "positive": "b"}
SCORED = PAIR | {"score": "score"}


def test_eval_source_has_a_name_and_an_evaluator() -> None:
    assert isinstance(EvalSource("x.jsonl", SCORED, name="dev"), Source)
    assert isinstance(EvalSource("x.jsonl", SCORED, name="dev").evaluator, STS)
    assert isinstance(EvalSource("x.jsonl", PAIR, name="dev", evaluator=Triplet()).evaluator, Triplet)
    with pytest.raises(TypeError, match="name"):
        EvalSource("x.jsonl", PAIR)
    with pytest.raises(ValueError, match=r"validation set name '\.\./x'"):
        EvalSource("x.jsonl", PAIR, name="../x")
    with pytest.raises(ValueError, match="max_negatives is 7, which counts texts of the list negatives"):
        EvalSource("x.jsonl", {**PAIR, "negative": "n"}, name="dev", evaluator=Triplet(), max_negatives=7)


class Unfinished(Evaluator):
    """Of a user, who names too little."""

    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("lacking", ["columns", "text_columns", "primary"])
def test_an_evaluator_that_names_too_little(lacking: str) -> None:
    named = {"columns": ("anchor",), "text_columns": ("anchor",), "primary": "mean"}
    own = type("Own", (Unfinished,), {name: value for name, value in named.items() if name != lacking})
    message = f"^x.jsonl: Own has no {lacking}; an evaluator names columns, text_columns and its primary metric$"
    with pytest.raises(ValueError, match=message):
        EvalSource("x.jsonl", PAIR, name="dev", evaluator=own())
    EvalSource("x.jsonl", PAIR, name="dev", evaluator=type("Own", (Unfinished,), named)())


@pytest.mark.parametrize("evaluator", [STS(), InformationRetrieval()])
@pytest.mark.parametrize("settings", [{"loss": "mine"}, {"weight": 3.0}, {"rows_per_label": 4}])
def test_settings_of_a_loss_are_for_training(settings: dict, evaluator: Evaluator) -> None:
    text = rf"x.jsonl: {next(iter(settings))} is for data.train; nothing is learnt from a validation set: leave it out"
    with pytest.raises(ValueError, match=text):
        EvalSource("x.jsonl", {}, name="dev", evaluator=evaluator, **settings)


def test_other_evaluators_have_no_corpus(tmp_path: Path) -> None:
    columns = {"anchor": "a", "positive": "b", "score": "c"}
    with pytest.raises(ValueError, match=r"corpus is for an evaluator that searches \(InformationRetrieval\), STS"):
        EvalSource("x.jsonl", columns, name="dev", evaluator=STS(), corpus="y.jsonl")


def test_a_teacher_for_those_who_compare_with_one() -> None:
    columns = {"anchor": "a", "positive": "b"}
    with pytest.raises(ValueError, match="MSE compares with a teacher; name it"):
        EvalSource("x.jsonl", columns, name="dev", evaluator=MSE())
    with pytest.raises(ValueError, match="Triplet compares with no teacher; leave teacher out"):
        EvalSource("x.jsonl", columns, name="dev", evaluator=Triplet(), teacher=EncoderSpec("x"))
