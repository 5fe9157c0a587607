"""Evaluators: what to embed and how to score it."""

from trainer.evaluation.base import Evaluator
from trainer.evaluation.binaryclassification import BinaryClassification
from trainer.evaluation.informationretrieval import InformationRetrieval
from trainer.evaluation.labelaccuracy import LabelAccuracy
from trainer.evaluation.labelretrieval import LabelRetrieval
from trainer.evaluation.mse import MSE
from trainer.evaluation.reranking import Reranking
from trainer.evaluation.sts import STS
from trainer.evaluation.translation import Translation
from trainer.evaluation.triplet import Triplet

__all__ = [
    "MSE",
    "STS",
    "BinaryClassification",
    "Evaluator",
    "InformationRetrieval",
    "LabelAccuracy",
    "LabelRetrieval",
    "Reranking",
    "Translation",
    "Triplet",
]
