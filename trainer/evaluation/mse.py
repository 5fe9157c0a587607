"""Mean squared error to a teacher: how far is the student's embedding from the one it should have?"""

from __future__ import annotations

from torch import Tensor

from trainer.evaluation.base import Evaluator, Rows


class MSE(Evaluator):
    """100 times the mean squared difference between the student's embedding of a text and a teacher's of its partner.

    The teacher (`teacher` of the validation source) embeds `anchor`, the student `positive`: in multilingual
    distillation (Reimers and Gurevych, EMNLP 2020, https://arxiv.org/abs/2004.09813) a sentence and its translation;
    both may be the same column. `negative_mse`, as in sentence-transformers, so that higher is better.
    """

    columns = ("anchor", "positive")
    text_columns = ("positive",)
    teacher_column = "anchor"
    primary = "negative_mse"
    metrics = ("negative_mse",)

    def score(self, embeddings_ND: Tensor, rows: Rows) -> dict[str, float]:
        """With the teacher's embeddings (B, D) as the column `teacher` of the rows."""
        (student_BD,) = self.split(embeddings_ND, rows)
        teacher_BD: Tensor = rows["teacher"]
        if teacher_BD.shape != student_BD.shape:
            raise ValueError(
                f"the teacher's embeddings have {teacher_BD.shape[1]} dimensions, the student's {student_BD.shape[1]}: "
                "take a teacher of the same size"
            )
        return {"negative_mse": -100.0 * float((student_BD - teacher_BD).square().mean())}
