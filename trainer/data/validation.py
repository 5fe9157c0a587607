"""Validation sets: what an evaluator scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from trainer.data.evalsource import EvalSource
from trainer.data.loading import load
from trainer.data.retrieval import load_collections
from trainer.encoder.spec import EncoderSpec
from trainer.encoder.text import TextPreparation
from trainer.evaluation.base import Evaluator, Rows


@dataclass
class ValidationSet:
    """A set that an evaluator scores.

    Attributes:
        rows: or the `Collection` that it searches.
        suite: name of the source, where it holds several sets.
        teacher: of an evaluator that compares with one.
        teacher_prompt: the student's, before each text of the teacher's column; the teacher reads the text behind it.
    """

    name: str
    rows: Rows
    evaluator: Evaluator
    text: TextPreparation
    suite: str = ""
    teacher: Optional[EncoderSpec] = None
    teacher_prompt: str = ""

    @property
    def primary_metric(self) -> str:
        """The metric that stands for the source, as it is logged: of a suite the mean over its sets."""
        return f"eval/{self.suite or self.name}/{self.evaluator.primary}"


def open_validation(source: EvalSource, text: TextPreparation, cache_dir: Path) -> list[ValidationSet]:
    """The sets of a source: one, or those of a suite."""
    if not source.searches:
        rows = load(source, cache_dir)
        if not source.missing_columns:  # which the check, or the first evaluation, names
            try:
                source.evaluator.refuse_rows(rows)
            except ValueError as error:
                raise ValueError(f"{source.path}: {error}") from error
        prompt = source.prompt_of(source.evaluator.teacher_column or "")
        return [ValidationSet(source.name, rows, source.evaluator, text, teacher=source.teacher, teacher_prompt=prompt)]
    return [
        ValidationSet(name, collection, source.evaluator, text, suite="" if name == source.name else source.name)
        for name, collection in load_collections(source, cache_dir).items()
    ]
