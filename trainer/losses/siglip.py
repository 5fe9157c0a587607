"""In-batch negatives, each pair judged alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.batch import Targets
from trainer.losses.base import Loss
from trainer.losses.inbatch import Candidates, InBatch
from trainer.losses.logsumexp import MAX_WHOLE
from trainer.losses.similarity import similarity_matrix
from trainer.messages import refuse_infinite, refuse_not_positive


class SigLIP(Loss):
    """Mean over anchors of the sum over candidates of log(1 + exp(-z_ij (t cos(a_i, c_j) + bias))).

    z is 1 for an anchor and its own positive and -1 for every other positive and negative of the global batch; t, the
    inverse temperature, and the bias are trained with the encoder. Zhai et al. 2023, https://arxiv.org/abs/2303.15343.

    Args:
        scale: t at the start.
        bias: at the start; below 0, because most pairs do not belong together.
        mask_false_negatives: leave out candidates that are the row's own anchor or positive text once more, or belong
            to a row with its anchor, its positive or its group.
    """

    max_columns = None
    in_batch_negatives = True
    absent_texts = True
    citation = """@misc{zhai2023sigmoidlosslanguageimage,
    title = {Sigmoid Loss for Language Image Pre-Training},
    author = {Xiaohua Zhai and Basil Mustafa and Alexander Kolesnikov and Lucas Beyer},
    year = {2023},
    eprint = {2303.15343},
    archivePrefix = {arXiv},
}"""

    def __init__(self, scale: float = 10.0, bias: float = -10.0, mask_false_negatives: bool = True) -> None:
        super().__init__()
        refuse_not_positive("SigLIP scale", scale)  # its logarithm is trained
        refuse_infinite("SigLIP bias", bias)
        self.scale = scale
        self.bias = bias
        self.mask_false_negatives = mask_false_negatives
        self.max_whole = MAX_WHOLE

    def build(self, embedding_dimension: int) -> None:
        self.log_scale = nn.Parameter(torch.tensor([math.log(self.scale)]))  # ZeRO shares out nothing without a length
        self.logit_bias = nn.Parameter(torch.tensor([self.bias]))

    def forward(self, columns: Sequence[Tensor], targets: Targets) -> Tensor:
        batch = InBatch(columns, targets, "cosine", self.mask_false_negatives)
        candidates = batch.candidates(0, batch.documents)
        num_rows, num_candidates = len(candidates.queries_BD), len(candidates.candidates_ND)
        if num_rows * num_candidates <= self.max_whole:
            total = self._sum(candidates, slice(None))
        else:  # some rows at a time, computed once more in the backward pass: memory grows with B, not with B * N
            step = max(1, self.max_whole // num_candidates)
            blocks = [slice(start, start + step) for start in range(0, num_rows, step)]
            total = torch.stack([checkpoint(self._sum, candidates, rows, use_reentrant=False) for rows in blocks]).sum()
        self.last_metrics = candidates.metrics(targets.weight)
        return targets.weight * total

    def _sum(self, candidates: Candidates, rows: slice) -> Tensor:
        """Over these rows and all candidates."""
        everything = slice(None)
        cosines = similarity_matrix(candidates.queries_BD[rows], candidates.candidates_ND, "dot")
        logits = self.log_scale.exp() * cosines + self.logit_bias
        costs = F.softplus(torch.where(candidates.own(rows, everything), -logits, logits))
        left_out = candidates.left_out(rows, everything)
        return (costs if left_out is None else costs.masked_fill(left_out, 0.0)).sum()
