"""Losses: functions of embeddings, one file each; none knows an encoder."""

from trainer.losses.angle import AnglE
from trainer.losses.base import Loss
from trainer.losses.batchtriplet import BatchHardTriplet, BatchTriplet
from trainer.losses.contrastive import Contrastive
from trainer.losses.cosent import CoSENT
from trainer.losses.cosinesimilarity import CosineSimilarity
from trainer.losses.distillkldiv import DistillKLDiv
from trainer.losses.embeddistill import EmbedDistill
from trainer.losses.gistembed import GISTEmbed
from trainer.losses.globalorthogonalregularization import GlobalOrthogonalRegularization
from trainer.losses.infonce import InfoNCE
from trainer.losses.marginmse import MarginMSE
from trainer.losses.matryoshka import Matryoshka
from trainer.losses.mse import MSE
from trainer.losses.onlinecontrastive import OnlineContrastive
from trainer.losses.siglip import SigLIP
from trainer.losses.softmax import Softmax
from trainer.losses.triplet import Triplet
from trainer.losses.weightedsum import WeightedSum

__all__ = [
    "MSE",
    "AnglE",
    "BatchHardTriplet",
    "BatchTriplet",
    "CoSENT",
    "Contrastive",
    "CosineSimilarity",
    "DistillKLDiv",
    "EmbedDistill",
    "GISTEmbed",
    "GlobalOrthogonalRegularization",
    "InfoNCE",
    "Loss",
    "MarginMSE",
    "Matryoshka",
    "OnlineContrastive",
    "SigLIP",
    "Softmax",
    "Triplet",
    "WeightedSum",
]
