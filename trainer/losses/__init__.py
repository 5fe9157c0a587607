"""Losses: functions of embeddings, one file each; none knows an encoder."""

from trainer.losses.base import Loss
from trainer.losses.batchhardtriplet import BatchHardTriplet
from trainer.losses.cosent import CoSENT
from trainer.losses.cosinesimilarity import CosineSimilarity
from trainer.losses.infonce import InfoNCE
from trainer.losses.softmax import Softmax

__all__ = ["BatchHardTriplet", "CoSENT", "CosineSimilarity", "InfoNCE", "Loss", "Softmax"]
