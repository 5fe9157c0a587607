"""Evaluators: what to embed and how to score it."""

from trainer.evaluation.base import Evaluator
from trainer.evaluation.sts import STS
from trainer.evaluation.triplet import Triplet

__all__ = ["STS", "Evaluator", "Triplet"]
